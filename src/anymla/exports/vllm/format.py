"""vllm: the family's own model with code for vLLM's transformers backend."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.exports.format import Format

if TYPE_CHECKING:
    from anymla.exports.parity import Parity


class VllmFormat(Format):
    """For vLLM and transformers, which run the code that comes with it."""

    name = "vllm"
    kind = "a checkpoint with remote code that vLLM's transformers backend serves with latent attention"
    dtypes = ("float32", "bfloat16", "float16")
    default_pad = "cpu"
    loading = ", trust_remote_code=True"

    def write(self, converted: Path, folder: Path, *, dtype: str, pad: str, cache: str | None) -> Parity:
        """Checked in transformers, and in vLLM where that is installed."""
        from anymla.exports.cache_loss import fp8_loss
        from anymla.exports.gauge_choice import chosen_gauges
        from anymla.exports.parity import check_parity
        from anymla.exports.vllm.vllm_check import check_in_vllm
        from anymla.exports.vllm.writer import load_fused, write_vllm

        write_vllm(converted, folder, pad=pad, dtype=dtype, gauges=chosen_gauges if cache else None)
        found = check_in_vllm(check_parity(converted, folder, load=load_fused), converted, folder, trust=True)
        return replace(found, cache_loss=fp8_loss(converted, load_fused(folder)) if cache else None)

    def commands(self, folder: Path, place: Path | str, *, dtype: str, pad: str, cache: str | None) -> dict[str, str]:
        """For vLLM and transformers."""
        from anymla.exports.vllm.commands import vllm_command

        trusted = f"{shlex.quote(str(place))} --trust-remote-code"
        return vllm_command(folder, trusted, cache=cache) | {"transformers": f"transformers serve {trusted}"}
