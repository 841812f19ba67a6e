"""Linear weights as packed integers: what the steps rtn, hqq and gptq have in common, and each one's rounding."""

from anymla.methods.integers.gptq import GPTQ
from anymla.methods.integers.hqq import HQQ
from anymla.methods.integers.rtn import RTN

__all__ = ["GPTQ", "HQQ", "RTN"]
