"""The conversion to multi-head latent attention: moments, rope channels, latent, weights, refit, reconstruction."""

from anymla.methods.mla.settings import MLA

__all__ = ["MLA"]
