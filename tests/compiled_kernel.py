"""Compiles the decode kernel for GPUs that need not be there, and prints the shared memory of each variant in bytes."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anymla.modeling.code_layout import CodeForm, code_layout
from anymla.modeling.coding_spec import Coding
from anymla.modeling.triton_kernels import attend as attend_kernel
from anymla.modeling.triton_kernels import combine as combine_kernel

NUMBERS = {"parts", "totals", "log_totals"}


def compiled(function, architecture, warps, pointers, **constants):
    """Bytes of shared memory; ``pointers``: types of arguments that are not what their names say below."""
    names = function.arg_names
    types = {
        **{name: "*i32" for name in names if name.endswith("places")},
        **{name: "*fp32" for name in names if name.endswith("levels") or name in NUMBERS},
        **dict.fromkeys(("scale", "softcap"), "fp32"),
        **dict.fromkeys(("left", "heads_new", "new", "length", "per_split", "splits", "heads"), "i32"),
        **{"turns": ("*fp32",) * 4, "left_out": "*i64", "mask_strides": ("i64",) * 4},
        **dict.fromkeys(("latent_strides", "rope_strides"), ("i64", "i64")),
        **pointers,
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()}, {})
    options = {"num_warps": warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).metadata.shared


def attend(architecture, dtype, coding, rank, ropes, heads, tile, masked):
    """The attention, over numbers or over codes of one coding in both rows."""
    form = CodeForm() if coding is None else code_layout(coding, torch.device("cpu")).form
    number, wide = f"*{dtype}", triton.next_power_of_2(rank)
    held = number if coding is None else "*u8"
    pointers = {"query": number, "query_rope": number, "latent": held, "rope": held}
    return compiled(
        attend_kernel, architecture, 8 if heads * wide > 1 << 14 else 4,
        pointers | {"mask": "*u8" if masked == 1 else number},
        RANK=rank, ROPE=ropes, LATENT_FORM=tuple(form), ROPE_FORM=tuple(form), TURN=coding is not None,
        MASKED=masked, CAPPED=masked > 0, H=heads, N=tile, R=wide, K=max(16, triton.next_power_of_2(ropes // 2)),
        WIDENED=False,
    )  # fmt: skip


def main():
    print(attend(90, "bf16", None, 512, 64, 64, 32, 0))
    print(attend(90, "bf16", Coding(bits=((8, 20), (6, 50), (3, 440), (16, 2))), 512, 64, 64, 32, 2))
    print(attend(80, "fp16", Coding(bits=((4, 256),), kind="int", block=32), 256, 32, 32, 32, 1))
    context = {"sinks": "*bf16", "context": "*bf16"}
    print(compiled(combine_kernel, 90, 4, context, RANK=300, R=512, SINKS=True))


if __name__ == "__main__":
    main()
