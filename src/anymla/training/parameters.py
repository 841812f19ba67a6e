"""Which weights learn."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from anymla.architectures.parts import attention_path
from anymla.errors import RecipeError
from anymla.methods.tune import Train, Tune
from anymla.model_run.stream import decoder_layers
from anymla.modeling.attention import ConvertedAttention
from anymla.modeling.spec import layers_of
from anymla.modeling.zeroed_linear import ZeroedLinear

ADAPTED = (  # the last one of stock attention
    *("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "k_proj", "k_a_proj_with_mqa", "v_a_proj", "v_proj"),
    *("kv_b_proj", "v_b_proj", "o_proj", "qkv_proj", "value_map"),
    *("key_encoder", "value_encoder", "key_decoder", "value_decoder"),
)


def attention_names(model: Any) -> list[str]:
    """Where in ``model`` its converted attention modules are; all, where a step only made it smaller."""
    layers = layers_of(model.config.to_dict()) or ()
    if converted := [str(layer.module) for layer in layers if layer.replaced is not None]:
        return converted
    names = {module: name for name, module in model.named_modules()}
    paths = {layer: attention_path(layer) for layer in decoder_layers(model)}
    return [f"{names[layer]}.{path}" for layer, path in paths.items() if path is not None]


def always_expand(model: Any) -> None:
    """Lets attention rebuild keys and values: fused kernels hold no scores for the way back.

    In latent space kv_b_proj is read as a weight, too, which an adapter around the module would not notice.
    """
    for name in attention_names(model):
        if isinstance(attention := model.get_submodule(name), ConvertedAttention):
            attention.always_expands = True


def choose_learning(model: Any, train: Train) -> None:
    """Freezes everything but what ``train`` names."""
    attention = tuple(f"{name}." for name in attention_names(model))
    for path, module in model.named_modules():
        norm = train == "norms" and "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(train == "all" or norm or f"{path}.{name}".startswith(attention))


def with_adapters(model: Any, tuning: Tune) -> Any:
    """``model`` with LoRA (arXiv 2106.09685), which alone learns.

    It is around the projections of converted attention, or the zero points of packed weights. Adapters of the latter
    read averages over groups of inputs, and merge into zero points exactly (QA-LoRA, arXiv 2309.14717).

    Raises:
        RecipeError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(f"--train {tuning.train} needs peft: pip install 'anymla[tune]'") from error
    zeroed = {f"{name}.zeros": part.group for name, part in model.named_modules() if isinstance(part, ZeroedLinear)}
    zeroed = zeroed if tuning.learns_zeros else {}
    targets = [*zeroed] or [
        f"{name}.{part}"
        for name in attention_names(model)
        for part in ADAPTED
        if isinstance(getattr(model.get_submodule(name), part, None), nn.Linear)
    ]
    alpha = 2 * tuning.lora_rank / max(zeroed.values(), default=1)  # zero points read sums of groups, not averages
    config = LoraConfig(r=tuning.lora_rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it has since changed
        return get_peft_model(model, config)
