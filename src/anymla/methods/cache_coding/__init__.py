"""A cache of codes: what keys and values are, tables, bases, bits, and the methods made of them."""

from anymla.methods.cache_coding.kvquant import KVQuant
from anymla.methods.cache_coding.transform_coding import TransformCoding

__all__ = ["KVQuant", "TransformCoding"]
