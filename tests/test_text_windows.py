"""Windows of text begin as the tokenizer begins a text, and hold no other special token."""

import pytest

from anymla.data.text import bundled_text, calibration_windows, first_tokens, read_documents, text_windows
from anymla.errors import TextError
from anymla.io.checkpoint import load_tokenizer
from tests.damage import BUNDLED
from tests.tokenizers import byte_level

DOCUMENTS = ["Once upon a time. " * 60, "There was a cat. " * 80, "She had a dog. " * 200]


@pytest.mark.parametrize(("kind", "begins"), [("llama-bpe", True), ("smollm", False), ("gpt-2", False)])
def test_a_window_begins_as_the_tokenizer_begins_a_text(kind, begins):
    tokenizer = byte_level(kind)
    begin = [tokenizer.bos_token_id] if begins else []
    assert first_tokens(tokenizer) == begin
    windows = text_windows(DOCUMENTS, tokenizer, "text", length=64, tokens=1024)
    assert windows.shape == (16, 64)
    assert (windows == tokenizer.bos_token_id).sum() == (16 if begins else 0)
    if begins:
        assert (windows[:, 0] == tokenizer.bos_token_id).all()
    whole = tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]
    assert windows[:, len(begin) :].flatten().tolist() == whole[: 16 * (64 - len(begin))]


def test_so_do_those_of_calibration():
    tokenizer = load_tokenizer(BUNDLED)
    windows = calibration_windows(bundled_text("train"), tokenizer, tokens=4096, length=128, seed=0)
    assert windows.shape == (32, 128)
    assert (windows[:, 0] == 1).all()
    assert not (windows[:, 1:] == 1).any()


def test_an_end_token_begins_nothing():
    """Some tokenizers put EOS after a text, as those of T5 do."""

    def tokenizer(text, *, add_special_tokens, verbose):
        return {"input_ids": [7, 8, 9] if add_special_tokens else [7, 8]}

    assert first_tokens(tokenizer) == []


@pytest.mark.parametrize("tokens", [256, 300, None])
def test_short_text_makes_short_windows(tokens):
    tokenizer = load_tokenizer(BUNDLED)
    documents = read_documents(bundled_text("valid"))[:4]
    windows = text_windows(documents, tokenizer, "text", length=10_000, tokens=tokens, at_least=8)
    assert len(windows) == 8
    assert (windows[:, 0] == 1).all()
    with pytest.raises(TextError, match=r"text a\.txt gives"):
        text_windows(["Once"], tokenizer, "a.txt", length=64)
