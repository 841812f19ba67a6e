"""How long a conversion takes: its operations, counted from shapes, over the speed that the machine was measured at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymla.methods.duration import START, attention_operations, logit_operations, long_work, mlp_operations
from anymla.methods.effort import EFFORTS
from anymla.methods.mla.costs import STEP_TOKENS, TRIED_FROM, WITH_TRIALS, reconstruction_steps
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA

FEW_TOKENS = EFFORTS["mla"]["quick"]["calibration_tokens"]  # of calibration text, offered to who has no time
# passes of all calibration tokens, fitted to measured conversions: through whole layers (the original's, the converted
# one's), through the attention alone (candidates, refit), and what the statistics take over an attention's scores
LAYER_PASSES, ATTENTION_PASSES, STATISTICS = 2, 2, 1
STEP_PASSES = 5  # of a step's tokens: forward, backward, and the optimiser
DECOMPOSITIONS = 100  # float32 operations of all float64 algebra of a layer, over the cube of its width


def estimated_seconds(model_spec: ModelSpec, recipe: MLA, speed: float) -> float:
    """Seconds of a conversion at ``speed`` operations per second, right within a factor of about two."""
    length = min(recipe.calibration_length, model_spec.max_position_embeddings)
    layer = sum(_layer_operations(model_spec, layer.attention, recipe, length) for layer in model_spec.layers)
    scored = 2 * recipe.calibration_tokens / 8  # the held-out part, by both models
    return START + (layer + scored * logit_operations(model_spec)) / speed


def _layer_operations(model_spec: ModelSpec, spec: AttentionSpec | None, recipe: MLA, length: int) -> float:
    """Operations that a layer's conversion takes; a layer without softmax attention is passed through alone."""
    tokens, hidden = recipe.calibration_tokens, model_spec.hidden_size
    mlp = mlp_operations(model_spec)
    if spec is None:
        return tokens * LAYER_PASSES * mlp
    attention, scores = attention_operations(spec, hidden, length)
    passes = LAYER_PASSES * (attention + mlp) + ATTENTION_PASSES * attention + STATISTICS * scores
    algebra = DECOMPOSITIONS * ((spec.num_heads * spec.head_dim) ** 3 + spec.cached_numbers**3)
    steps = reconstruction_steps(model_spec, recipe) * (recipe.factorization == "output-aware")
    trained = steps * (WITH_TRIALS if steps >= TRIED_FROM else 1) * STEP_TOKENS * STEP_PASSES * attention
    return tokens * passes + algebra + trained


def faster(model_spec: ModelSpec, recipe: MLA, speed: float) -> str | None:
    """How long a conversion takes and which options make it faster; None where it does not take long."""
    options = {"--reconstruction-steps 0": {"reconstruction_steps": 0}}
    if recipe.calibration_tokens > FEW_TOKENS:
        options[f"--calibration-tokens {FEW_TOKENS}"] = {"calibration_tokens": FEW_TOKENS}
    others = {
        option: estimated_seconds(model_spec, recipe.model_copy(update=changes), speed)
        for option, changes in options.items()
    }
    return long_work(estimated_seconds(model_spec, recipe, speed), others)
