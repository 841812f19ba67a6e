"""What a LoRA adapter does to one weight: W + s B A, and DoRA's lengths.

Shapes: A [r, in], B [out, r], W [out, in], or [in, out] where it is ``turned`` (GPT-2's Conv1D; an embedding, whose in
is the vocabulary). The factor s is alpha / r.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.errors import CheckpointError
from anymla.io.safetensors import Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``down`` is A, ``up`` is B, ``factor`` s; ``lengths`` [out] are DoRA's, of the rows of W."""

    down: Stored
    up: Stored
    lengths: Stored | None
    factor: float
    turned: bool
    folder: Path

    @classmethod
    def of(
        cls, folder: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, Stored], *, turned: bool
    ) -> LowRank:
        """The change of ``module``, whose tensors are ``parts``.

        Raises:
            CheckpointError: parts are missing, or their shapes do not fit.
        """
        embedding = "lora_embedding_A" in parts
        kind = "lora_embedding_" if embedding else "lora_"
        down, up, lengths = (parts.get(name) for name in (f"{kind}A", f"{kind}B", "lora_magnitude_vector"))
        if down is None or up is None or (lengths is None) == bool(config.get("use_dora")):
            raise CheckpointError(f"{folder}: the LoRA tensors of {module} are not all there")
        if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0] or down.shape[0] != up.shape[1]:
            raise CheckpointError(
                f"{folder}: the LoRA tensors of {module} have the shapes {list(down.shape)} and {list(up.shape)}: "
                "no low-rank product"
            )
        rank, alpha = down.shape[0], _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise CheckpointError(f"{folder}: adapter_config.json has no lora_alpha for {module}")
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls(down, up, lengths, factor, turned or embedding, folder)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` with the change, computed in float32 or finer and rounded once.

        Raises:
            CheckpointError: it has another shape.
        """
        import torch

        fine = torch.promote_types(weight.dtype, torch.float32)
        change = self.factor * (self.up.read().to(fine) @ self.down.read().to(fine))
        rows = (weight.mT if self.turned else weight).to(fine)  # [out, in]
        if rows.shape != change.shape:
            raise CheckpointError(
                f"{self.folder}: the LoRA tensors of {name} make {list(change.shape)}, and it has {list(rows.shape)}: "
                "give the model that the adapter was trained on"
            )
        rows = rows + change
        if self.lengths is not None:
            rows = rows * (self.lengths.read().to(fine) / rows.norm(dim=1))[:, None]
        return (rows.mT if self.turned else rows).to(weight.dtype).contiguous()


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that ``module`` ends in, as peft matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
