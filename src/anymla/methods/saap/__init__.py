"""Width pruning: FFN neurons, KV groups and latent channels that the loss needs least go, and nothing else changes."""

from anymla.methods.saap.settings import SAAP

__all__ = ["SAAP"]
