"""The window of exact tokens (docs/mathematics.md, 'The exact window'): which layers have it, and where none can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymla.architectures.families import FAMILIES, OWN_CACHE
from anymla.errors import InfeasibleError, RecipeError, UnsupportedModelError
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA

HINT = "For transformers alone, --exact-window 64 loses far less: it keeps the last 64 tokens exactly."


def exact_window_of(spec: AttentionSpec, recipe: MLA) -> int:
    """Tokens that a layer keeps exactly: none where it sees a sliding window only."""
    return 0 if spec.sliding_window is not None else recipe.exact_window


def window_refusal(model_spec: ModelSpec) -> str | None:
    """Why a model cannot have a window of exact tokens, or None."""
    if model_spec.has_vision:
        return "it sees images, whose tokens may look ahead"
    family = FAMILIES[model_spec.text_model_type]
    if family.attends_in_chunks:
        return "its layers attend in chunks"
    if family.all_layers_attend:
        return OWN_CACHE
    if all(spec.sliding_window is not None for spec in model_spec.attention_layers.values()):
        return "all its layers have a sliding window anyway"
    return None


def window_hint(model_spec: ModelSpec, recipe: MLA) -> list[str]:
    """What to say where a window would pay and none was asked for."""
    pays = not recipe.exact_window and recipe.target is None and recipe.kv_cache < 1
    return [HINT] if pays and window_refusal(model_spec) is None else []


def check_exact_window(model: str, model_spec: ModelSpec, recipe: MLA) -> None:
    """Refuses a window where none can be, or where calibration would see nothing beyond it.

    Raises:
        RecipeError: the recipe's target cannot hold it.
        UnsupportedModelError: the model cannot have one.
        InfeasibleError: it is too large for the calibration windows.
    """
    if not (window := recipe.exact_window):
        return
    if window == 1:
        raise RecipeError(
            "--exact-window 1 would keep nothing: a token sees itself anyway; give 2 or more, or 0 for none"
        )
    if recipe.target is not None:
        raise RecipeError(
            f"--exact-window is for transformers only: --target {recipe.target} cannot hold it: give one of them"
        )
    if (reason := window_refusal(model_spec)) is not None:
        raise UnsupportedModelError(f"--exact-window cannot be for {model}: {reason}")
    length = min(recipe.calibration_length, model_spec.max_position_embeddings)
    if length < 2 * window:
        longer = " or a larger --calibration-length" if length == recipe.calibration_length else ""
        raise InfeasibleError(
            f"--exact-window {window} needs calibration windows of at least {2 * window} tokens, to see what lies "
            f"beyond it; these have {length}: give a smaller one{longer}"
        )
