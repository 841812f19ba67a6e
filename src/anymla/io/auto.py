"""Which of transformers' Auto classes loads a model whole."""

from __future__ import annotations

from typing import Any


def stock_class(model_type: str) -> Any:
    """The class of transformers for models of ``model_type``."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return getattr(transformers, names[model_type])


def auto_class(model_type: str) -> Any:
    """The Auto class for models of ``model_type``, converted or not: vision-language models have one of their own.

    As a causal language model, some of them would load without their vision tower.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    sees = model_type.removeprefix("anymla_") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def model_class(config: Any) -> Any:
    """The class that loads the checkpoint of ``config`` whole; one of a converted model must be registered by now."""
    if config.model_type.startswith("anymla_"):
        return auto_class(config.model_type)._model_mapping[type(config)]
    return stock_class(config.model_type)
