"""What a layer costs before and after conversion, and what converting takes; numbers from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymla.io.device import machine_memory
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import DTYPE_BYTES, ModelSpec

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA

CONTEXT = 4096  # cached tokens at which FLOPs per token are counted
STEP_TOKENS = 1024  # of one step of the reconstruction
MOST_STEPS = 300  # of the default
TRIED_FROM = 100  # steps from which on candidates are tried with a part of them; a part of fewer misjudges
WITH_TRIALS = 3  # all gradient steps of a layer, those of its candidates included, over its own
STEP_OPERATIONS = 3e13  # of all steps with trials in the default: about ten minutes of two cores
RUNTIME_BYTES = 500 << 20  # Python, torch and transformers themselves


@dataclass(frozen=True)
class LayerCost:
    """Attention weights of one layer, and floating point operations of one decoded token after 4096 others.

    A layer with a sliding window or chunks looks at no more of them than it sees.
    """

    parameters: int
    flops_per_token: int


def _seen(spec: AttentionSpec) -> int:
    """Tokens of ``CONTEXT`` that a layer's attention looks at."""
    return min(CONTEXT, spec.sliding_window or CONTEXT, spec.cache_window or CONTEXT)


def original_cost(spec: AttentionSpec, hidden: int) -> LayerCost:
    """Cost of the original attention: q, k, v, o projections and two products with the cache."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    projections = 2 * hidden * queries + 2 * hidden * keys
    biases = (queries + 2 * keys) * spec.qkv_bias + hidden * spec.output_bias + 2 * spec.head_dim * spec.qk_norm
    return LayerCost(projections + biases, 2 * (projections + 2 * queries * _seen(spec)))


def latent_cost(spec: AttentionSpec, hidden: int, rope_dims: int, rank: int, window: int = 0) -> LayerCost:
    """Cost of absorbed latent attention: H (2r + 2K) multiply-adds per cached token, 2 H d per one of the window."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    decoder = 2 * keys * rank
    true_key, true_value = (hidden + spec.qkv_bias) * keys, (hidden + 1) * keys
    if spec.qk_norm:  # keys are made and normalised first, then encoded, and with a window so are values
        encoder = true_key + keys * (rank + rope_dims) + 2 * spec.head_dim
        encoder += true_value + (keys + 1) * rank if window else (hidden + 1) * rank
    else:  # one matrix from x, with a bias
        encoder = (hidden + 1) * (rank + rope_dims) + (true_key + true_value if window else 0)
    encoder += keys if window else 0  # the mean of old keys
    seen = _seen(spec)
    window = min(window, seen)
    biases = queries * spec.qkv_bias + hidden
    channels = queries + spec.num_kv_heads * rope_dims + rope_dims // 2  # expected rotation, channel weights, indices
    projections = 2 * hidden * queries + encoder
    absorption = 2 * queries * rank  # W_uk on the query, W_uv on the context: once per query head
    attention = spec.num_heads * (2 * rank + rope_dims) * (seen - window) + 2 * queries * window
    return LayerCost(projections + decoder + biases + channels, 2 * (projections + absorption + attention))


def reconstruction_steps(model_spec: ModelSpec, recipe: MLA) -> int:
    """Gradient steps per layer: the recipe's, or a number that the model's size alone decides (docs/choices.md).

    300 with trials for a small model, fewer for a larger one, and the most that do without trials for all others.
    """
    if recipe.reconstruction_steps is not None:
        return recipe.reconstruction_steps
    parameters = sum(
        original_cost(spec, model_spec.hidden_size).parameters for spec in model_spec.attention_layers.values()
    )
    tried = int(STEP_OPERATIONS / (WITH_TRIALS * 6 * STEP_TOKENS * parameters))
    return min(tried, MOST_STEPS) if tried >= TRIED_FROM else TRIED_FROM - 1


def peak_memory(model_spec: ModelSpec, recipe: MLA) -> int:
    """Predicted peak bytes of a conversion, however many layers there are.

    One decoder layer and its statistics, or the output head and its logits; activations in memory; the runtime. All is
    taken to be computed in float32 at least, as on a CPU that is slow in 16 bits.
    """
    stored, hidden = DTYPE_BYTES[recipe.dtype or model_spec.dtype], model_spec.hidden_size
    width = stored if recipe.dtype is not None else max(4, stored)
    spec = max(model_spec.attention_layers.values(), key=lambda layer: layer.num_heads * layer.head_dim)
    values, queries = spec.cached_numbers, spec.num_heads * spec.head_dim
    layer = 2 * width * (original_cost(spec, hidden).parameters + 3 * hidden * model_spec.intermediate_size)
    statistics = 8 * (12 * values**2 + 3 * queries * spec.head_dim + 6 * queries * hidden)
    # a copy of the attention, its gradient and Adam's two moments, in float32 or finer
    learned = 4 * max(4, width) * original_cost(spec, hidden).parameters * (recipe.reconstruction_steps != 0)
    if recipe.exact_window:  # no fused kernel: scores, weights and their gradients
        learned += (
            16 * STEP_TOKENS * min(recipe.calibration_length, model_spec.max_position_embeddings) * spec.num_heads
        )
    head = model_spec.vocab_size * (2 * hidden * width + 4 * 4 * recipe.calibration_length)
    activations = recipe.calibration_tokens * hidden * (3 * width + max(4, width))
    return max(layer + max(statistics, learned), head) + min(activations, machine_memory() // 4) + RUNTIME_BYTES
