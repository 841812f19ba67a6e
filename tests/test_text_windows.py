"""Windows of text begin with the BOS token, and so do documents inside them."""

import pytest

from anymla.data.text import (
    bundled_text,
    calibration_windows,
    first_tokens,
    read_documents,
    text_windows,
    token_windows,
)
from anymla.errors import TextError
from anymla.io.checkpoint import load_tokenizer
from tests.damage import BUNDLED
from tests.tokenizers import byte_level

DOCUMENTS = ["Once upon a time. " * 20, "There was a cat. " * 20, "She had a dog. " * 200]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", ["llama-bpe", "smollm"])
def test_a_window_begins_with_the_bos_token(kind, begins):
    tokenizer = byte_level(kind)
    if not begins:
        tokenizer.init_kwargs["add_bos_token"] = False
    begin = [tokenizer.bos_token_id] if begins else []
    assert first_tokens(tokenizer) == begin
    windows = text_windows(DOCUMENTS, tokenizer, "text", length=64, tokens=1024)
    assert windows.shape == (16, 64)
    assert all(row[: len(begin)].tolist() == begin for row in windows)
    plain = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in DOCUMENTS]
    left = [token for token in windows.flatten().tolist() if token != tokenizer.bos_token_id]
    assert left == [token for ids in plain for token in ids][: len(left)]
    starts = (windows == tokenizer.bos_token_id).sum()
    assert starts == ((16 + 2) if begins else 0)  # the second and the third document begin inside windows


def test_calibration_has_no_bos_between_pieces_of_one_document(tmp_path):
    tokenizer = load_tokenizer(BUNDLED)
    (tmp_path / "one.txt").write_text("\n\n".join(read_documents(bundled_text("train"))))
    windows = calibration_windows(tmp_path / "one.txt", tokenizer, tokens=4096, length=128, seed=1)
    assert windows.shape == (32, 128)
    assert (windows[:, 0] == 1).all()
    assert not (windows[:, 1:] == 1).any()
    several = calibration_windows(bundled_text("train"), tokenizer, tokens=4096, length=128, seed=1)
    assert (several[:, 0] == 1).all()
    assert (several[:, 1:] == 1).any()


def test_documents_without_tokens_are_left_out():
    """Else a window would be a token short."""
    windows = token_windows([[5] * 255, [], [6] * 2], [1], "text", length=4096, tokens=257)
    assert windows.tolist() == [[1, *[5] * 255, 1]]


def test_a_window_has_room_for_text():
    with pytest.raises(TextError, match="windows of 1 tokens hold no text"):
        token_windows([[5] * 300], [1], "a.txt", length=1)


@pytest.mark.parametrize("tokens", [256, 300, None])
def test_short_text_makes_short_windows(tokens):
    tokenizer = load_tokenizer(BUNDLED)
    documents = read_documents(bundled_text("valid"))[:4]
    windows = text_windows(documents, tokenizer, "text", length=10_000, tokens=tokens)
    assert len(windows) == 1
    assert (windows[:, 0] == 1).all()
    with pytest.raises(TextError, match=r"text a\.txt gives"):
        text_windows(["Once"], tokenizer, "a.txt", length=64)
