"""How one layer's keys and values, or latent and rope key, are coded, once it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from anymla.methods.cache_coding.basis import Basis
from anymla.modeling.codecs import make_codec
from anymla.modeling.coding_spec import Coding


@dataclass(frozen=True, kw_only=True)
class Coded:
    """How keys, or values, of a layer are coded.

    Args:
        coding: of their coefficients.
        basis: in which these are; None: the states themselves.
        tables: levels by bits, as codecs take them.
    """

    coding: Coding
    basis: Basis | None
    tables: Mapping[int, Tensor]


def codec_tensors(keys: Coded, values: Coded) -> dict[str, Tensor]:
    """The buffers of both codecs of an attention, by their names in it."""
    tensors: dict[str, Tensor] = {}
    for name, coded in (("key_codec", keys), ("value_codec", values)):
        codec = make_codec(coded.coding)
        codec.set_tables(coded.tables)
        tensors |= {f"{name}.{key}": tensor for key, tensor in codec.state_dict().items()}
    return tensors
