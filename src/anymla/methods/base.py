"""What a method is: settings that turn one ModelSpec into another, and then make the weights that fit it.

Every method is one file: it is found by its class, and its name, paper and phase are class attributes. Nothing here
loads torch: a method's file imports it inside the functions that run.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

import anymla.methods
from anymla.errors import RecipeError, did_you_mean
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import MOST, DtypeName, Settings

if TYPE_CHECKING:
    from anymla.model_run.stream import LayerBatch
    from anymla.sweep.layer import Layer, Observer


SHARED = (  # fields that come after a method's own
    *("calibration", "calibration_tokens", "calibration_length"),
    *("adapter", "device", "dtype", "seed"),
)

# Per layer what a survey gathered, as JSON gives it back; None: not looked at. Tensors are io.safetensors.Stored: they
# stay in their files until a method reads them.
Facts = list[dict[str, Any] | None]


class Phase(IntEnum):
    """When a method's turn is; a recipe's steps never go back to an earlier phase."""

    DEPTH = 1
    WIDTH = 2
    ATTENTION = 3
    HEAL = 4
    WEIGHTS = 5
    CACHE = 6


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from; ``arxiv`` is None for one of anymla's own."""

    title: str
    arxiv: str | None = None

    @property
    def link(self) -> str | None:
        """The paper's page."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step will make: the model after it, and what the method chose for each layer.

    ``choices``: of a layer method, one per layer of the model before; None for a layer that stays as it is.
    ``removed``: the layers, by their numbers before, that ``after`` does not have.
    """

    after: ModelSpec
    choices: tuple[Any, ...] = ()
    removed: frozenset[int] = frozenset()

    def place(self, index: int) -> int | None:
        """The number after the step of the layer that had ``index``; None where it is removed."""
        return None if index in self.removed else index - sum(gone < index for gone in self.removed)

    def layer(self, index: int) -> LayerSpec | None:
        """What becomes of the layer that had ``index``; None where it is removed."""
        return None if (place := self.place(index)) is None else self.after.layers[place]


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What a layer became: its new spec, and what the method has to say of it, ready for JSON."""

    spec: LayerSpec
    result: dict[str, Any]


class Survey(ABC):
    """What a method gathers on calibration text before its plan is final. anymla.sweep runs it and stores its facts.

    ``backward``: whether it needs gradients of the final loss. Its observers then see one window at a time, with the
    gradient with respect to the layer's output. The layer's weights have theirs in ``grad``, which is None if a window
    did not reach a weight.
    """

    backward: ClassVar[bool] = False

    def layers(self, total: int) -> set[int]:
        """Which of ``total`` layers it looks at; nothing runs after the last of them."""
        return set(range(total))

    @abstractmethod
    def observer(self, layer: Layer) -> Observer:
        """What collects while the original layer runs."""

    @abstractmethod
    def layer(self, layer: Layer, observed: Any) -> dict[str, Any]:
        """What there is to know of the layer, over all processes: tensors by name, and what is ready for JSON.

        ``observed``: what :meth:`observer` gave.
        """


Chosen = dict[int, dict[str, Any]]  # what a search says of layers, by their numbers, ready for JSON
Look = Callable[[Survey], Facts]  # what a survey says of the model as a search has made it so far


class Search(ABC):
    """Changes that a method chooses by the KL of the whole model, in rounds; anymla.sweep tries them.

    ``count``: how many rounds there will be, as far as is known before.
    """

    count: int

    @abstractmethod
    def candidates(self, chosen: Chosen, look: Look) -> list[Chosen]:
        """What may be said beside ``chosen``, or in place of its entries, in this round; none where that is enough.

        Of those that lose as much the last one is taken. ``look`` runs the calibration text through all layers.
        """

    @abstractmethod
    def plan(self, chosen: Chosen) -> Plan:
        """What the model is with ``chosen``."""


class Method(Settings, ABC):
    """One step of a recipe: its fields are YAML keys, help texts and rows of the docs.

    ``summary``: what it does, in one line. ``saves``: of "cache", "weights" and "compute"; none where it heals.
    ``excludes``: names of methods that cannot stand in one recipe with it. ``example``: settings to begin with, where
    the defaults do nothing.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    phase: ClassVar[Phase]
    summary: ClassVar[str]
    saves: ClassVar[tuple[str, ...]]
    excludes: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[dict[str, Any]] = {}

    def refuses(self, model: ModelSpec) -> str | None:
        """Why the method cannot be applied to ``model``, from its config alone; None where it can."""
        return None

    @abstractmethod
    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """What the model becomes; pure: the same arguments give the same plan.

        ``facts``: what the survey gathered, empty where there was none; None in a dry run. ``choices``: those of an
        earlier plan, in which only what is still open is decided.

        Raises:
            InfeasibleError: the settings cannot be met; the message names what can.
        """


