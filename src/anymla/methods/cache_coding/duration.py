"""How long a conversion to codes takes."""

from __future__ import annotations

from anymla.methods.base import LayerMethod
from anymla.methods.duration import START, attention_operations, logit_operations, long_work, mlp_operations
from anymla.methods.effort import EFFORTS
from anymla.modeling.spec import ModelSpec

# Forward passes of all calibration tokens, in time: 1 up; 1 up again and 2 back down with gradients, layer by layer;
# 2 for the original and the coded model side by side.
PASSES = 6
PER_LAYER = 1.0  # seconds for the bases and the bits of a layer
FEW_TOKENS = EFFORTS["transform_coding"]["quick"]["calibration_tokens"]  # of text, offered to who has no time


def coded_seconds(model: ModelSpec, method: LayerMethod, speed: float) -> float:
    """Seconds at ``speed`` operations per second, right within a factor of about two."""
    length = min(method.calibration_length, model.max_position_embeddings)
    operations = logit_operations(model)  # once: the way back through the head is cheap beside a score
    for layer in model.layers:
        operations += PASSES * mlp_operations(model)
        if layer.attention is not None:
            operations += PASSES * attention_operations(layer.attention, model.hidden_size, length)[0]
    return START + PER_LAYER * len(model.layers) + method.calibration_tokens * operations / speed


def faster(model: ModelSpec, method: LayerMethod, speed: float) -> str | None:
    """How long a conversion takes and what makes it faster; None where it does not take long."""
    fewer = method.model_copy(update={"calibration_tokens": min(FEW_TOKENS, method.calibration_tokens)})
    options = {f"--calibration-tokens {FEW_TOKENS}": coded_seconds(model, fewer, speed)}
    return long_work(coded_seconds(model, method, speed), options)
