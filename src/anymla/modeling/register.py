"""Makes transformers' Auto classes know the converted families."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from anymla.modeling import modeling_anymla

MODELS: dict[str, Any] = {
    model.config_class.model_type: model  # type: ignore[attr-defined]
    for model in vars(modeling_anymla).values()
    if isinstance(model, type)
    and issubclass(model, modeling_anymla.LatentModelMixin)
    and model is not modeling_anymla.LatentModelMixin
}


def register() -> None:
    """Registers every converted family; saving one of them also writes its modelling file beside the weights."""
    for model_type, model in MODELS.items():
        AutoConfig.register(model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
        model.config_class.register_for_auto_class()
        model.register_for_auto_class("AutoModelForCausalLM")
