"""Scaled rope in GGUF files, which transformers leaves out when it reads a config from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anymla.errors import UnsupportedModelError, shown

FACTORS = "rope_freqs.weight"  # what llama.cpp divides each frequency of Llama 3 by
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scaled_rope(
    file: Path, config: Mapping[str, Any], key: Callable[[str], Any], factors: np.ndarray[Any, Any] | None
) -> dict[str, Any] | None:
    """The config's ``rope_parameters``, with the scaling that the file means.

    Args:
        file: it is named in errors.
        config: what transformers read.
        key: gives a value of the file's metadata below ``ARCHITECTURE.rope.scaling``, or None.
        factors: the tensor ``rope_freqs.weight`` [d/2], where there is one.

    Raises:
        UnsupportedModelError: a scaling that no config of transformers is known to mean.
    """
    rope: dict[str, Any] | None = config.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        return rope
    kind, factor = key("type"), key("factor")
    if factors is not None:
        return rope | _llama3(file, config, factors)
    if kind in (None, "none") or factor in (None, 0.0, 1.0):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and (length := key("original_context_length")) is not None:
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise UnsupportedModelError(f"{file}: its rope scaling {shown(kind)} cannot be read: give the model's safetensors")


def _llama3(file: Path, config: Mapping[str, Any], factors: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Llama 3's scaling, once it was found to give these factors."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta, factor = float(config["rope_parameters"]["rope_theta"]), float(factors.max())
    turns = 8192 / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))  # within the original context
    share = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{file}: {FACTORS} is not Llama 3's rope scaling, the only one that can be read from it: give the model's "
            "safetensors"
        )
    return {"rope_type": "llama3", "factor": factor} | LLAMA3
