"""A config of multi-matrix factorisation attention for training from scratch."""

from __future__ import annotations

import copy
from typing import Any

from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_model_spec
from anymla.errors import InfeasibleError, UnsupportedModelError
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.spec import LayerSpec, ModelSpec

ROPE_SHARE = 4  # with key reuse, rope turns one in so many numbers of the cache, unless said otherwise


def fresh_config(
    config: Any,
    *,
    cached_numbers: int,
    key_reuse: bool = False,
    heads: int | None = None,
    query_rank: int | None = None,
    rope_dims: int | None = None,
) -> Any:
    """The config of a model that is to be trained with MFA or MFA-KR (arXiv 2412.19255).

    ``AutoModelForCausalLM.from_config`` builds it, with random weights. GQA and MLA of the same cache are transformers'
    own: ``num_key_value_heads`` of any config, and ``DeepseekV3Config``.

    Args:
        config: that of a stock model of transformers with plain attention, as ``LlamaConfig(...)``; it stays as it is.
        cached_numbers: per token and layer: 2 C of MFA, C of MFA-KR.
        key_reuse: MFA-KR, with a value map whose gate starts closed.
        heads: of queries, the paper's m. Default: the config's.
        query_rank: Cq. Default: C, as in the paper.
        rope_dims: with key reuse, numbers that rope turns, which are no value. Default: a quarter.

    Deviations from the paper: an RMSNorm follows the shared queries, as in Step-3; with key reuse, rope turns a part of
    the key, and values are made of the rest.

    Raises:
        UnsupportedModelError: the family's attention has more than projections and rope.
        InfeasibleError: the sizes cannot be; the message says why.
    """
    import torch

    from anymla.architectures.attention import module_spec
    from anymla.architectures.parts import attention_path, check_parts
    from anymla.io.auto import stock_class
    from anymla.model_run.stream import decoder_layers
    from anymla.sweep.checkpoint import converted_config

    if config.hidden_size % (heads or 1):
        raise InfeasibleError(f"heads must divide hidden_size {config.hidden_size}, got {heads}")
    mfa = _sizes(cached_numbers, key_reuse, query_rank, rope_dims)
    stock = copy.deepcopy(config)
    stock.num_attention_heads, stock.num_key_value_heads = heads or config.num_attention_heads, 1
    stock.head_dim = mfa.query_width
    model_spec = read_model_spec(stock.to_dict())
    _check(model_spec)
    with torch.device("meta"):
        model = stock_class(stock.model_type)(stock)
    names = {module: name for name, module in model.named_modules()}
    layers = []
    for index, module in enumerate(decoder_layers(model)):
        path = attention_path(module)
        attention = module.get_submodule(path or "")
        check_parts(attention)
        spec = module_spec(attention, model_spec.attention_layers[index], FAMILIES[stock.model_type], stock, None)
        layers.append(LayerSpec(attention=spec, mfa=mfa, module=f"{names[module]}.{path}"))
    return converted_config(model, model.config, tuple(layers))


def _sizes(cached: int, key_reuse: bool, query_rank: int | None, rope_dims: int | None) -> MfaSpec:
    """The attention of ``cached`` numbers per token."""
    width = cached if key_reuse else cached // 2
    if width < 2 or width % 2 or (not key_reuse and cached % 4):
        needed = "an even number" if key_reuse else "a multiple of 4"
        raise InfeasibleError(f"cached_numbers must be {needed}, got {cached}: rope rotates pairs")
    if not key_reuse and rope_dims not in (None, width):
        raise InfeasibleError(f"rope_dims is for key_reuse: without it rope rotates all {width} numbers of a key")
    rotated = width if not key_reuse else 2 * max(1, width // (2 * ROPE_SHARE)) if rope_dims is None else rope_dims
    if rotated % 2 or not 0 <= rotated <= width - 1 + (not key_reuse):
        raise InfeasibleError(f"rope_dims must be an even number below {width}, got {rotated}")
    return MfaSpec(
        kv_lora_rank=cached - rotated,
        qk_rope_head_dim=rotated,
        value_rank=0 if key_reuse else width,
        q_lora_rank=query_rank or width,
        query_norm=True,
        value_gate=key_reuse,
        biases=False,
    )


def _check(model: ModelSpec) -> None:
    """Refuses a family whose attention is more than projections and rope.

    Raises:
        UnsupportedModelError: names what.
    """
    specs = list(model.attention_layers.values())
    found = [name for name in ("qkv_bias", "output_bias", "qk_norm") for spec in specs if getattr(spec, name)]
    if found or model.beyond is not None or len(specs) < len(model.layers):
        what = model.beyond or (found[0] if found else "layers without attention")
        raise UnsupportedModelError(
            f"fresh_config cannot have '{model.model_type}': it has {what}; take Llama's config"
        )
