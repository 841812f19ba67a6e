"""Whether a model keeps packed documents apart."""

from __future__ import annotations

from typing import Any

import torch

from anymla.errors import RecipeError

DOCUMENT = 12  # tokens of each of the two that are tried
TOLERANCE = 0.05  # of the logits' size: what low precision does; a document that sees another differs by about 1


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Runs two documents packed and alone: the second must not notice the first.

    Positions that begin anew tell transformers' masks where a document begins. Layers that are not attention do not
    look at them, nor do position biases without a position.

    Raises:
        RecipeError: it does notice, or the model takes no positions.
    """
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(size, (1, 2 * DOCUMENT), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(DOCUMENT, device=model.device).repeat(2)[None]
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, DOCUMENT:].float()
        alone = model(input_ids=ids[:, DOCUMENT:], use_cache=False).logits.float()
        apart = bool((packed - alone).norm() <= TOLERANCE * alone.norm())
    except (TypeError, ValueError, RuntimeError, IndexError):  # positions are unknown to it, or have another shape
        apart = False
    if not apart:
        kind = str(model.config.model_type)
        raise RecipeError(f"{kind} models do not keep packed documents apart: give --no-packing")
