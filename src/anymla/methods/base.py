"""What a method is: settings that turn one ModelSpec into another, and then make the weights that fit it.

Every method is one file: it is found by its class, and its name, paper and phase are class attributes. Nothing here
loads torch: a method's file imports it inside the functions that run.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import anymla.methods
from anymla.errors import RecipeError
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.settings import Settings

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer
    from anymla.sweep.survey import Survey


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
    """What a step will make: the model after it, and what the method chose per layer, ready for JSON."""

    after: ModelSpec
    choices: tuple[Any, ...] = ()


class Method(Settings, ABC):
    """One step of a recipe: its fields are YAML keys, help texts and rows of the docs.

    ``summary``: what it does, in one line. ``saves``: of "cache", "weights" and "compute"; none where it heals.
    ``excludes``: names of methods that cannot stand in one recipe with it.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    phase: ClassVar[Phase]
    summary: ClassVar[str]
    saves: ClassVar[tuple[str, ...]]
    excludes: ClassVar[tuple[str, ...]] = ()

    def refuses(self, model: ModelSpec) -> str | None:
        """Why the method cannot be applied to ``model``, from its config alone; None where it can."""
        return None

    @abstractmethod
    def plan(
        self, model: ModelSpec, facts: list[dict[str, Any]] | None = None, choices: tuple[Any, ...] | None = None
    ) -> Plan:
        """What the model becomes; pure: the same arguments give the same plan.

        ``facts``: per layer what the survey gathered; None in a dry run, or where the method has no survey.
        ``choices``: those of an earlier plan, in which only what is still open is decided.

        Raises:
            InfeasibleError: the settings cannot be met; the message names what can.
        """


class LayerMethod(Method):
    """A method that changes one layer at a time, as anymla.sweep runs it over a checkpoint."""

    def survey(self, model: ModelSpec) -> Survey | None:
        """What to gather on calibration text before the plan is made; None for nothing."""
        return None

    @abstractmethod
    def observer(self, layer: Layer) -> Any:
        """What collects while the original layer runs over its stream; see anymla.sweep.layer.Observer."""

    @abstractmethod
    def apply(self, layer: Layer, observed: Any) -> LayerSpec:
        """Changes ``layer.module`` in place to what the plan says; returns what the layer now is."""


def all_methods() -> dict[str, type[Method]]:
    """Every method by its name: the classes in the files and packages of anymla.methods, in the order of phases."""
    for found in pkgutil.iter_modules(anymla.methods.__path__, f"{anymla.methods.__name__}."):
        importlib.import_module(found.name)
    named = {kind.name: kind for kind in _subclasses(Method) if "name" in vars(kind)}
    return dict(sorted(named.items(), key=lambda item: (item[1].phase, item[0])))


def method_of(name: str, settings: dict[str, Any], source: str = "settings") -> Method:
    """The method ``name`` with ``settings``.

    Raises:
        RecipeError: no such method, or a setting that is none of its own.
    """
    known = all_methods()
    if name not in known:
        raise RecipeError(f"{source}: {name!s:.40} is no step; the steps are {', '.join(known)}")
    return known[name].of(settings, source)


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    return [each for child in kind.__subclasses__() for each in (child, *_subclasses(child))]
