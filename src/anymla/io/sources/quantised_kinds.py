"""Which quantised checkpoints can be de-quantised, from their configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymla.errors import shown

ADVICE = "give the unquantised checkpoint, or load it with transformers' dequantize() and save that"
LABELS = {  # of what is de-quantised (quantised.py)
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
    "bitsandbytes": "bitsandbytes",
}
FORMATS = {  # of compressed-tensors
    "dense": "",
    "float-quantized": "FP8",
    "naive-quantized": "FP8 or INT8",
    "int-quantized": "INT8",
    "pack-quantized": "packed integers",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp8-quantized": "MXFP8",
    "mixed-precision": "several formats",
}
ALGORITHMS = ("FP8", "FP8_PB_WO", "NVFP4", "MIXED_PRECISION")  # of modelopt
DTYPES = ("float32", "float16", "bfloat16")


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns what a config says of quantised weights: of the whole model or of its text model.

    Of a converted model only what anymla's own steps write; the others are left to transformers.
    """
    for part in (config, config.get("text_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, Mapping) and (found := part.get(name)):
                settings = found if isinstance(found, Mapping) else {"quant_method": "unknown"}
                ours = settings.get("quant_method") == "compressed-tensors"
                return settings if ours or not str(config.get("model_type")).startswith("anymla_") else None
    return None


def quantization_refusal(config: Mapping[str, Any]) -> str | None:
    """Why the quantised weights of this config cannot be de-quantised, or None; None where they are not quantised."""
    if (settings := quantization_of(config)) is None or caches_only(settings):
        return None
    method = str(settings.get("quant_method", "unknown"))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    reason = None
    if method not in LABELS:
        reason = f"by {method:.40}, which is not de-quantised here"
    elif method == "awq" and (version := str(settings.get("version", "gemm")).lower()) != "gemm":
        reason = f"by AWQ in the layout {shown(version)}, and only gemm is de-quantised here"
    elif method == "compressed-tensors":
        reason = _compressed(settings)
    elif method == "modelopt" and (algorithm := _algorithm(settings)) not in ALGORITHMS:
        reason = f"by ModelOpt as {shown(algorithm)}, which is not de-quantised here"
    return None if reason is None else f"the weights are quantised {reason}: {ADVICE}"


def quantization_note(config: Mapping[str, Any]) -> str | None:
    """Returns what becomes of the quantised weights, in words; None where there are none."""
    if (settings := quantization_of(config)) is None:
        return None
    if caches_only(settings):
        return "scales for a quantised KV cache are left out: its weights are not quantised"
    method = str(settings.get("quant_method", "bitsandbytes"))
    label, more = LABELS[method], ""
    if method == "compressed-tensors":
        more = f" ({FORMATS[str(settings.get('format'))]})" if settings.get("format") in FORMATS else ""
    elif method == "modelopt":
        more = f" ({_algorithm(settings)})"
    elif method in ("gptq", "awq"):
        more = f" ({settings.get('bits') or settings.get('w_bit') or 4} bits)"
    return f"{label}{more} weights are de-quantised to {plain_dtype(config)}"


def plain_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of the de-quantised weights: the config's, or bfloat16."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if (found := part.get("dtype") or part.get("torch_dtype")) in DTYPES:
            return str(found)
    return "bfloat16"


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the de-quantised model."""
    plain = {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = without_quantization(text)
    return plain


def caches_only(settings: Mapping[str, Any]) -> bool:
    """Returns whether only the KV cache is to be quantised when the model is served."""
    if settings.get("quant_method") == "modelopt" or "kv_cache_quant_algo" in settings:
        return _algorithm(settings) in (None, "", "None", "NONE")
    groups = settings.get("config_groups") or {}
    weights = isinstance(groups, Mapping) and any(
        isinstance(group, Mapping) and group.get("weights") for group in groups.values()
    )
    return (
        settings.get("quant_method") == "compressed-tensors" and bool(settings.get("kv_cache_scheme")) and not weights
    )


def _compressed(settings: Mapping[str, Any]) -> str | None:
    if (sparsity := settings.get("sparsity_config")) and sparsity.get("format") not in (None, "dense"):
        return f"by compressed-tensors and sparse ({shown(sparsity.get('format'))}), which is not read here"
    if (kind := settings.get("format")) not in (None, *FORMATS):
        return f"by compressed-tensors as {shown(kind)}, which is not de-quantised here"
    return None


def _algorithm(settings: Mapping[str, Any]) -> Any:
    inner = settings.get("quantization")
    return (inner if isinstance(inner, Mapping) else settings).get("quant_algo")
