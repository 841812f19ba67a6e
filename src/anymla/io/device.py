"""Where to compute."""

from __future__ import annotations

from anymla.errors import RecipeError


def pick_device(device: str) -> str:
    """The torch device that ``device`` names; ``auto`` is a GPU where there is one.

    Raises:
        RecipeError: torch does not know it or this machine does not have it.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {device} cannot be used: {str(error).splitlines()[0]:.160}") from error
    return device
