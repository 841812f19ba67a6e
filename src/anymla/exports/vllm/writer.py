"""A converted model as a folder that stock vLLM serves with its own latent attention, no plugin needed.

vLLM's transformers backend runs a model's own code and puts its MLAAttention where it finds latent attention written in
the way of DeepSeek (modeling/fused_attention.py). So the folder brings its code along, and everything that stock
DeepSeek has no words for stays: rope frequencies per layer and channel, scaled rope, biases, the family's own MLP.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from anymla.errors import UnsupportedModelError
from anymla.exports.converted import Converted, Layer, read_converted
from anymla.exports.fold import Sizes
from anymla.exports.gauge import Gauge, regauged
from anymla.exports.padding import padded
from anymla.exports.vllm.fused_layer import fused_tensors
from anymla.exports.weight_files import write_weights
from anymla.io.checkpoint import check_loading, copy_companions, safe_config
from anymla.io.config import read_object
from anymla.layouts import backend_refusal
from anymla.modeling import modeling_anymla, modeling_mla
from anymla.modeling.spec import KEY, OLD_KEY, LayerSpec, config_entry, layers_of
from anymla.register import modelling_files

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


def write_vllm(
    converted: Path,
    folder: Path,
    *,
    pad: str = "cpu",
    dtype: str | None = None,
    gauges: Callable[[Path], Sequence[Gauge]] | None = None,
) -> Sizes:
    """Writes the converted model of ``converted`` into ``folder``; returns the sizes that all layers have there.

    Args:
        converted: what ``anymla convert`` wrote.
        folder: where code, config, weights and tokenizer go; made if it is not there.
        pad: with zeros, exactly, up to sizes that kernels need (padding.py). A layer that keeps less than another is
            filled up to it in any case: vLLM has one size for all.
        dtype: of the weights. Default: the converted model's.
        gauges: chooses those of the cache, one per layer; by default it holds what the converted model's does.

    Raises:
        UnsupportedModelError: the model does something that vLLM's latent attention does not.
        InfeasibleError: a layer keeps more than ``pad`` has room for.
        CheckpointError: ``converted`` is no converted model, or broken.
    """
    source, config = read_converted(converted), safe_config(converted)
    check_model(source, config)
    source = source if gauges is None else regauged(source, gauges(converted))
    d = max(layer.spec.head_dim for layer in source.layers)
    rank = max(layer.latent.kv_lora_rank for layer in source.layers)
    rope_dims = max(layer.latent.qk_rope_head_dim for layer in source.layers)
    sizes = padded(converted, Sizes(rank, rope_dims, d, d), pad)
    dtype = dtype or str(source.config["dtype"])
    exponent = 10 if dtype == "float16" else 20  # 2^20 is more than a float16 holds
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, _tensors(source, sizes, exponent, getattr(torch, dtype)))
    for file in modelling_files(modeling_mla):
        shutil.copyfile(file, folder / file.name)
    copy_companions(converted, folder)
    fused_config(config, sizes, exponent, dtype).save_pretrained(folder)
    return sizes


def load_fused(folder: Path) -> Any:
    """The model of ``folder`` in float32, by the classes that its code files are copies of.

    Raises:
        CheckpointError: tensors are missing, of wrong shape or too many.
        UnsupportedModelError: vLLM would make other logits of its hidden states.
    """
    architecture = read_object(folder / "config.json")["architectures"][0]
    model, info = getattr(modeling_mla, architecture).from_pretrained(
        folder, dtype="float32", use_safetensors=True, output_loading_info=True, local_files_only=True
    )
    check_loading(folder, info, model)
    _check_head(model.eval().requires_grad_(False))
    return model


def _check_head(model: Any) -> None:
    """Refuses what vLLM loses: it runs the model without its head, and makes logits of lm_head and these two fields."""
    ids = torch.arange(8)[None]
    logits = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = (logits / cap).tanh() * cap
    logits, expected = logits * getattr(model.config, "logit_scale", 1.0), model(ids).logits
    if not (logits - expected).abs().max() <= 1e-4 * expected.std():  # NaN is refused too
        raise UnsupportedModelError(
            f"{type(model).__name__} does more to its logits than vLLM, which projects the last hidden state and "
            "heeds logit_scale and final_logit_softcapping"
        )


def check_model(source: Converted, config: Any) -> None:
    """Refuses what vLLM's transformers backend, or its latent attention, cannot do."""
    reason = None
    if config.get_text_config() is not config:
        reason = "it sees images; --to vllm writes models of text only"
    elif (unserved := backend_refusal(source.model_type)) is not None:
        reason = unserved
    elif len(source.layers) != config.num_hidden_layers:
        share = f"{len(source.layers)} of {config.num_hidden_layers} layers"
        reason = f"{share} have latent attention; vLLM wants it in all or in none"
    if reason is not None:
        raise UnsupportedModelError(f"{source.folder}: {reason}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for layer in source.layers:
        _check_layer(f"{source.folder}: layer {layer.index} has", layer, config, model)


def _check_layer(where: str, layer: Layer, config: Any, model: Any) -> None:
    for feature, what in REFUSED.items():
        if getattr(layer.spec, feature):
            raise UnsupportedModelError(f"{where} {what}, which vLLM's latent attention does not have")
    window = model.get_submodule(layer.module).sliding_window
    if window is not None and window < getattr(config, "max_position_embeddings", window + 1):
        raise UnsupportedModelError(f"{where} a window of {window} tokens, which vLLM's latent attention does not have")
    if (heads := layer.spec.num_heads) != config.num_attention_heads:
        raise UnsupportedModelError(
            f"{where} {heads} query heads and not {config.num_attention_heads}; vLLM wants one number"
        )


def fused_config(config: Any, sizes: Sizes, exponent: int, dtype: str) -> Any:
    """The export's config: the converted one's fields under a model type of its own, DeepSeek's names for the sizes."""
    stock = getattr(transformers, config.architectures[0].removeprefix(modeling_anymla.PREFIX))
    base = transformers.AutoModel._model_mapping[stock.config_class]
    module = modeling_mla.__name__.rpartition(".")[2]
    names = {"AutoConfig": stock.config_class, "AutoModel": base, "AutoModelForCausalLM": stock}
    fields = config.to_dict()
    layers = layers_of(fields) or ()
    fields.pop(OLD_KEY, None)
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "qk_head_dim"):
        fields.pop(name, None)
    fields |= {
        "architectures": [modeling_mla.PREFIX + stock.__name__],
        "auto_map": {auto: f"{module}.{modeling_mla.PREFIX}{made.__name__}" for auto, made in names.items()},
        "dtype": dtype,
        "stock_head_dim": getattr(config, "head_dim", None),
        "head_dim": sizes.rank + sizes.rope,  # where vLLM looks for the width of what is cached
        "kv_lora_rank": sizes.rank,
        "qk_rope_head_dim": sizes.rope,
        "qk_nope_head_dim": sizes.nope,
        "v_head_dim": sizes.value,
        "q_lora_rank": None,
        "latent_norm_exponent": exponent,
        KEY: config_entry(tuple(_scaled(layer, sizes.scale) for layer in layers)),
    }
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite's, which vLLM knows by another name
        fields["logit_scale"] = 1 / divisor
    return getattr(modeling_mla, modeling_mla.PREFIX + stock.config_class.__name__)(**fields)


def _scaled(layer: LayerSpec, scale: float) -> LayerSpec:
    """The layer with the scale that is left for engines, the rest being in the weights."""
    return replace(layer, attention=replace(layer.parts[0], scaling=scale))


def _tensors(source: Converted, sizes: Sizes, exponent: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """All weights: those outside attention one by one as they are, attention layer by layer."""
    inside = tuple(f"{layer.module}." for layer in source.layers)
    for name, stored in source.stored.items():
        if not name.startswith(inside):
            tensor = stored.read()
            yield {name: tensor.to(dtype) if tensor.is_floating_point() else tensor}
    for layer, prefix in zip(source.layers, inside, strict=True):
        made = fused_tensors(layer, source.tensors(layer), sizes, exponent)
        yield {f"{prefix}{name}": tensor.to(dtype).contiguous() for name, tensor in made.items()}
