"""What of a decoder layer the layouts of serving engines have no place for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymla.architectures.families import FAMILIES

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def other_block(model_type: str, config: Mapping[str, Any]) -> str | None:
    """What makes layers differ, outside attention, from DeepSeek's dense ones (which are Llama's); None for nothing."""
    if not FAMILIES[model_type].plain_block:
        return f"layers of family '{model_type}' are not DeepSeek's (RMSNorm, gated MLP) outside attention"
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        return f"its MLP has the activation {activation!s:.40}, DeepSeek's has silu"
    for field in ("mlp_bias", "use_bias"):
        if config.get(field):
            return f"its MLP has biases ({field}), DeepSeek's has none"
    return None


def has_experts(config: Mapping[str, Any]) -> bool:
    """Returns whether some MLP is a mixture of experts."""
    inner = config.get("ffn_config")
    places = [config, inner] if isinstance(inner, dict) else [config]
    counts = [place.get(name) for place in places for name in EXPERTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def routed_experts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many experts a router chooses among one by one, and how many for each token; 0 where it does not."""
    found, chosen = (
        next((config[name] for name in names if isinstance(config.get(name), int)), 0)
        for names in (EXPERTS, ("num_experts_per_tok", "moe_k", "moe_topk"))
    )
    grouped = (config.get("n_group") or 1) != 1
    return (0, 0) if grouped or found < 2 else (found, chosen)


def beyond_latent(model_type: str, config: Mapping[str, Any], *, rope: bool) -> str | None:
    """Returns what of its attention no engine's latent attention does; None for nothing."""
    family = FAMILIES[model_type]
    found = {
        "a soft-cap on scores": family.softcap and config.get("attn_logit_softcapping") is not None,
        "a bias on scores by position": family.position_bias is not None and not rope,
        "a query scale by position": family.temperature is not None,
        "a residual stream inside attention": family.adds_residual,
    }
    return family.beyond or next((what for what, is_there in found.items() if is_there), None)
