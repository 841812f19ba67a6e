"""What a rope choice is; nothing here loads torch, so that the choices are known without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from anymla.methods.base import Paper

if TYPE_CHECKING:
    from anymla.methods.mla.channels import Channels
    from anymla.methods.mla.moments import Moments


class RopeChoice(ABC):
    """Chooses the channels of one layer; one with a ``name`` is a value of the setting ``rope``.

    ``shared``: whether all kv heads share its channels; else it takes as many of every head.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    summary: ClassVar[str]
    shared: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, moments: Moments, rope_dims: int, *, expected_rotation: bool) -> Channels:
        """``rope_dims`` = 2K rotated numbers in the cache, over all kv heads."""
