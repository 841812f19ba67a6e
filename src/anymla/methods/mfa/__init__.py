"""The step `mfa`: multi-matrix factorisation attention."""

from anymla.methods.mfa.settings import MFA

__all__ = ["MFA"]
