"""Fewer layers: which may go, what their neighbours take over, and the plans made of it."""

from anymla.methods.mka.settings import MKA

__all__ = ["MKA"]
