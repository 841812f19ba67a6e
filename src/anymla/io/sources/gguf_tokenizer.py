"""The tokenizer of a GGUF file: as transformers reads it, with what some of its versions leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from anymla.errors import UnsupportedModelError

DIGIT = r"\p{N}"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + LINES
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + LINES
REGEXES = {  # by which byte-level text is split, by llama.cpp's names (src/llama-vocab.cpp)
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "qwen35": QWEN35,
}
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")  # then as GPT-2
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")  # where words of the vocabulary skip the merges
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are found in text before it is split


def read_tokenizer(file: Path, field: Callable[[str], Any]) -> Any:
    """The tokenizer in ``file``; ``field`` gives a value of its metadata, or None.

    Raises:
        UnsupportedModelError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # tokenizers raise anything
        raise UnsupportedModelError(
            f"{file}: transformers cannot read its tokenizer: {' '.join(str(error).split()):.200}"
        ) from error
    tokens = field("tokenizer.ggml.tokens") or []
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := field(f"tokenizer.ggml.{key}_token_id")) is not None and number < len(tokens):
            setattr(tokenizer, f"{name}_token", tokens[number])
    _add_tokens(tokenizer, tokens, field("tokenizer.ggml.token_type") or [])
    if field("tokenizer.ggml.model") == "gpt2":
        _split_as_named(tokenizer.backend_tokenizer, field("tokenizer.ggml.pre"))
        if field("tokenizer.ggml.add_bos_token"):
            _begin(tokenizer)
    return tokenizer


def _split_as_named(backend: Any, name: str | None) -> None:
    from tokenizers import Regex, decoders
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    backend.decoder = decoders.ByteLevel()
    if name in DIGITS_FIRST:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif name in REGEXES:
        level = ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = Sequence([Split(Regex(REGEXES[name]), "isolated"), level])
    if name in WHOLE_WORDS:
        backend.model.ignore_merges = True


def _begin(tokenizer: Any) -> None:
    """Text begins with the token for that, where it does not yet."""
    from tokenizers.processors import TemplateProcessing

    begin, number = tokenizer.bos_token, tokenizer.bos_token_id
    if number is not None and tokenizer("a").input_ids[:1] != [number]:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B:1", special_tokens=[(begin, number)]
        )


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[int]) -> None:
    """Makes tokens of the file that stand for themselves known as such; those that are known stay as they are."""
    from tokenizers import AddedToken

    known, found = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind in (CONTROL, USER_DEFINED) and number not in known and found.get(token) == number:
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            tokenizer.add_tokens([added], special_tokens=kind == CONTROL)
