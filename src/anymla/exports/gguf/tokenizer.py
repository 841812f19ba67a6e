"""A Hugging Face tokenizer as the keys from which llama.cpp makes the same tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anymla.errors import UnsupportedModelError, shown
from anymla.io.sources.gguf_tokenizer import DIGIT, GPT2, LLAMA3, QWEN2, QWEN35

if TYPE_CHECKING:
    from gguf import GGUFWriter

BYTE = re.compile(r"<0x[0-9A-F]{2}>$")
SPACE = "\u2581"
# how text is split, and whether a word of the vocabulary skips the merges: llama.cpp's name (src/llama-vocab.cpp)
SPLITS = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
}


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> None:
    """Writes vocabulary, merges or scores, special tokens and chat template.

    Args:
        writer: of the file.
        tokenizer: a tokenizer of transformers with a ``tokenizers`` backend.
        vocab_size: tokens of the model; where the tokenizer has fewer, the last ones are unused.
        ends: the ids at which generation ends.

    Raises:
        UnsupportedModelError: llama.cpp has no tokenizer that makes the same tokens, as far as anymla knows.
    """
    spec = known_tokenizer(tokenizer, vocab_size)
    model, ids = spec["model"], tokenizer.get_vocab()
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_begins_with_space(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(spec))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    tokens, types = _tokens(spec, ids, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model["byte_fallback"]:
        writer.add_token_scores(_scores(spec, tokens))
    _add_special(writer, tokenizer, ends)


def known_tokenizer(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The content of tokenizer.json, of which llama.cpp is known to make the same tokens; arguments as above.

    Raises:
        UnsupportedModelError: it is not known to.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedModelError(f"llama.cpp has no tokenizer known to equal {type(tokenizer).__name__}")
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UnsupportedModelError(
            f"the tokenizer has id {largest} and the model {vocab_size} tokens: GGUF wants one count"
        )
    if model["type"] != "BPE":
        raise UnsupportedModelError(f"llama.cpp: a tokenizer of type {model['type']} is not written, only BPE")
    if model["byte_fallback"]:
        _begins_with_space(spec)
        _merge_ranks(spec)
    else:
        pre_tokenizer_name(spec)
    return spec


def pre_tokenizer_name(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level BPE tokenizer.json splits text.

    Raises:
        UnsupportedModelError: none is known: another name would give other tokens, and nobody would notice.
    """
    normalizer, model = (spec["normalizer"] or {}).get("type"), spec["model"]
    if normalizer not in (None, "NFC"):  # llama.cpp leaves out NFC: text is in this form nearly always
        raise UnsupportedModelError(f"llama.cpp has no normalizer {normalizer}, which tokenizer.json asks for")
    splits = tuple(_splits(spec["pre_tokenizer"]))
    name = SPLITS.get((splits, bool(model.get("ignore_merges"))))
    if name is None:
        raise UnsupportedModelError(
            f"llama.cpp: no pre-tokenizer is known that splits as tokenizer.json does: {shown(' then '.join(splits))}"
        )
    return name


def _splits(part: Mapping[str, Any] | None) -> Iterator[str]:
    """The regular expressions that split text one after the other; what is no such split goes by its type."""
    match part:
        case {"type": "Sequence", "pretokenizers": parts}:
            for each in parts:
                yield from _splits(each)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            yield regex
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            yield regex  # what does not match is removed: nothing, for these match everything
        case {"type": "Digits", "individual_digits": True}:
            yield DIGIT
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            if regex:
                yield GPT2
        case _:
            yield str(part["type"] if part else None)


def _begins_with_space(spec: Mapping[str, Any]) -> bool:
    """Whether SentencePiece puts a space in front of the text."""
    prefix = False
    for part in [*_parts(spec["normalizer"], "normalizers"), *_parts(spec["pre_tokenizer"], "pretokenizers")]:
        match part:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}:
                prefix = scheme != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                pass  # Gemma: there are no spaces left
            case _:
                raise UnsupportedModelError(f"llama.cpp has no {shown(part)}, which tokenizer.json asks for")
    return prefix


def _parts(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    return [] if part is None else list(part[name]) if part["type"] == "Sequence" else [part]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in model["merges"]]  # of a loaded tokenizer: pairs, never joined strings


def _tokens(spec: Mapping[str, Any], ids: Mapping[str, int], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every id."""
    from gguf import TokenType

    tokens = [f"[unused {number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    pieces = spec["model"]["byte_fallback"]
    for token, number in ids.items():
        byte = pieces and BYTE.match(token)
        tokens[number], types[number] = token, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = int(kind)
        if pieces and kind is TokenType.USER_DEFINED:  # llama.cpp looks for these in the text as it is written
            tokens[added["id"]] = added["content"].replace(SPACE, " ")
    if pieces and (unknown := ids.get(spec["model"]["unk_token"])) is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(spec: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """SentencePiece's score of every token: the earlier it is merged, the higher."""
    ranks = _merge_ranks(spec)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _merge_ranks(spec: Mapping[str, Any]) -> dict[str, int]:
    """Which piece is merged before which.

    llama.cpp has no list of merges here: it joins any two pieces that make a third.

    Raises:
        UnsupportedModelError: tokenizer.json's merges say something else.
    """
    merges, pieces = _merges(spec["model"]), spec["model"]["vocab"]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    added = {token["content"] for token in spec["added_tokens"]}
    possible = {
        (piece[:cut], piece[cut:])
        for piece in pieces.keys() - added
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    }
    order = [ranks[left + right] for left, right in merges]
    if possible - set(merges) or order != sorted(order):
        raise UnsupportedModelError("llama.cpp: the merges of tokenizer.json are not those of a SentencePiece model")
    return ranks


def _add_special(writer: GGUFWriter, tokenizer: Any, ends: Sequence[int]) -> None:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(begin is not None and ids[:1] == [begin])
    writer.add_add_eos_token(end is not None and ids[-1:] == [end])
    others = [each for each in ends if each != end]
    if end is None and others:
        end = others.pop(0)
    for add, number in (
        (writer.add_bos_token_id, begin),
        (writer.add_eos_token_id, end),
        (writer.add_eot_token_id, others[-1] if others else None),  # further ones llama.cpp knows by their names
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
