"""`anymla eval`: perplexity on a text and benchmarks, of a model and of the original it was made from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from anymla.architectures.model_spec import context_of
from anymla.errors import CheckpointError, RecipeError, TextError
from anymla.evaluation.benchmarks import Benchmarks, Evaluation, prepare
from anymla.evaluation.measures import compare
from anymla.io.checkpoint import load_tokenizer
from anymla.io.computing import load_to_compute
from anymla.io.device import pick_device, versions
from anymla.io.find import with_revision
from anymla.io.sources.locate import Located, locate
from anymla.io.sources.plain import Plain, plain_source

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.evaluation.likelihood import Track
    from anymla.evaluation.scores import Scores

Note = Callable[[str], None]


@overload
def evaluate(
    model: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    *,
    tokens: int | None = None,
    length: int = 1024,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    note: Note | None = None,
) -> Scores: ...


@overload
def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    against: str | Path | None = None,
    *,
    benchmarks: Benchmarks,
    tokens: int | None = None,
    length: int = 1024,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    track: Track | None = None,
    note: Note | None = None,
) -> Evaluation: ...


def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    against: str | Path | None = None,
    *,
    benchmarks: Benchmarks | None = None,
    tokens: int | None = None,
    length: int = 1024,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    track: Track | None = None,
    note: Note | None = None,
) -> Scores | Evaluation:
    """Perplexity of a model on a text, KL and same top token to another, its live cache's size; benchmarks.

    Args:
        model: a local folder or hub id (also ``org/name@revision``), converted or not.
        text: a text file, a .jsonl file or a hub data set, as for calibration; read in order, not sampled.
        against: the original to compare to.
        benchmarks: what else to measure, with or without a text; what is returned then holds all of it.
        tokens: read at most this many tokens of the text. Default: all.
        length: tokens per window of the text, and of the longest probe (at most the model's context).
        dtype: dtype to run in. Default: the checkpoint's, or float32 where this CPU computes faster in that; cache
            bytes are then still those of the checkpoint's dtype.
        device: cpu, cuda, ...; auto takes a GPU where there is one.
        revision: of ``model`` on the hub, a branch, tag or commit.
        adapter: a peft adapter to merge into the original: into ``against``, into ``model`` where that is not given.
        track: given steps and what they do, gives the steps again; to show how far it is.
        note: called with what was done to a source that is no plain folder, in words.

    Raises:
        CheckpointError, RecipeError, TextError: as the message says.
    """
    wanted = benchmarks or Benchmarks()
    if text is None and not wanted.wanted:
        raise RecipeError("nothing to evaluate: give --text, --tasks, --probe, --blimp or --lambada")
    from anymla.data.text import check_texts
    from anymla.evaluation.likelihood import untracked

    check_texts({"--text": text})
    wanted.check_paths()
    ours, theirs = (adapter, None) if against is None else (None, adapter)
    device, source = pick_device(device), locate(with_revision(model, revision), adapter=ours)
    other = None if against is None else locate(against, adapter=theirs)
    asked = _Asked(text, tokens, length, dtype, device, wanted, track or untracked, note)
    found = asked.of(source, other)
    if benchmarks is None and found.scores is not None:
        return found.scores
    return replace(found, settings={**found.settings, "adapter": None if adapter is None else str(adapter)})


@dataclass(frozen=True)
class _Asked:
    """What is measured of a model and its original, and who is told."""

    text: str | Path | None
    tokens: int | None
    length: int
    dtype: str | None
    device: str
    benchmarks: Benchmarks
    track: Track
    note: Note | None

    def of(self, source: Located, other: Located | None) -> Evaluation:
        """Measures ``source``, and beside it ``other``, the original."""
        from anymla.evaluation.scores import score_both

        with ExitStack() as stack:
            plain = self._plain(stack, source)
            context, tokenizer = context_of(plain.folder), load_tokenizer(plain.folder)
            window = min(self.length, context or self.length)
            prepared = prepare(self.benchmarks, tokenizer, context=context, length=window, track=self.track)
            windows = None if self.text is None else _windows(self.text, tokenizer, self.tokens, window)
            loaded = load_to_compute(plain.folder, dtype=self.dtype, device=self.device)
            if windows is not None:
                _check_vocabulary(windows, loaded, self.text)
            theirs = None if other is None else self._plain(stack, other)
            original = None if theirs is None else load_to_compute(theirs.folder, dtype=self.dtype, device=self.device)
        if other is not None:
            _check_original(loaded, original, source.name, other.name)
        results = {
            kind: compare(run(loaded, "model"), None if original is None else run(original, "original"))
            for kind, run in prepared.items()
        }
        scores = reference = None
        if windows is not None:
            scores, reference = score_both(loaded, self.track(list(windows), "text"), original)
        others = ("lm-eval", "datasets") if self.benchmarks.tasks else ()
        return Evaluation(
            scores=scores,
            original=reference,
            benchmarks=results,
            settings={
                **_named(source, plain, other, theirs),
                "text": None if self.text is None else str(self.text),
                "tokens": self.tokens,
                "length": window,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "checkpoint_dtype": str(loaded.config.dtype).removeprefix("torch."),
                "device": self.device,
                **self.benchmarks.model_dump(mode="json"),
            },
            versions=versions(*others),
        )

    def _plain(self, stack: ExitStack, source: Located) -> Plain:
        plain = stack.enter_context(plain_source(source))
        if self.note is not None:
            for text in plain.notes:
                self.note(f"{source.name}: {text}")
        return plain


def _named(source: Located, plain: Plain, other: Located | None, theirs: Plain | None) -> dict[str, Any]:
    """What was measured, under its JSON names."""
    return {
        "model": source.name,
        "commit": plain.commit,
        "against": None if other is None else other.name,
        "against_commit": None if theirs is None else theirs.commit,
    }


def _windows(text: str | Path, tokenizer: Any, tokens: int | None, length: int) -> Tensor:
    from anymla.data.text import read_documents, text_windows

    return text_windows(read_documents(text), tokenizer, text, length=length, tokens=tokens)


def _check_original(loaded: Any, original: Any, model: str, against: str) -> None:
    if (theirs := _vocabulary(original)) != (ours := _vocabulary(loaded)):
        raise CheckpointError(
            f"{against} has a vocabulary of {theirs} and {model} of {ours}: "
            "--against must be the model it was converted from"
        )


def _check_vocabulary(windows: Tensor, model: Any, text: str | Path | None) -> None:
    if (largest := int(windows.max())) >= (size := _vocabulary(model)):
        raise TextError(f"{text}: the tokenizer gives id {largest} but the model has {size} tokens")


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
