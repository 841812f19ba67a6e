"""A cache of codes: what keys and values are, tables, bases, bits, and the methods made of them."""
