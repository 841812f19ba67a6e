"""Pretrains a small decoder from scratch and saves it as an ordinary Hugging Face folder.

    python benchmarks/testbed/train.py SHAPE -o OUT --text train.jsonl.xz --held-out valid.jsonl.xz

SHAPE is ``mha``, ``gqa`` (Llamas) or ``qwen3`` (norms on queries and keys). The tokenizer is a byte-level BPE of the
same text. Beside the weights lie ``log.jsonl``, a line per measurement, and ``training.json``: the command, tokens,
tokens per parameter, held-out loss, and the held-out cross-entropy of 1-, 2- and 3-gram models as a yardstick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

BOS = "<|bos|>"
LENGTH = 512  # tokens of a training window
HALVED = 0.6  # share of the tokens that is trained in half windows
TOKENS_PER_PARAMETER = 15
CONTEXT = 2048
COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "mha": (LlamaConfig, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}),
    "gqa": (LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}),
    "qwen3": (Qwen3Config, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}),
}


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose first token is BOS, which also ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents in a row, each begun by BOS; int16 [N]."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [0, *encoding.ids]
    return torch.tensor(ids, dtype=torch.int16)


def ngram_loss(train: Tensor, held_out: Tensor, order: int) -> float:
    """Held-out nats per token of an n-gram model, interpolated with the shorter ones (Witten and Bell)."""
    counts = [Counter(zip(*(train[i:].tolist() for i in range(n + 1)), strict=False)) for n in range(order)]
    totals: list[Counter[Any]] = [Counter() for _ in counts]
    kinds: list[Counter[Any]] = [Counter() for _ in counts]
    for n, table in enumerate(counts):
        for gram, count in table.items():
            totals[n][gram[:-1]] += count
            kinds[n][gram[:-1]] += 1
    ids, loss = held_out.tolist(), 0.0
    for position in range(order - 1, len(ids)):
        chance = 1 / 65536
        for n in range(order):
            gram = tuple(ids[position - n : position + 1])
            total, kind = totals[n][gram[:-1]], kinds[n][gram[:-1]]
            if total:
                chance = (counts[n][gram] + kind * chance) / (total + kind)
        loss -= math.log(chance)
    return loss / (len(ids) - order + 1)


def batches(ids: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Packed windows [size, LENGTH], each epoch in an order and from an offset of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(LENGTH, (), generator=generator))
        windows = ids[offset : offset + (len(ids) - offset) // LENGTH * LENGTH].view(-1, LENGTH)
        for rows in torch.randperm(len(windows), generator=generator).split(size):
            if len(rows) == size:
                yield windows[rows].long()


def loss_of(model: Any, window: Tensor) -> Tensor:
    """Mean nats per token [1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(window, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    layers = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    chosen = {id(weight) for weight in layers}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(layers, lr=0.02, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=0.005, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(done: float) -> float:
    """The learning rate's factor after a share ``done`` of the tokens: 1 % warm-up, then down to nothing."""
    return min(1.0, done / 0.01 + 0.05, 1.6 * (1 - done))


def train(model: Any, ids: Tensor, held_out: Tensor, log: Path, goal: int, batch: int) -> dict[str, Any]:
    """Trains on ``goal`` tokens; returns tokens, seconds and held-out loss."""
    parts, started, tokens = optimizers(model), time.perf_counter(), 0
    initial = [part.param_groups[0]["lr"] for part in parts]
    with log.open("w") as lines:
        for step, window in enumerate(batches(ids, batch, seed=0)):
            done = tokens / goal
            if done >= 1:
                break
            for part, lr in zip(parts, initial, strict=True):
                part.param_groups[0]["lr"] = lr * rate(done)
            # half windows first: attention is most of the time of so small a model
            loss = loss_of(model, window if done > HALVED else window.view(-1, LENGTH // 2))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in parts:
                part.step()
                part.zero_grad()
            tokens += window.numel()
            if step % 20 == 0:
                line = {"step": step, "tokens": tokens, "seconds": time.perf_counter() - started, "loss": loss.item()}
                print(json.dumps(line), file=lines, flush=True)
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "held_out_loss": held_out_loss(model, held_out)}


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor) -> float:
    """Mean nats per token over windows of the training length, float32."""
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).long()
    losses = []
    for window in windows.split(16):
        logits = model(window, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item())
    return sum(losses) / (len(windows) * (LENGTH - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, help=f"to train on; default {TOKENS_PER_PARAMETER} per parameter")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {LENGTH} tokens in a step")
    options = parser.parse_args()
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = documents(options.text)
    tokenizer = make_tokenizer(texts, options.vocabulary)
    ids, held_out = encode(texts, tokenizer), encode(documents(options.held_out), tokenizer)[: 256 * LENGTH]
    kind, heads = SHAPES[options.shape]
    model = AutoModelForCausalLM.from_config(kind(**COMMON, **heads, vocab_size=len(tokenizer)), dtype=torch.float32)
    parameters = model.num_parameters()
    goal = options.tokens or TOKENS_PER_PARAMETER * parameters
    result = train(model, ids, held_out, options.out / "log.jsonl", goal, options.batch)
    result |= {
        "parameters": parameters,
        "tokens_per_parameter": result["tokens"] / parameters,
        "epochs": result["tokens"] / len(ids),
        "ngram_loss": {str(order): ngram_loss(ids, held_out, order) for order in (1, 2, 3)},
        "threads": torch.get_num_threads(),
        "command": ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]],
    }
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
