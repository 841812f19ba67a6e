"""How long passes of calibration text take: their operations, counted from shapes, over the speed of a machine."""

from __future__ import annotations

from collections.abc import Mapping

from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import ModelSpec

LONG = 600  # seconds from which on a user is told what is faster
START = 5  # seconds for Python, torch and transformers
PER_SCORE, PER_LOGIT = 150, 4000  # operations in whose time a softmax treats a score, and a logit is scored


def attention_operations(spec: AttentionSpec, hidden: int, length: int) -> tuple[float, float]:
    """Operations of a token: all of its attention, and of these the ones over the scores of a window of ``length``."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    scores = length * (4 * queries + PER_SCORE * spec.num_heads)
    return 2 * (2 * hidden * queries + 2 * hidden * keys) + scores, scores


def mlp_operations(model: ModelSpec) -> float:
    """Operations of a token in a layer's MLP."""
    return 2 * 3 * model.hidden_size * model.intermediate_size


def logit_operations(model: ModelSpec) -> float:
    """Operations of a token's logits and their score."""
    return model.vocab_size * (2 * model.hidden_size + PER_LOGIT)


def long_work(seconds: float, options: Mapping[str, float]) -> str | None:
    """How long a conversion takes and which options make it faster; None where it does not take long.

    ``options``: what else could be given, with the seconds that it then takes.
    """
    if seconds < LONG:
        return None
    offers = [f"{option} (about {spoken(other)})" for option, other in options.items() if other < 0.9 * seconds]
    offered = f" Faster, at a loss of quality: {' or '.join(offers)}." if offers else ""
    return f"The conversion takes about {spoken(seconds)} here.{offered}"


def spoken(seconds: float) -> str:
    """A time as a user would say it."""
    minutes = seconds / 60
    return f"{max(1, round(minutes))} min" if minutes < 100 else f"{minutes / 60:.3g} hours"
