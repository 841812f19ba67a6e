"""Quantised safetensors as a source: each weight is made from the tensors that belong to it, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anymla.errors import CheckpointError, UnsupportedModelError, shown
from anymla.io.checkpoint import check_weights, copy_companions
from anymla.io.config import read_object
from anymla.io.safetensors import Stored, read_header
from anymla.io.shards import FLOATS
from anymla.io.sources import formulae
from anymla.io.sources.quantised_kinds import (
    ADVICE,
    plain_dtype,
    quantization_of,
    quantization_refusal,
    without_quantization,
)
from anymla.io.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor

Parts = dict[str, Stored]  # of one weight, by what follows its name
NOT_WEIGHTS = (  # for activations and the cache when the model is served
    ".input_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".activation_scale",
    ".activation_scale_ub",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".output_scale",
    ".k_zero_point",
    ".v_zero_point",
    ".prob_scale",
    ".weight_format",
)


@dataclass(frozen=True)
class Layout:
    """A way to store a weight: what follows its name in its tensors' names, the main one first, and the formula."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor]
    called: str = ""  # what follows the name in the plain checkpoint


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    match settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _gptq(parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    weight, zeros, scales = (parts[f".{name}"] for name in ("qweight", "qzeros", "scales"))
    if settings.get("quant_method") == "awq":
        return formulae.awq(weight, zeros, scales)
    index = parts.get(".g_idx")
    bits = settings.get("bits", 4) if index is None else len(weight) * 32 // len(index)
    plus = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return formulae.gptq(weight, zeros, scales, index, bits=int(bits), plus=plus)


def _inverse(parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    weight, scale = parts[""], parts["_scale_inv"]
    if weight.element_size() == 1 and not weight.is_floating_point():  # experts in FP4, two in a byte
        return formulae.scaled(formulae.fp4(weight.view(torch.uint8)), scale)
    return formulae.scaled(weight, scale, _block(settings))


def _four_bit(parts: Mapping[str, Tensor], _: Mapping[str, Any]) -> Tensor:
    named = {name.removeprefix(".").partition(".bitsandbytes")[0]: tensor for name, tensor in parts.items() if name}
    return formulae.four_bit(named, parts[""])


_NESTED = (".nested_absmax", ".nested_quant_map")
_PACKED, _SCALE, _GLOBAL = "_packed", "_scale", "_global_scale"
LAYOUTS = (
    Layout((".qweight", ".qzeros", ".scales"), (".g_idx",), _gptq, ".weight"),
    Layout(("_blocks", "_scales"), (), lambda p, _: formulae.mxfp4(p["_blocks"], p["_scales"])),
    *(
        Layout(("", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{kind}"), _NESTED, _four_bit)
        for kind in ("nf4", "fp4")
    ),
    Layout((".weight", ".SCB"), (), lambda p, _: formulae.int8_rows(p[".weight"], p[".SCB"]), ".weight"),
    Layout(
        (_PACKED, _SCALE, "_shape"),
        ("_zero_point", "_g_idx"),
        lambda p, _: formulae.packed(p[_PACKED], p[_SCALE], p["_shape"], p.get("_zero_point"), p.get("_g_idx")),
    ),
    Layout(
        (_PACKED, _SCALE, _GLOBAL),
        (),
        lambda p, _: formulae.scaled(formulae.fp4(p[_PACKED]), p[_SCALE].float() / p[_GLOBAL].float()),
    ),
    Layout((_PACKED, _SCALE), (), lambda p, _: formulae.scaled(formulae.fp4(p[_PACKED]), p[_SCALE])),
    Layout(
        ("", _SCALE, "_scale_2"),
        (),
        lambda p, _: formulae.scaled(formulae.fp4(p[""]), p[_SCALE].float() * p["_scale_2"].float()),
    ),
    Layout(("", "_scale_inv"), (), _inverse),
    Layout(
        ("", _SCALE),
        ("_zero_point", "_shape"),
        lambda p, s: formulae.scaled(p[""], p[_SCALE], _block(s), p.get("_zero_point")),
    ),
)


def quantised_source(folder: Path) -> Source:
    """The checkpoint in ``folder``, de-quantised.

    Raises:
        UnsupportedModelError: a format that is not known; from the config alone.
        CheckpointError: its files are not whole, or a quantised tensor has no scales.
    """
    config = read_object(folder / "config.json")
    if (reason := quantization_refusal(config)) is not None:
        raise UnsupportedModelError(reason)
    stored = {
        name: tensor for file in check_weights(folder, floats=False) for name, tensor in read_header(file).items()
    }
    weights, dtype = _weights(folder, stored), getattr(torch, plain_dtype(config))
    return Source(
        config=without_quantization(config) | {"dtype": plain_dtype(config)},
        names=frozenset(weights),
        size=sum(_size(parts, dtype) for _, parts in weights.values()),
        tensors=partial(_tensors, folder, weights, quantization_of(config) or {}, dtype),
        companions=partial(copy_companions, folder),
    )


def _weights(folder: Path, stored: dict[str, Stored]) -> dict[str, tuple[Layout | None, Parts]]:
    """The plain checkpoint's tensors: what each is made from, and how; None as it is."""
    left = {name: tensor for name, tensor in stored.items() if not name.endswith(NOT_WEIGHTS)}
    weights: dict[str, tuple[Layout | None, Parts]] = {}
    for layout in LAYOUTS:
        last = layout.needs[-1]
        for name in [name for name in left if name.endswith(last)]:
            stem = name.removesuffix(last)
            if all(f"{stem}{part}" in left for part in layout.needs) and _is_quantised(left, stem, layout):
                parts = {part: left.pop(f"{stem}{part}") for part in layout.needs}
                parts |= {part: left.pop(f"{stem}{part}") for part in layout.may if f"{stem}{part}" in left}
                weights[stem + layout.called] = (layout, parts)
    for name, tensor in left.items():
        if tensor.dtype not in FLOATS and (tensor.dtype.startswith("F8") or name.endswith(("weight", "proj"))):
            raise CheckpointError(
                f"{folder}: tensor {shown(name)} is of dtype {tensor.dtype} without scales of a known layout: {ADVICE}"
            )
        weights[name] = (None, {"": tensor})
    return {name: weights[name] for name in sorted(weights, key=lambda name: _place(weights[name][1]))}


def _place(parts: Parts) -> tuple[str, int]:
    main = next(iter(parts.values()))
    return main.file.name, main.start


def _is_quantised(stored: Mapping[str, Stored], stem: str, layout: Layout) -> bool:
    """Whether the main tensor is one of integers or of float8: beside one of floats, a scale is something else."""
    return stored[f"{stem}{layout.needs[0]}"].dtype not in FLOATS


def _size(parts: Parts, dtype: torch.dtype) -> int:
    """Bytes of the plain tensor, near enough to know whether there is room: of words and bytes, those of 4 bits."""
    main = next(iter(parts.values()))
    each = {"I32": 8, "U8": 2}.get(main.dtype, 1)
    if main.dtype in FLOATS:
        return main.size
    numbers = torch.Size(main.shape).numel() * each
    return numbers * dtype.itemsize


def _tensors(
    folder: Path, weights: Mapping[str, tuple[Layout | None, Parts]], settings: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, (layout, parts) in weights.items():
        read = {part: tensor.read() for part, tensor in parts.items()}
        if layout is None:
            yield name, read[""]
            continue
        try:
            yield name, layout.make(read, settings).to(dtype)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, CheckpointError) as error:
            raise CheckpointError(
                f"{folder}: {name} cannot be de-quantised: {' '.join(str(error).split()):.160}"
            ) from error
