"""deepseek: a stock dense DeepSeek-V3 checkpoint."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anymla.exports.format import Format

if TYPE_CHECKING:
    from anymla.exports.parity import Parity

SGLANG_CACHE = " --kv-cache-dtype fp8_e4m3"


class DeepseekFormat(Format):
    """For engines that know nothing of anymla."""

    name = "deepseek"
    kind = "a stock, dense `DeepseekV3ForCausalLM` checkpoint, which needs nothing of anymla"
    dtypes = ("float32", "bfloat16")
    loading = ""

    def write(self, converted: Path, folder: Path, *, dtype: str, pad: str, cache: str | None) -> Parity:
        """Checked in transformers, and in vLLM where that is installed."""
        from anymla.exports.cache_loss import fp8_loss
        from anymla.exports.deepseek.writer import write_deepseek
        from anymla.exports.gauge_choice import chosen_gauges
        from anymla.exports.parity import check_parity, load_stock
        from anymla.exports.vllm.vllm_check import check_in_vllm

        write_deepseek(converted, folder, pad=pad, dtype=dtype, gauges=chosen_gauges if cache else None)
        found = check_in_vllm(check_parity(converted, folder), converted, folder, trust=False)
        return replace(found, cache_loss=fp8_loss(converted, load_stock(folder)) if cache else None)

    def commands(self, folder: Path, place: Path | str, *, dtype: str, pad: str, cache: str | None) -> dict[str, str]:
        """For transformers, vLLM and, with the sizes of its kernels, SGLang."""
        from anymla.exports.vllm.commands import CPU_ROPE, vllm_command

        quoted = shlex.quote(str(place))
        found = {"transformers": f"transformers serve {quoted}"}
        found |= vllm_command(folder, quoted, on_cpu=CPU_ROPE, cache=cache)
        if pad == "full":
            found["SGLang"] = f"python -m sglang.launch_server --model-path {quoted}{SGLANG_CACHE if cache else ''}"
        return found
