"""A recipe: the steps that a model goes through, in one frozen object that is read from and written to YAML."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, InstanceOf, field_validator

from anymla.architectures.packed import with_packing
from anymla.errors import RecipeError, UnsupportedModelError, did_you_mean, shown
from anymla.methods.base import Method, Phase, method_of
from anymla.methods.mla.settings import MLA
from anymla.methods.tune import Tune
from anymla.modeling.spec import ModelSpec
from anymla.settings import MOST, Settings, parse_yaml, read_yaml


class Recipe(Settings):
    """The steps that a model goes through, and the text to score it on."""

    model: str | None = Field(None, min_length=1, description="The model that the first step takes.")
    teacher: str | None = Field(
        None, min_length=1, description="The original, for tuning and scores. Default: the model."
    )
    text: str | None = Field(None, min_length=1, description="Text to score the model on after every step.")
    text_tokens: int = Field(8192, ge=256, le=MOST, description="Tokens of that text.")
    context: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Length in tokens at which the cache's size is shown. Default: the model's context.",
    )
    steps: tuple[InstanceOf[Method], ...] = Field(min_length=1, strict=False)

    @field_validator("model", "teacher", "text", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @classmethod
    def of(cls, settings: dict[str, Any], source: str = "recipe") -> Self:
        """Checks ``settings``; ``steps`` is a list of names, or of names with settings.

        Raises:
            RecipeError: an unknown step or setting, or an order that cannot be; the message names the step.
        """
        if "steps" not in settings:
            others = settings.keys() - cls.model_fields.keys()
            near = next((f" (did you mean steps, not {name}?)" for name in others if did_you_mean(name, ["steps"])), "")
            raise RecipeError(
                f"{source}: there are no steps{near}; a recipe has 'steps:' with a line for each, as "
                "'- mla: {kv_cache: 0.25}'"
            )
        given = settings["steps"]
        if not isinstance(given, list | tuple) or not given:
            raise RecipeError(f"{source}: steps must be a list of steps, as '- mla: {{kv_cache: 0.25}}'")
        steps = tuple(_step(step, f"{source}: step {number}") for number, step in enumerate(given, 1))
        check_order(steps, source)
        return super().of(settings | {"steps": steps}, source)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as YAML and JSON hold it."""
        rest = self.model_dump(mode="json", exclude={"steps"})
        return rest | {"steps": [{step.name: step.model_dump(mode="json")} for step in self.steps]}

    def to_yaml(self) -> str:
        """The recipe as YAML, every field spelled out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def plan(self, model: ModelSpec) -> list[ModelSpec]:
        """Returns what the model is after every step, from its config alone.

        Raises:
            UnsupportedModelError: a step refuses it.
            InfeasibleError: the settings of a step cannot be met.
        """
        found, original = [], model
        for number, step in enumerate(self.steps, 1):
            if isinstance(step, MLA):  # reads integers as plain numbers, and says so
                model = with_packing(model, None)
            reason = step.refuses(model)
            learns = isinstance(step, Tune) and step.learns_zeros
            if step.phase < Phase.WEIGHTS and not learns and any(layer.holds_packed for layer in model.layers):
                reason = f"its weights are packed: put {step.name} before the step that packs them"
            if step.phase == Phase.HEAL and self.teacher is None and model == original and not _converted(model):
                reason = "nothing in it was converted, so there is nothing to recover: put the step mla before it"
            if reason is not None:
                raise UnsupportedModelError(f"step {number}, {step.name}, cannot have {self.model}: {reason}")
            model = step.plan(model).after
            found.append(model)
        return found


def _converted(model: ModelSpec) -> bool:
    return any(layer.kind is not None for layer in model.layers)


def _step(given: Any, place: str) -> Method:
    if isinstance(given, Method):
        return given
    named = {given: {}} if isinstance(given, str) else given
    if not isinstance(named, dict) or len(named) != 1:
        beside = isinstance(given, dict) and None in given.values()
        hint = ": indent the settings below the name" if beside else ""
        raise RecipeError(f"{place} must be a name, or one name with its settings, got {shown(given)}{hint}")
    ((name, settings),) = named.items()
    if settings is not None and not isinstance(settings, dict):
        raise RecipeError(f"{place}, {name!s:.40}, must hold names and values, as 'mla: {{kv_cache: 0.25}}'")
    return method_of(name, settings or {}, place)


def check_order(steps: tuple[Method, ...], source: str = "recipe") -> None:
    """Refuses steps that cannot follow each other: phases go on, and healing comes before weights are packed.

    Raises:
        RecipeError: names both steps, and why.
    """
    for number, step in enumerate(steps):
        for earlier in steps[:number]:
            if isinstance(step, Tune) and step.learns_zeros and earlier.phase == Phase.WEIGHTS:
                continue
            if (reason := refused_after(type(step), type(earlier))) is not None:
                raise RecipeError(f"{source}: step {number + 1}, {step.name}, cannot follow {earlier.name}: {reason}")


def refused_after(later: type[Method], earlier: type[Method]) -> str | None:
    """Returns why one method cannot follow another in a recipe, or None."""
    if later.name in earlier.excludes or earlier.name in later.excludes:
        return "they do not go together"
    if later is earlier and later.phase != Phase.HEAL:
        return "a recipe has it once"
    if (later.phase, earlier.phase) == (Phase.HEAL, Phase.CACHE):  # gradients pass codes straight through
        return None
    last = earlier.phase if earlier.phase != Phase.HEAL else min(later.phase, earlier.phase)
    if later.phase < last:
        order = ", ".join(phase.name for phase in Phase)
        return f"{later.phase.name} comes before {earlier.phase.name} ({order}): put {later.name} first"
    return None


def composes_with(method: type[Method], others: list[type[Method]]) -> list[str]:
    """Names of the methods that may stand in one recipe with ``method``, before it or after it."""
    pairs = [(other, (refused_after(method, other), refused_after(other, method))) for other in others]
    return [other.name for other, refused in pairs if other is not method and None in refused]


def shipped_names() -> list[str]:
    """The recipes that come with anymla, by the name that ``anymla run`` and ``--recipe`` take."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped_folder().iterdir() if path.suffix == ".yaml")


