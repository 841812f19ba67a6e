"""Tokenizers of the kinds that large models have, trained on a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from anymla.exports.gguf.tokenizer import LLAMA3, QWEN2, QWEN35

LINES = [
    "Once upon a time there was a little girl named Lily. She didn't like 123 dogs, but she'd 4567 cats.\n",
    "def f(x):\n    return x ** 2 + [y for y in range(10)]  # it's I'LL don't\n",
    "中文 кот naïve 🙂 café\r\n\ttab  two   three    spaces\n",
] * 20
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def _split(regex: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), level])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# llama.cpp's name: how text is split, whether words skip the merges, the normalizer, whether it begins with bos
KINDS: dict[str, tuple[Any, bool, Any, bool]] = {
    "llama-bpe": (_split(LLAMA3), True, None, True),
    "smaug-bpe": (_split(LLAMA3), False, None, False),
    "qwen2": (_split(QWEN2), False, normalizers.NFC(), False),
    "qwen35": (_split(QWEN35), False, None, False),
    "gpt-2": (_GPT2, False, None, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), False, None, False),
}


def byte_level(kind: str) -> Any:
    """A byte-level BPE tokenizer of that kind, with a chat template and a token that is not special."""
    pre, ignore, normalizer, begins = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", chat_template=TEMPLATE
    )
    fast.add_tokens(["<tool>"])
    return fast


def give_tokenizer(folder: Path, kind: str) -> Path:
    """Replaces the tokenizer of a checkpoint."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    byte_level(kind).save_pretrained(folder)
    return folder
