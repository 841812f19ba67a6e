"""Keys and values of low rank from the weights alone: the method, condition numbers of weights, the bases."""

from anymla.methods.lorc.settings import LoRC

__all__ = ["LoRC"]
