"""A converted model as a folder that stock vLLM serves with its own latent attention, no plugin needed.

vLLM's transformers backend runs a model's own code and puts its MLAAttention where it finds latent attention written in
the way of DeepSeek (modeling/fused_attention.py). So the folder brings its code along, and everything that stock
DeepSeek has no words for stays: rope frequencies per layer and channel, scaled rope, biases, the family's MLP and norms.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from anymla.errors import InfeasibleError, UnsupportedModelError
from anymla.export.fused_layer import HeadShapes, encodes_keys, encodes_values, fused_tensors
from anymla.io.checkpoint import check_weights, copy_companions, safe_config
from anymla.io.safetensors import Stored, read_header, write_tensors
from anymla.io.work import write_json

Pad = Literal["cpu", "cuda", "none"]
FILES = ("modeling_mla.py", "fused_attention.py", "heads.py", "absorbed.py")
CPU_RANK, ROPE = 512, 64  # vLLM 0.32: its CPU kernel is compiled for 512 + 64 numbers per token and no others
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
    """Writes ``folder`` from the converted checkpoint; returns the sizes that its layers have.

    ``pad``: 'cpu' fills latent and rope key with zeros up to 512 + 64 numbers, the only size of vLLM's CPU kernel;
    'cuda' the rope key and the heads to widths that vLLM's prefill kernels know; 'none' neither. All are exact.

    Raises:
        UnsupportedModelError: the model does something that vLLM's latent attention does not.
        InfeasibleError: a layer keeps more than ``pad`` has room for.
        CheckpointError: the checkpoint is broken.
    """
    config = safe_config(converted)
    check_layers(converted, config)
    shapes = padded_shapes(config.mla_layers, pad)
    files = check_weights(converted)
    folder.mkdir(parents=True, exist_ok=True)
    exponent = 10 if str(config.dtype) == "torch.float16" else 20  # 2^20 is more than a float16 holds
    index: dict[str, str] = {}
    for name, tensors in _shards(files, config.mla_layers, shapes, exponent):
        write_tensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        size = sum(stored.size for file in files for stored in read_header(folder / file.name).values())
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        write_json(folder / "model.safetensors.index.json", content)
    copy_companions(converted, folder)
    for name in ("plan.yaml", "recipe.yaml", "conversion.json"):  # of the conversion, which the source folder keeps
        (folder / name).unlink(missing_ok=True)
    write_code(folder)
    fused_config(config, shapes, exponent).save_pretrained(folder)
    return shapes


def check_layers(converted: Path, config: Any) -> None:
    """Refuses what vLLM's latent attention cannot do, in the name of the first layer that needs it."""
    import torch
    from transformers import AutoModelForCausalLM

    if not getattr(config, "mla_layers", None):
        raise UnsupportedModelError(f"{converted} is not a converted model: run anymla convert first")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{converted} sees images; --to vllm writes models of text only")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    longest = getattr(config, "max_position_embeddings", 0)
    for layer in config.mla_layers:
        where = f"{converted}: {layer['module']} has"
        for feature, what in REFUSED.items():
            if layer.get(feature):
                raise UnsupportedModelError(f"{where} {what}, which vLLM's latent attention does not know")
        window = model.get_submodule(layer["module"]).sliding_window
        if window is not None and window < longest:
            raise UnsupportedModelError(
                f"{where} a window of {window} tokens, which vLLM's latent attention does not know"
            )
        if layer["num_heads"] != config.num_attention_heads:
            raise UnsupportedModelError(
                f"{where} {layer['num_heads']} query heads and not {config.num_attention_heads}; vLLM wants one number"
            )
    if len(config.mla_layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{converted}: {len(config.mla_layers)} of {config.num_hidden_layers} layers are converted; vLLM runs latent "
            "attention in all layers or in none"
        )


def padded_shapes(layers: list[dict[str, Any]], pad: Pad) -> HeadShapes:
    """The sizes of the widest layer in each respect, grown to what ``pad`` asks for.

    Raises:
        InfeasibleError: they are larger than that.
    """
    rank, rope, width = (max(layer[name] for layer in layers) for name in ("kv_lora_rank", "qk_rope_head_dim", "head_dim"))
    if pad == "none":
        return HeadShapes(kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=width, v_head_dim=width)
    if rope > ROPE or (pad == "cpu" and rank > CPU_RANK):
        room = f"{CPU_RANK} + {ROPE}" if pad == "cpu" else f"{ROPE} for the rope key"
        raise InfeasibleError(
            f"--pad {pad} has room for {room} numbers per token and layer, and layers keep up to {rank} + {rope}: "
            "convert to a smaller --kv-cache or fewer --rope-dims, or give --pad none for engines without this limit"
        )
    if pad == "cpu":
        return HeadShapes(kv_lora_rank=CPU_RANK, qk_rope_head_dim=ROPE, qk_nope_head_dim=width, v_head_dim=width)
    if width > 128:
        raise InfeasibleError(f"--pad cuda knows heads of up to 128, and these have {width}: give --pad none")
    return HeadShapes(
        kv_lora_rank=rank, qk_rope_head_dim=ROPE, qk_nope_head_dim=64 if width <= 64 else 128, v_head_dim=128
    )


def fused_config(config: Any, shapes: HeadShapes, exponent: int) -> Any:
    """The export's config: the converted one's fields under a model type of its own, DeepSeek's names for the sizes."""
    import transformers

    from anymla.modeling import modeling_anymla, modeling_mla

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


def write_code(folder: Path) -> None:
    """Copies the modelling files that the folder needs to load anywhere."""
    from anymla.modeling import modeling_mla

    room = Path(modeling_mla.__file__).parent
    for name in FILES:
        shutil.copyfile(room / name, folder / name)


def _shards(
    files: list[Path], layers: list[dict[str, Any]], shapes: HeadShapes, exponent: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The export's files, as the source splits them: attention made anew, everything else as it is stored."""
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    inside = {layer["module"]: layer for layer in layers}
    for file in files:
        tensors: dict[str, Any] = {}
        for name, tensor in read_header(file).items():
            module = next((path for path in inside if name.startswith(f"{path}.")), None)
            if module is None:
                tensors[name] = tensor
            elif name.endswith(".kv_b_proj.weight"):  # a layer may lie in two files: it goes where this one lies
                tensors |= _fused(module, inside[module], stored, shapes, exponent)
        yield file.name, tensors


def _fused(
    module: str, layer: dict[str, Any], stored: Mapping[str, Stored], shapes: HeadShapes, exponent: int
) -> dict[str, Any]:
    """The layer's new tensors, in the dtype that its old ones are stored in."""
    old = {
        name.removeprefix(f"{module}."): tensor.read() for name, tensor in stored.items() if name.startswith(f"{module}.")
    }
    made = fused_tensors(layer, old, shapes, exponent)
    dtype = old["kv_b_proj.weight"].dtype
    return {f"{module}.{name}": tensor.to(dtype).contiguous() for name, tensor in made.items()}