class Unheard:
    """An observer of a layer of which a survey has seen all, or its weights say all."""

    def add(self, batch: LayerBatch) -> None:
        """Takes a batch."""


class SweptMethod(Method):
    """A method that changes one layer at a time, as anymla.sweep runs it over a checkpoint; it reads no text.

    Its layers are shown windows of random tokens, which tell what they compute and nothing of what texts are.
    Its fields say what it runs on; a method's own come before them.
    """

    adapter: str | None = Field(
        None,
        min_length=1,
        description="A peft adapter (a folder or a hub id) to merge into the original's weights first. Default: the "
        "one beside the weights, if there is one. none: leave it out.",
    )
    device: str = Field("auto", max_length=60, description="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    dtype: DtypeName | None = Field(
        None,
        description="Dtype to load, compute and save in. Default: the checkpoint's. If this CPU is faster in float32, "
        "it computes in that.",
    )

    @field_validator("calibration", "adapter", mode="before", check_fields=False)
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Puts the method's own fields before the shared ones: so they stand in --help, YAML and docs."""
        fields = cls.model_fields
        own = {name: field for name, field in fields.items() if name not in SHARED}
        cls.__pydantic_fields__ = own | {name: fields[name] for name in SHARED if name in fields}
        cls.model_rebuild(force=True)

    def survey(self, model: ModelSpec, plan: Plan) -> Survey | None:
        """What to gather on calibration text before ``plan`` is final; None for nothing."""
        return None

    def search(self, model: ModelSpec) -> Search | None:
        """Which layers to try on calibration text before the plan is final; None where they are known.

        What was chosen of a layer is its facts, and the ``kl`` of that round. Trials call :meth:`apply` with nothing
        observed.
        """
        return None

    def possible(self, model: ModelSpec) -> Iterable[Plan]:
        """Plans of which the model's config must be able to say each; one that it cannot is refused before weights."""
        return ()

    def told(self, plan: Plan) -> str:
        """What the card says of a final plan, in Markdown."""
        return ""

    @abstractmethod
    def observer(self, layer: Layer) -> Observer:
        """What collects while the original layer runs over its stream; see anymla.sweep.layer.Observer."""

    @abstractmethod
    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Changes ``layer.module`` in place to what the plan says; ``observed``: what :meth:`observer` gave."""


class LayerMethod(SweptMethod):
    """A swept method whose layers are shown calibration text."""

    calibration: str | None = Field(
        None,
        min_length=1,
        description="Text file, .jsonl (field 'text') or hub data set name[:config[:split]]. "
        "Default: bundled stories, which need no network. Text like yours keeps more quality.",
    )
    calibration_tokens: int = Field(
        32768, ge=256, le=MOST, description="Tokens of calibration text to use. More take longer, and gain little."
    )
    calibration_length: int = Field(
        1024,
        ge=8,
        le=MOST,
        description="Tokens per calibration window (at most the model's context). Give the length that you will serve, "
        "and more calibration_tokens with it: longer contexts lose more, and so do few windows.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**63 - 1,
        description="Random seed that draws the pieces of the calibration text. The same seed gives the same model.",
    )


def all_methods() -> dict[str, type[Method]]:
    """Every method by its name, in the order of phases."""
    named: dict[str, type[Method]] = classes_in(anymla.methods.__path__, anymla.methods.__name__, Method)
    return dict(sorted(named.items(), key=lambda item: (item[1].phase, item[0])))


def classes_in(path: Iterable[str], package: str, kind: Any) -> dict[str, Any]:
    """The classes of ``kind`` in the files and packages of ``package``, by their ``name``; one without is none."""
    for found in pkgutil.iter_modules(path, f"{package}."):
        importlib.import_module(found.name)
    return {vars(child)["name"]: child for child in _subclasses(kind) if "name" in vars(child)}


def method_of(name: str, settings: dict[str, Any], source: str = "settings") -> Method:
    """The method ``name`` with ``settings``.

    Raises:
        RecipeError: no such method, or a setting that is none of its own.
    """
    known = all_methods()
    if name not in known:
        raise RecipeError(
            f"{source}: {name!s:.40} is no step{did_you_mean(name, known)}; the steps are {', '.join(known)}"
        )
    return known[name].of(settings, f"{source}, {name}")


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    return [each for child in kind.__subclasses__() for each in (child, *_subclasses(child))]
