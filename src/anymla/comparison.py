"""`anymla compare`: any checkpoints side by side on one text, stock ones and converted ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.account import measure
from anymla.architectures.model_spec import context_in, source_config
from anymla.errors import CheckpointError, RecipeError, TextError
from anymla.io.checkpoint import check_weights, load_tokenizer
from anymla.io.device import pick_device, versions
from anymla.io.safetensors import read_header
from anymla.io.sources.locate import Located, locate
from anymla.io.sources.plain import Plain, plain_source
from anymla.run_outcome import Cost, Quality, packed_bits

if TYPE_CHECKING:
    from torch import Tensor

    from anymla.evaluation.likelihood import Track
    from anymla.evaluation.reference import Reference

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One of the models.

    ``account``: its bytes, of weights as they are stored, of the cache as measured. ``seconds``: that it took to read
    the text. ``notes``: what was done to its files first, where they were not plain.
    """

    name: str
    commit: str | None
    account: Cost
    quality: Quality
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """All models, the first one being what KL and agreement are to, and how they were measured."""

    models: tuple[ComparedModel, ...]
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The comparison under its stable JSON names."""
        return asdict(self)


def compare(
    models: Sequence[str | Path],
    text: str | Path,
    *,
    teacher: str | Path | None = None,
    tokens: int | None = None,
    length: int = 1024,
    context: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    track: Track | None = None,
    note: Note | None = None,
) -> ModelComparison:
    """Measures models on one text: bytes of weights and cache, perplexity, KL and same top token to the first one.

    Args:
        models: folders, GGUF files or hub ids (also ``org/name@revision``), converted or not.
        text: a text file, a .jsonl file or a hub data set, as for calibration; read in order, not sampled.
        teacher: what KL and agreement are to. Default: the first of ``models``.
        tokens: read at most this many tokens of the text. Default: all.
        length: tokens per window, at most the shortest context of the models.
        context: tokens at which the size of the cache is told. Default: the shortest context of the models.
        dtype: dtype to run in. Default: each checkpoint's, or float32 where this CPU computes faster in that; cache
            bytes are then still those of the checkpoint's dtype.
        device: cpu, cuda, ...; auto takes a GPU where there is one.
        track: given steps and what they do, gives the steps again; to show how far it is.
        note: called with what was done to a source that is no plain folder, in words.

    The first model stays loaded while the others come one by one.

    Raises:
        CheckpointError, RecipeError, TextError: as the message says.
    """
    from anymla.data.text import check_texts
    from anymla.evaluation.likelihood import untracked

    first = models[0] if teacher is None and models else teacher
    names = list(dict.fromkeys(str(name) for name in ([] if first is None else [first, *models])))
    if len(names) < 2:
        raise RecipeError("a comparison needs two models: give another one, or --teacher")
    check_texts({"--text": text})
    device = pick_device(device)
    found = [locate(name) for name in names]
    known = (context_in(source_config(each), each.base) for each in found)
    contexts = [size for size in known if size is not None]
    length = min(length, *contexts) if contexts else length
    context = context or min(contexts or [length])
    asked = _Asked(str(text), tokens, length, context, dtype, device, track or untracked, note)
    settings = {"teacher": names[0], "text": str(text), "tokens": tokens, "length": length, "context": context}
    return ModelComparison(
        models=tuple(asked.all_of(found)),
        settings=settings | {"dtype": dtype, "device": asked.device},
        versions=versions(),
    )


@dataclass(frozen=True)
class _Asked:
    """What is measured of each model, and who is told."""

    text: str
    tokens: int | None
    length: int
    context: int
    dtype: str | None
    device: str
    track: Track
    note: Note | None

    def all_of(self, found: Sequence[Located]) -> Iterator[ComparedModel]:
        """Measures the first one, then each beside it; one that is no checkpoint is refused before any is loaded."""
        sizes = [_stored_bytes(source) for source in found]
        reference = None
        for source, size in zip(found, sizes, strict=True):
            model, windows, plain = self._loaded(source)
            began = time.monotonic()
            if reference is None:
                reference = self._reference(model, windows, source)
            _check_alike(reference, model, windows, (found[0].name, source.name))
            yield self._compared(source, size, model, reference, plain, began)
            del model  # the next one needs its room

    def _loaded(self, source: Located) -> tuple[Any, Tensor, Plain]:
        """The model, and the windows [N,T] that its tokenizer makes of the text."""
        from anymla.data.text import read_documents, text_windows
        from anymla.io.computing import load_to_compute

        with plain_source(source) as plain:
            if self.note is not None:
                for told in plain.notes:
                    self.note(f"{source.name}: {told}")
            documents, tokenizer = read_documents(self.text), load_tokenizer(plain.folder)
            windows = text_windows(documents, tokenizer, self.text, length=self.length, tokens=self.tokens)
            return load_to_compute(plain.folder, dtype=self.dtype, device=self.device), windows, plain

    def _reference(self, model: Any, windows: Tensor, source: Located) -> Reference:
        from anymla.evaluation.reference import Reference

        if (largest := int(windows.max())) >= (size := _vocabulary(model)):
            raise TextError(f"{self.text}: the tokenizer of {source.name} gives id {largest} of {size} tokens")
        return Reference.of(model, windows, track=self.track, label=source.name)

    def _compared(
        self, source: Located, size: int, model: Any, reference: Reference, plain: Plain, began: float
    ) -> ComparedModel:
        cache = measure(model, (self.context,))
        scores = reference.scores(model, cache, track=self.track, label=source.name)
        return ComparedModel(
            name=source.name,
            commit=plain.commit,
            account=Cost(
                weight_bytes=size,
                cache_bytes_per_token=cache.cache_bytes_per_token,
                cache_bytes_once=cache.cache_bytes_once,
                context=self.context,
                cache_bytes_at_context=cache.cache_bytes_at[str(self.context)],
                bits_per_weight=None if source.base.is_file() else packed_bits(source.base),
            ),
            quality=Quality(**{name: getattr(scores, name) for name in Quality.__dataclass_fields__}),
            seconds=time.monotonic() - began,
            notes=plain.notes,
        )


def _stored_bytes(source: Located) -> int:
    """Bytes of the weights as they are stored: of all tensors in a folder, or of a GGUF file.

    Raises:
        CheckpointError: the weights are missing or broken.
    """
    if source.base.is_file():
        return source.base.stat().st_size
    files = check_weights(source.base, floats=source.quantised is None)
    return sum(tensor.size for file in files for tensor in read_header(file).values())


def _check_alike(reference: Reference, model: Any, windows: Tensor, names: tuple[str, str]) -> None:
    """Refuses models that do not read the same tokens.

    Raises:
        CheckpointError: another vocabulary, or another tokenizer.
    """
    first, other = names
    if (theirs := _vocabulary(reference.original)) != (ours := _vocabulary(model)):
        raise CheckpointError(f"{first} has a vocabulary of {theirs} and {other} of {ours}: they cannot be compared")
    read = reference.read
    if windows.shape != read.shape or not bool((windows.to(read.device) == read).all()):
        raise CheckpointError(
            f"{first} and {other} have tokenizers that read the text differently: they cannot be compared"
        )


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
