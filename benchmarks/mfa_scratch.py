"""Trains small models from scratch with MFA, MFA-KR, MHA, GQA, MQA and MLA at equal cache and equal weights.

    python benchmarks/mfa_scratch.py [--steps 500] [--seeds 3] [--cached 32]

Each has the same bytes of cache (but MHA, which has all) and, by its intermediate size, nearly the same number of
weights. Prints the loss on held-out text, the mean over seeds and the deviation.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, LlamaConfig

import anymla
from anymla.account import measure
from anymla.data.text import bundled_text
from anymla.demo import bundled_model

HIDDEN, LAYERS, HEADS, HEAD_DIM, VOCABULARY = 64, 2, 8, 8, 512
TOKENS, ROWS, RATE = 64, 8, 3e-3


def llama(intermediate: int, **changes: Any) -> LlamaConfig:
    """A stock config."""
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": intermediate, "head_dim": HEAD_DIM},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 4 * TOKENS},
    }
    return LlamaConfig(**sizes | changes)


def deepseek(intermediate: int, rope: int, rank: int) -> DeepseekV3Config:
    """MLA as transformers has it, dense."""
    return DeepseekV3Config(
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": intermediate, "q_lora_rank": None},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS},
        **{"kv_lora_rank": rank, "qk_rope_head_dim": rope, "qk_nope_head_dim": HEAD_DIM, "v_head_dim": HEAD_DIM},
        **{"first_k_dense_replace": LAYERS, "max_position_embeddings": 4 * TOKENS},
    )


def kinds(cached: int) -> dict[str, Callable[[int], Any]]:
    """Configs by the intermediate size, with ``cached`` numbers per token and layer."""
    groups = max(1, cached // (2 * HEAD_DIM))
    return {
        "MHA": lambda size: llama(size, num_key_value_heads=HEADS),
        "GQA": lambda size: llama(size, num_key_value_heads=groups),
        "MQA": lambda size: llama(size, num_key_value_heads=1, head_dim=cached // 2),
        "MLA": lambda size: deepseek(size, cached // 4, cached - cached // 4),
        "MFA": lambda size: anymla.fresh_config(llama(size), cached_numbers=cached, heads=2 * HEADS),
        "MFA-KR": lambda size: anymla.fresh_config(llama(size), cached_numbers=cached, heads=HEADS, key_reuse=True),
    }


def sized(make: Callable[[int], Any], weights: int) -> Any:
    """The config whose model has nearest to ``weights`` weights."""
    low, high = (count(make(size)) for size in (64, 128))
    return make(max(8, round(64 + (weights - low) * 64 / (high - low))))


def count(config: Any) -> int:
    """Weights of a model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def tokens(kind: str) -> torch.Tensor:
    """The bundled text in rows [N,T]."""
    ids = AutoTokenizer.from_pretrained(bundled_model())(bundled_text(kind).read_text(encoding="utf-8")).input_ids
    return torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)


def trained_loss(config: Any, rows: torch.Tensor, held_out: torch.Tensor, steps: int, seed: int) -> float:
    """Held-out loss in nats per token after ``steps`` steps; gates are left out of weight decay."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        batch = rows[torch.randint(len(rows), (ROWS,))]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [model.eval()(part, labels=part).loss.item() * len(part) for part in held_out.split(ROWS)]
    return sum(losses) / len(held_out)


def main() -> None:
    """Prints a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cached", type=int, default=32, help="numbers per token and layer")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows, held_out = tokens("train"), tokens("valid")[:256]
    weights = count(llama(192, num_key_value_heads=HEADS))
    print("| attention | cache, bytes per token | weights | loss | deviation |\n|---|---|---|---|---|")
    for name, make in kinds(given.cached).items():
        config = sized(make, weights)
        cache = measure(AutoModelForCausalLM.from_config(config)).cache_bytes_per_token
        losses = [trained_loss(config, rows, held_out, given.steps, seed) for seed in range(given.seeds)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"| {name} | {cache} | {count(config)} | {statistics.mean(losses):.4f} | {spread:.4f} |", flush=True)


if __name__ == "__main__":
    main()
