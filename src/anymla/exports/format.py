"""What a format is: how a converted model is written for some engines, checked, and served.

Every format is one folder: it is found by the class in the folder's format.py. Nothing here loads torch: a format
imports its writer and its engines inside the functions that run.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import anymla.exports
from anymla.cards import FOLDER
from anymla.exports.padding import PADS
from anymla.layouts import LAYOUTS, TARGETS, Layout

if TYPE_CHECKING:
    from anymla.exports.parity import Parity


class Format(ABC):
    """One format of ``anymla export``; its layout in anymla.layouts, of the same name, holds its limits.

    Attributes:
        name: what ``--to`` and ``--target`` call it.
        kind: what is written, as the model card says it.
        dtypes: of the weights.
        pads: the choices of ``--pad``; none where nothing is padded.
        default_pad: the one that is taken unasked.
        library: the library that loads it, as the hub's cards name it.
        loading: further arguments with which transformers loads it; None where transformers does not.
        place: what stands for the export's folder in the commands of its card.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    pads: ClassVar[tuple[str, ...]] = PADS
    default_pad: ClassVar[str] = "none"
    library: ClassVar[str] = "transformers"
    loading: ClassVar[str | None] = None
    place: ClassVar[str] = FOLDER

    @property
    def layout(self) -> Layout:
        """Returns what the format can hold."""
        return LAYOUTS[self.name]

    @property
    def caches(self) -> tuple[str, ...]:
        """The quantised caches for which the latent's gauge can be chosen."""
        return tuple(self.layout.shapes.cache_types)

    def dtype_of(self, own: str) -> str | None:
        """The dtype in which a model of dtype ``own`` is written unasked; None where one must be given."""
        return own if own in self.dtypes else None

    def check_source(self, model: str, folder: Path, vocab_size: int) -> None:  # noqa: B027 - most ask for nothing
        """Refuses, before weights are read, a model whose export would be refused after its conversion.

        The layout has judged the config before; what is left is in other files.

        Args:
            model: the original's name.
            folder: where its config and tokenizer are.
            vocab_size: its tokens.

        Raises:
            UnsupportedModelError: the format cannot hold the model.
        """

    @abstractmethod
    def write(self, converted: Path, folder: Path, *, dtype: str, pad: str, cache: str | None) -> Parity:
        """Writes the model of ``converted`` into the empty ``folder`` and holds it to the converted one.

        ``cache``: one of ``caches``, which it is to lose least with; None for a cache of floats.

        Raises:
            AnymlaError: one of its kinds: the format cannot hold the model, or the export is another model.
        """

    @abstractmethod
    def commands(self, folder: Path, place: Path | str, *, dtype: str, pad: str, cache: str | None) -> dict[str, str]:
        """The commands that serve what was written to ``folder`` and will be at ``place``, per engine."""


def all_formats() -> dict[str, Format]:
    """Every format by its name: the classes in the folders of anymla.exports, in the order of the layouts."""
    found: dict[str, Format] = {}
    for folder in pkgutil.iter_modules(anymla.exports.__path__, f"{anymla.exports.__name__}."):
        if folder.ispkg:
            module = importlib.import_module(f"{folder.name}.format")
            kinds = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Format)]
            found |= {kind.name: kind() for kind in kinds if kind.__module__ == module.__name__}
    return {name: found[name] for name in sorted(found, key=TARGETS.index)}
