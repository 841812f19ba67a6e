"""What `anymla convert` makes of a cache: codes of keys and values, or the step mla. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anymla.errors import RecipeError, UnsupportedModelError
from anymla.layouts import SHAPES, listed
from anymla.methods.base import LayerMethod, Phase, all_methods
from anymla.methods.cache_coding import TransformCoding
from anymla.methods.mla.plan import MLAPlan
from anymla.methods.mla.settings import MLA
from anymla.modeling.spec import ModelSpec

AUTO, NONE = "auto", "none"
CODEC = (
    "How the cache is held. none: the step mla, latents of 16-bit numbers, which engines serve. Or a step that codes "
    "keys and values: transform_coding, kvquant. auto: transform_coding, unless a target, an option of the step mla or "
    "the model asks for that step."
)


@dataclass(frozen=True)
class Choice:
    """The method, and why it was chosen where nobody named it."""

    method: LayerMethod
    why: str | None = None

    @classmethod
    def of(cls, codec: str, recipe: MLA | MLAPlan | None, settings: dict[str, Any]) -> Choice:
        """Returns what ``settings`` mean; ``recipe``: of the step mla, which they override.

        Raises:
            RecipeError: no such codec, or a setting that its step does not have.
        """
        if recipe is not None:
            if codec not in (AUTO, NONE):
                raise RecipeError(f"codec {codec!s:.40}: a recipe or a plan of the step mla needs codec none")
            return cls(with_settings(recipe, settings))
        if codec == NONE:
            return cls(with_settings(None, settings))
        if codec != AUTO:
            _check_engine(codec, settings)
            return cls(_coder(codec).of(settings, "settings"))
        if own := [name for name in settings if name in MLA.model_fields and name not in TransformCoding.model_fields]:
            return cls(with_settings(None, settings), f"only this step has the setting {own[0]}")
        return cls(TransformCoding.of(settings, "settings"), "it loses least per byte (engines need --codec none)")

    def for_model(self, model: ModelSpec) -> Choice:
        """Returns the same, or the step mla where nobody asked for codes and the model cannot have them.

        Raises:
            UnsupportedModelError: the model cannot have the codes that were asked for.
        """
        if isinstance(self.method, MLA):
            return self
        reason = self.method.refuses(model)
        if self.why is not None and reason is None and model.has_vision:
            reason = "it reads images, and codes are fitted to text"
        if reason is None:
            return self
        shared = self.method.model_dump(exclude_unset=True)
        if self.why is None or shared.keys() - MLA.model_fields.keys():
            raise UnsupportedModelError(f"this model cannot have {self.method.name}: {reason}")
        return Choice(MLA.of(shared), reason)

    @property
    def told(self) -> str | None:
        """The choice in one line; None where somebody made it."""
        return None if self.why is None else f"--codec auto chose {self.method.name}: {self.why}"


def _check_engine(codec: str, settings: dict[str, Any]) -> None:
    """Refuses codes for an engine: none reads them."""
    if (target := settings.get("target")) is not None:
        known = SHAPES[target].cache_types if target in SHAPES else ()
        fewer = f"; for fewer bytes there give --cache-type {listed(known, 'or')}" if known else ""
        raise RecipeError(
            f"--codec {codec} and --target {target}: no engine reads codes, so give --codec none, or leave --target "
            f"out{fewer}"
        )


def with_settings(recipe: MLA | MLAPlan | None, settings: dict[str, Any]) -> MLA:
    """``recipe`` with ``settings`` in place of its own."""
    base = recipe.recipe if isinstance(recipe, MLAPlan) else recipe
    given = {} if base is None else base.model_dump(exclude_unset=True)
    return MLA.of(given | settings, "settings")


def _coder(name: str) -> type[LayerMethod]:
    known = {
        name: method
        for name, method in all_methods().items()
        if method.phase == Phase.CACHE and issubclass(method, LayerMethod)
    }
    if name not in known:
        raise RecipeError(f"codec must be {AUTO}, {NONE} or one of {', '.join(known)}, got {name!s:.40}")
    return known[name]
