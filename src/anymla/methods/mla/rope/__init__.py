"""Choices of the rope channels, one file each: a class of RopeChoice with a name is one."""

from anymla.methods.base import classes_in
from anymla.methods.mla.rope.choice import RopeChoice

ROPE_CHOICES: dict[str, RopeChoice] = {
    name: kind() for name, kind in classes_in(__path__, __name__, RopeChoice).items()
}

__all__ = ["ROPE_CHOICES", "RopeChoice"]