def recipe_file(recipe: str | Path) -> Path:
    """The YAML file of a recipe: a path, or the name of one that comes with anymla.

    Raises:
        RecipeError: it is neither.
    """
    path = Path(os.path.expanduser(recipe))
    if os.path.isdir(path):
        raise RecipeError(
            f"{recipe} is a folder and no recipe: with a model, give steps, as --step 'mla: {{kv_cache: 0.25}}'"
        )
    if os.path.exists(path):
        return path
    if str(recipe) not in shipped_names():
        near = did_you_mean(recipe, shipped_names())
        raise RecipeError(f"{recipe} is neither a recipe's file nor one of {', '.join(shipped_names())}{near}")
    return _shipped_folder() / f"{recipe}.yaml"


def read_recipe(recipe: str | Path, **changes: Any) -> Recipe:
    """The recipe of a YAML file, or one that comes with anymla; ``changes`` replace its own fields.

    Raises:
        RecipeError: no such file or name, or something in it that cannot be.
    """
    path = recipe_file(recipe)
    return Recipe.of(read_yaml(path) | {name: value for name, value in changes.items() if value is not None}, str(path))


def given_recipe(recipe: str, steps: list[str], settings: list[str], changes: dict[str, Any]) -> Recipe:
    """The recipe that a command line means.

    Args:
        recipe: a file or the name of a recipe; the model where there are ``steps``.
        steps: each a step in YAML.
        settings: each ``step.name=value``, the value in YAML; it replaces the setting of all steps of that name.
        changes: fields of the recipe in place of its own; None: as it says.

    Raises:
        RecipeError: one of them cannot be.
    """
    if steps:
        parsed = [parse_yaml(step, f"--step {step!s:.60}") for step in steps]
        content, source = {"model": recipe, "steps": parsed}, "--step"
    else:
        path = recipe_file(recipe)
        content, source = read_yaml(path), str(path)
    content = content | {name: value for name, value in changes.items() if value is not None}
    found = Recipe.of(content, source)
    for setting in settings:
        found = _with_setting(found, setting)
    return found


def _with_setting(recipe: Recipe, setting: str) -> Recipe:
    """``recipe`` with one ``step.name=value`` in place of its own."""
    place, equals, text = setting.partition("=")
    step_name, dot, name = place.partition(".")
    if not equals or not dot:
        raise RecipeError(f"--set {setting!s:.60} must be a step's setting, as mla.kv_cache=0.125")
    if step_name not in [step.name for step in recipe.steps]:
        known = [step.name for step in recipe.steps]
        near = did_you_mean(step_name, known)
        raise RecipeError(
            f"--set {setting!s:.60}: the recipe has no step {step_name!s:.40}{near}; its steps are {', '.join(known)}"
        )
    value = parse_yaml(text, f"--set {setting!s:.60}")
    steps = [
        step
        if step.name != step_name
        else step.of(step.model_dump(exclude_unset=True) | {name: value}, f"--set {setting!s:.60}")
        for step in recipe.steps
    ]
    return Recipe.of(recipe.model_dump(exclude={"steps"}) | {"steps": steps}, "--set")


def read_mla(path: Path) -> dict[str, Any]:
    """The settings of the step mla in a YAML file that holds them at its top, or a recipe with that step."""
    return _settings_of(MLA, path)


def read_tune(recipe: str | Path) -> dict[str, Any]:
    """The settings of the step tune in a YAML file that holds them at its top, or a recipe with that step."""
    return _settings_of(Tune, recipe_file(recipe))


def _settings_of(kind: type[Method], path: Path) -> dict[str, Any]:
    """The settings of a step that a file names; only those that it names.

    Raises:
        RecipeError: the file cannot be read, has another kind of settings, or lacks the step.
    """
    content = read_yaml(path)
    if "steps" not in content:
        return kind.of(content, str(path)).model_dump(exclude_unset=True)
    steps = [step for step in Recipe.of(content, str(path)).steps if isinstance(step, kind)]
    if not steps:
        raise RecipeError(f"{path} has no step {kind.name}")
    return steps[0].model_dump(exclude_unset=True)


def _shipped_folder() -> Path:
    return Path(str(resources.files("anymla") / "recipes"))
