"""Weights of two bits and scales: the method, what it does to one matrix, and what it makes of a layer."""

from anymla.methods.billm.settings import BiLLM

__all__ = ["BiLLM"]
