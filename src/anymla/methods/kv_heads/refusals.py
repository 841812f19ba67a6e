"""Which models can have fewer KV heads, from the config alone."""

from __future__ import annotations

from anymla.architectures.families import FAMILIES, GATE, OUTPUT_NORM
from anymla.modeling.spec import ModelSpec

OWN = "take variant: post or values, which have an attention of their own"


def kv_heads_refusal(model: ModelSpec, variant: str, grouping: str) -> str | None:
    """Why heads of ``model`` cannot be shared as ``variant`` says, or None."""
    if any(layer.kind is not None for layer in model.layers):
        return "its attention is not stock any more: put kv_heads before the step that changed it"
    family, attention = FAMILIES[model.text_model_type], [*model.attention_layers.values()]
    own = any(layer.width is not None and layer.width.heads for layer in model.layers)
    if own or len({each.num_kv_heads for each in attention}) > 1:
        return "its layers have different numbers of KV heads"
    if any(each.stored_numbers != each.cached_numbers for each in attention):
        return "transformers repeats its KV heads before it caches them"
    if family.beyond in (GATE, OUTPUT_NORM):
        return f"it has {family.beyond}, through which values that are shared do not pass"
    if family.clip:
        return "its queries, keys and values may be clipped, and what is shared is not what was clipped"
    if variant in ("freq", "mean"):
        if not family.says_kv_heads:
            return f"no config of its family says a number of KV heads: {OWN}"
        if any(each.qk_norm for each in attention):
            return f"its queries and keys pass a norm, which no mix of heads commutes with: {OWN}"
    if grouping == "overlap" and (family.beyond or family.position_bias):
        return f"heads have more of their own than weights ({family.beyond or 'position biases'}): grouping: adjacent"
    return None
