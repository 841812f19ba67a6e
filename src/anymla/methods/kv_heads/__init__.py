"""Fewer KV heads: what can be shared by the heads of a group, and the checkpoints made of it."""

from anymla.methods.kv_heads.settings import KVHeads

__all__ = ["KVHeads"]
