"""Finds the parts of an attention module under the names that families give them; knows no family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anymla.architectures.families import Family
from anymla.architectures.names import FUSED, OUTPUTS, PATHS, SEPARATE
from anymla.errors import UnsupportedModelError
from anymla.modeling.attention_spec import AttentionSpec

NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
    ("qk_norm", "qk_norm"),
)
VALUE_NORMS = ("v_norm",)
OUTPUT_NORMS = ("attn_sub_norm",)
GATES = ("gate_proj", "g_proj")
SINKS = ("sinks", "attention_sink_bias")


def attention_path(layer: nn.Module) -> str | None:
    """Returns where in a decoder layer its softmax attention is; None where it has none."""
    for path in PATHS:
        try:
            module = layer.get_submodule(path)
        except AttributeError:
            continue
        if any(hasattr(module, name) for name in OUTPUTS) and any(hasattr(module, name) for name in ("k_proj", *FUSED)):
            return path
    return None


def find_part(attention: Any, names: tuple[str, ...]) -> Any:
    """The part that has one of ``names``."""
    return next(getattr(attention, name) for name in names if hasattr(attention, name))


def norm_names(attention: Any) -> tuple[str, str] | None:
    """Returns what the norms of queries and keys are called, where there are any."""
    return next((pair for pair in NORMS if isinstance(getattr(attention, pair[0], None), nn.Module)), None)


def check_parts(attention: nn.Module) -> None:
    """Refuses a module with weights that anymla would leave out.

    Raises:
        UnsupportedModelError: names the part.
    """
    norms = [name for pair in NORMS for name in pair]
    known = {*SEPARATE, *FUSED, *OUTPUTS, *norms, *VALUE_NORMS, *OUTPUT_NORMS, *GATES, *SINKS}
    for name, _ in attention.named_parameters():
        if (part := name.partition(".")[0]) not in known:
            raise UnsupportedModelError(f"{type(attention).__name__} has a part '{part}' that anymla does not know")


def linear_weights(module: Any) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] (zeros where there is none) of a Linear or GPT-2's Conv1D, in float64."""
    weight = module.weight.detach().double()
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    return weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()


def projections_of(attention: Any, spec: AttentionSpec, family: Family) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows [heads d, D + 1] of query, key, value and of a gate that the query projection holds.

    The last column is the bias.

    Raises:
        UnsupportedModelError: not as many rows as ``spec`` says.
    """
    heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    gate = None
    if hasattr(attention, "k_proj"):
        query, key, value = (_rows(getattr(attention, name)) for name in SEPARATE)
        if len(query) == 2 * heads * d:  # each head's query, then its gate
            query, gate = (part.flatten(0, 1) for part in query.unflatten(0, (heads, 2, d)).unbind(1))
    else:
        query, key, value = _split_fused(_rows(find_part(attention, FUSED)), spec, family.fused)
    key = key * getattr(attention, "key_multiplier", 1.0)  # Falcon-H1
    for name, rows, expected in (("query", query, heads), ("key", key, kv_heads), ("value", value, kv_heads)):
        if len(rows) != expected * d:
            raise UnsupportedModelError(
                f"{type(attention).__name__}: the {name} projection gives {len(rows)} numbers, the config means "
                f"{expected} heads of {d}"
            )
    return query, key, value, gate


def stored_projections(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """What an attention of this kind stores for such rows: the inverse of ``projections_of``, where there is no gate.

    Raises:
        UnsupportedModelError: it stores them in a way that is not written.
    """
    key = key / getattr(attention, "key_multiplier", 1.0)
    if hasattr(attention, "k_proj"):
        named = dict(zip(SEPARATE, (query, key, value), strict=True))
    elif hasattr(attention, "qkv_proj"):
        named = {"qkv_proj": torch.cat([query, key, value])}
    else:
        raise UnsupportedModelError(f"{type(attention).__name__} keeps queries, keys and values in one fused matrix")
    tensors = {f"{name}.weight": rows[:, :-1] for name, rows in named.items()}
    biased = {name: rows for name, rows in named.items() if getattr(attention, name).bias is not None}
    return tensors | {f"{name}.bias": rows[:, -1] for name, rows in biased.items()}


def _rows(module: Any) -> Tensor:
    weight, bias = linear_weights(module)
    return torch.cat([weight, bias[:, None]], dim=1)


def _split_fused(rows: Tensor, spec: AttentionSpec, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if layout == "grouped":  # per kv head: its query heads, its key, its value
        groups = rows.unflatten(0, (kv_heads, heads // kv_heads + 2, d))
        return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
    if layout == "codegen":  # four blocks, each query, value, key
        query, value, key = rows.unflatten(0, (4, 3, -1)).unbind(1)
        return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    query, key, value = rows.split([heads * d, kv_heads * d, len(rows) - (heads + kv_heads) * d])
    return query, key, value


def gate_of(attention: Any) -> Tensor | None:
    """Rows [gate, D + 1] of the gate on the output, where it is a projection of its own."""
    return next((_rows(getattr(attention, name)) for name in GATES if hasattr(attention, name)), None)


def sinks_of(attention: Any) -> Tensor | None:
    """Sink logits [H], where there are any."""
    found = next((getattr(attention, name) for name in SINKS if hasattr(attention, name)), None)
    return None if found is None else found.detach().double().flatten()
