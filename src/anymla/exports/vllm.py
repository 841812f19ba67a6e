"""A converted model as a folder that stock vLLM serves with its own latent attention, no plugin needed.

vLLM's transformers backend runs a model's own code and puts its MLAAttention where it finds latent attention written in
the way of DeepSeek (modeling/fused_attention.py). So the folder brings its code along, and everything that stock
DeepSeek has no words for stays: rope frequencies per layer and channel, scaled rope, biases, the family's own MLP.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from anymla.errors import InfeasibleError, UnsupportedModelError
from anymla.exports.converted import Converted, read_converted
from anymla.exports.fused_layer import HeadShapes, encodes_keys, encodes_values, fused_tensors
from anymla.exports.weights import write_weights
from anymla.io.checkpoint import copy_companions, safe_config
from anymla.modeling import modeling_anymla, modeling_mla

Pad = Literal["none", "cpu", "cuda", "full"]
FILES = ("modeling_mla.py", "fused_attention.py", "heads.py", "absorbed.py")
REFUSED = {
    "softcap": "a soft-cap on scores",
    "sinks": "attention sinks",
    "temperature": "a query scale by position",
    "position_bias": "a bias on scores by position",
    "gate": "a gate on the heads' output",
    "output_norm": "a norm before the output projection",
    "adds_residual": "a residual stream inside attention",
    "query_gain": "norms after rope",
}


def write_vllm(converted: Path, folder: Path, *, pad: Pad = "cpu") -> HeadShapes:
    """Writes the converted model of ``converted`` into ``folder``; returns the sizes that all its layers have.

    Args:
        converted: what ``anymla convert`` wrote.
        folder: where code, config, weights and tokenizer go; made if it is not there.
        pad: with zeros, exactly, up to sizes that kernels need: 'cpu' rank 512 and rope 64, the only ones of vLLM's on
            CPUs; 'cuda' rope 64, nope 64 or 128, value 128, for prefill on GPUs; 'full' both.

    Raises:
        UnsupportedModelError: the model does something that vLLM's latent attention does not.
        InfeasibleError: a layer keeps more than ``pad`` has room for.
        CheckpointError: ``converted`` is no converted model, or broken.
    """
    source, config = read_converted(converted), safe_config(converted)
    check_layers(source, config)
    shapes = padded_shapes(source, pad)
    exponent = 10 if str(config.dtype) == "torch.float16" else 20  # 2^20 is more than a float16 holds
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, _tensors(source, shapes, exponent))
    room = Path(modeling_mla.__file__).parent
    for name in FILES:
        shutil.copyfile(room / name, folder / name)
    copy_companions(converted, folder)
    fused_config(config, shapes, exponent).save_pretrained(folder)
    return shapes


def check_layers(source: Converted, config: Any) -> None:
    """Refuses what vLLM's latent attention cannot do, in the name of the first layer that needs it."""
    import torch
    from transformers import AutoModelForCausalLM

    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{source.folder} sees images; --to vllm writes models of text only")
    if isinstance(getattr(type(config), "head_dim", None), property):
        raise UnsupportedModelError(
            f"{source.folder}: vLLM reads the cache's width from head_dim, which a {source.model_type} config computes"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for layer in source.layers:
        where = f"{source.folder}: layer {layer.index} has"
        window = model.get_submodule(layer.module).sliding_window
        for feature, what in REFUSED.items():
            if layer.features.get(feature):
                raise UnsupportedModelError(f"{where} {what}, which vLLM's latent attention has not")
        if window is not None and window < getattr(config, "max_position_embeddings", window + 1):
            raise UnsupportedModelError(f"{where} a window of {window} tokens, which vLLM's latent attention has not")
        if (heads := layer.size("num_heads")) != config.num_attention_heads:
            raise UnsupportedModelError(
                f"{where} {heads} query heads and not {config.num_attention_heads}; vLLM wants one number"
            )
    if len(source.layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{source.folder}: {len(source.layers)} of {config.num_hidden_layers} layers have latent attention; vLLM "
            "wants it in all or in none"
        )


def padded_shapes(source: Converted, pad: Pad) -> HeadShapes:
    """The sizes of the widest layer in each respect, grown to what ``pad`` asks for.

    Raises:
        InfeasibleError: they are larger than that.
    """
    names = ("kv_lora_rank", "qk_rope_head_dim", "head_dim")
    rank, rope, width = (max(layer.size(name) for layer in source.layers) for name in names)
    room = {"none": (rank, rope, width), "cpu": (512, 64, width), "cuda": (rank, 64, 128), "full": (512, 64, 128)}[pad]
    for what, size, most in zip(("rank", "rope dims", "head"), (rank, rope, width), room, strict=True):
        if size > most:
            raise InfeasibleError(
                f"{source.folder}: --pad {pad} has room for a {what} of {most} numbers, and a layer has {size}: "
                "convert to a smaller cache, or give --pad none for engines without this limit"
            )
    nope = width if pad in ("none", "cpu") else 64 if width <= 64 else 128
    return HeadShapes(kv_lora_rank=room[0], qk_rope_head_dim=room[1], qk_nope_head_dim=nope, v_head_dim=room[2])


def fused_config(config: Any, shapes: HeadShapes, exponent: int) -> Any:
    """The export's config: the converted one's fields under a model type of its own, DeepSeek's names for the sizes."""
    import transformers

    stock = getattr(transformers, config.architectures[0].removeprefix(modeling_anymla.PREFIX))
    base = transformers.AutoModel._model_mapping[stock.config_class]
    module = FILES[0].removesuffix(".py")
    names = {"AutoConfig": stock.config_class, "AutoModel": base, "AutoModelForCausalLM": stock}
    fields = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "qk_head_dim"):
        fields.pop(name, None)
    fields |= {
        "architectures": [modeling_mla.PREFIX + stock.__name__],
        "auto_map": {auto: f"{module}.{modeling_mla.PREFIX}{made.__name__}" for auto, made in names.items()},
        "stock_head_dim": getattr(config, "head_dim", None),
        "head_dim": shapes.cached,  # where vLLM looks for the width of what is cached
        "kv_lora_rank": shapes.kv_lora_rank,
        "qk_rope_head_dim": shapes.qk_rope_head_dim,
        "qk_nope_head_dim": shapes.qk_nope_head_dim,
        "v_head_dim": shapes.v_head_dim,
        "q_lora_rank": None,
        "latent_norm_exponent": exponent,
        "mla_layers": [
            layer | {"encodes_keys": encodes_keys(layer), "encodes_values": encodes_values(layer)}
            for layer in config.mla_layers
        ],
    }
    return getattr(modeling_mla, modeling_mla.PREFIX + stock.config_class.__name__)(**fields)


def _tensors(source: Converted, shapes: HeadShapes, exponent: int) -> Iterator[dict[str, Tensor]]:
    """All weights: those outside attention one by one as they are, attention layer by layer, in its own dtype."""
    inside = tuple(f"{layer.module}." for layer in source.layers)
    for name, stored in source.stored.items():
        if not name.startswith(inside):
            yield {name: stored.read()}
    for layer, prefix in zip(source.layers, inside, strict=True):
        dtype = source.stored[f"{prefix}kv_b_proj.weight"].meta().dtype
        made = fused_tensors(layer.features, source.tensors(prefix), shapes, exponent)
        yield {f"{prefix}{name}": tensor.to(dtype).contiguous() for name, tensor in made.items()}
