"""What a cache of codes costs, layer by layer, ready for a table or JSON. Loads no torch."""

from __future__ import annotations

from typing import Any

from anymla.account import account, in_dtype
from anymla.errors import UnsupportedModelError
from anymla.io.device import matmul_speed
from anymla.methods.base import Facts, LayerMethod
from anymla.methods.cache_coding.duration import coded_seconds
from anymla.methods.cache_coding.forms import Form
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.spec import DTYPE_BYTES, ModelSpec

SIXTEEN_BITS = 2  # bytes


def explain_codes(model: str, method: LayerMethod, before: ModelSpec, facts: Facts | None = None) -> dict[str, Any]:
    """The costs of ``method`` on ``model``: per layer, and of the whole cache before and after.

    Without the ``facts`` of its survey, from the config alone, bits and blocks are those of typical layers; a
    conversion chooses them on calibration text. "estimated_seconds": of a conversion on this machine's processor.
    """
    if (reason := method.refuses(before)) is not None:
        raise UnsupportedModelError(f"{model} cannot have {method.name}: {reason}")
    after = in_dtype(method.plan(before, facts).after, method.dtype)
    held, coded = account(in_dtype(before, method.dtype)), account(after)
    return {
        "model": model,
        "recipe": {method.name: method.model_dump(mode="json")},
        "dtype": after.dtype,
        "layers": coded_layers(after),
        "cache_bytes_per_token": {"before": held.cache_bytes_per_token, "after": coded.cache_bytes_per_token},
        "cache_bytes_once": coded.cache_bytes_once,
        "cache_bytes_at": {
            length: {"before": size, "after": coded.cache_bytes_at[length]}
            for length, size in held.cache_bytes_at.items()
        },
        "estimated_seconds": round(coded_seconds(before, method, matmul_speed())),
    }


def share_note(dtype: str) -> str | None:
    """How the share of codes is counted for a checkpoint of wider numbers than 16 bits; None for others."""
    if DTYPE_BYTES[dtype] == SIXTEEN_BITS:
        return None
    return (
        f"for codes, --kv-cache is a share of the original's cache in 16 bits; bytes are told in {dtype}, the "
        "checkpoint's dtype"
    )


def coded_layers(model: ModelSpec) -> list[dict[str, Any]]:
    """Of every layer with a cache of codes: where its keys and values live, in how many numbers, bits and bytes.

    "multiply_adds": of one new token per cached one.
    """
    return [
        {
            "layer": index,
            "keys": _place(layer.attention, layer.coded, "key"),
            "values": _place(layer.attention, layer.coded, "value"),
            "multiply_adds": {
                "before": 2 * layer.attention.num_heads * layer.attention.head_dim,
                "after": sum(_operations(layer.attention, layer.coded, kind) for kind in ("key", "value")),
            },
        }
        for index, layer in enumerate(model.layers)
        if layer.attention is not None and layer.coded is not None
    ]


def _place(attention: AttentionSpec, coded: CodedSpec, kind: str) -> dict[str, Any]:
    coding, form = _of(attention, coded, kind)
    kept = sum(count for bits, count in coding.bits if bits)
    return {
        "basis": form.basis,
        "heads_mixed": form.block,
        "numbers": kept,
        "bits": coding.code_bits / max(1, kept),
        "bytes": coding.row_bytes,
        "multiply_adds": _operations(attention, coded, kind),
    }


def _operations(attention: AttentionSpec, coded: CodedSpec, kind: str) -> int:
    coding, form = _of(attention, coded, kind)
    if form.basis == "own":
        return attention.num_heads * attention.head_dim
    return form.operations(kind, [bits for bits, count in coding.bits for _ in range(count)], attention)


def _of(attention: AttentionSpec, coded: CodedSpec, kind: str) -> tuple[Coding, Form]:
    """How the coefficients of "key" or "value" are coded, and the form that they have."""
    keys, values = (width // attention.head_dim for width in coded.block_widths(attention))
    if kind == "key":
        return coded.keys, Form(coded.key_basis, keys)
    return coded.values, Form(coded.value_basis, values)
