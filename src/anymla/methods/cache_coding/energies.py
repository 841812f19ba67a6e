"""What a plan of bits needs of every layer: how much each coefficient carries, in each basis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymla.errors import CheckpointError
from anymla.methods.cache_coding.basis import Basis, Moments, axes, channels, single_channels
from anymla.methods.cache_coding.survey import KeyValueSums, KeyValueSurvey
from anymla.modeling.spec import LayerSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


class EnergySurvey(KeyValueSurvey):
    """Also "energies": of keys in both bases, and of values; of a latent in one basis, and of a rope key."""

    def layer(self, layer: Layer, observed: KeyValueSums) -> dict[str, Any]:
        """The facts of the layer, over all processes.

        Raises:
            CheckpointError: activations or gradients overflow.
        """
        facts = super().layer(layer, observed)
        names = ("axes",) if layer.old.latent else ("axes", "channels")
        bases = {name: key_basis(facts, name, layer.old) for name in names}
        bases["values"] = value_basis(facts, layer.old)
        facts["energies"] = {name: basis.energies.tolist() for name, basis in bases.items()}
        if not all(basis.energies.isfinite().all() for basis in bases.values()):
            raise CheckpointError(f"keys, values or gradients overflow at layer {layer.index}: give --dtype float64")
        return facts


def key_basis(facts: dict[str, Any], name: str, layer: LayerSpec) -> Basis:
    """The basis ``name`` of a layer's keys, or that of its latent: axes about zero, for a mean stays in it."""
    keys, attention = _moments(facts, "key"), layer.attention
    if layer.latent is not None:
        return axes(keys.about_zero())
    if name == "axes" or attention is None:
        return axes(keys)
    return channels(keys, attention.rope_pairs, attention.num_kv_heads)


def value_basis(facts: dict[str, Any], layer: LayerSpec) -> Basis:
    """The basis of a layer's values, or that of its rope key."""
    values = _moments(facts, "value")
    return axes(values) if layer.latent is None else single_channels(values.about_zero())


def read(tensor: Any) -> Tensor:
    """A tensor of facts, in memory or in a file."""
    found: Tensor = tensor if isinstance(tensor, Tensor) else tensor.read()
    return found


def _moments(facts: dict[str, Any], kind: str) -> Moments:
    mean, covariance, fisher = (read(facts[f"{kind}_{name}"]) for name in ("mean", "covariance", "fisher"))
    return Moments(mean=mean, covariance=covariance, fisher=fisher).shrunk()
