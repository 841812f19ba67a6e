"""What a factorisation is; nothing here loads torch, so that the factorisations are known without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper

if TYPE_CHECKING:
    from anymla.methods.mla.latent import Latent, LatentProblem


class Factorization(ABC):
    """Finds a rank-r latent of y; one with a ``name`` is a value of the setting ``factorization``.

    ``refits_output``: whether W_o is then fitted to the original's output.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    summary: ClassVar[str]
    refits_output: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        """The latent of ``rank`` numbers."""
