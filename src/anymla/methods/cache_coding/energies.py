"""What a plan of bits needs of every layer: how much each coefficient carries, in each form of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymla.errors import CheckpointError
from anymla.methods.cache_coding.basis import Basis, Moments, axes, channels, in_parts, single_channels
from anymla.methods.cache_coding.forms import CHANNELS, Form, forms_of_all
from anymla.methods.cache_coding.latent_plan import LatentCoding
from anymla.methods.cache_coding.survey import KeyValueSums, KeyValueSurvey
from anymla.modeling.attention_spec import AttentionSpec

if TYPE_CHECKING:
    from anymla.methods.cache_coding.curve import DecodeCost
    from anymla.methods.cache_coding.transform_coding import TransformCoding
    from anymla.sweep.layer import Layer


class EnergySurvey(KeyValueSurvey):
    """Also "keys" and "values": their energies in every form that a plan may choose, by the form's name.

    ``decode_costs``: of the plans. Default: that of ``settings`` alone.
    """

    def __init__(
        self, settings: TransformCoding, exact_window: int, decode_costs: Sequence[DecodeCost] | None = None
    ) -> None:
        super().__init__(settings.first_tokens, exact_window)
        self.decode_costs = decode_costs or (settings.decode_cost,)

    def layer(self, layer: Layer, observed: KeyValueSums) -> dict[str, Any]:
        """The facts of the layer, over all processes.

        Raises:
            CheckpointError: activations or gradients overflow.
        """
        facts = super().layer(layer, observed)
        if (attention := layer.old.attention) is None:
            return facts
        kinds = zip(("key", "value"), forms_of_all(attention, self.decode_costs), strict=True)
        if isinstance(layer.choice, LatentCoding):
            bases = row_bases(facts, layer.choice)
            found = {kind: {"row": basis.energies} for kind, basis in zip(("key", "value"), bases, strict=True)}
        else:
            found = {
                kind: {form.name: basis_of(facts, kind, form, attention).energies for form in possible}
                for kind, possible in kinds
            }
        for kind, energies in found.items():
            if not all(each.isfinite().all() for each in energies.values()):
                raise CheckpointError(
                    f"keys, values or gradients overflow at layer {layer.index}: give --dtype float64"
                )
            facts[f"{kind}_energies"] = {name: each.tolist() for name, each in energies.items()}
        return facts


def row_bases(facts: dict[str, Any], coding: LatentCoding) -> tuple[Basis, Basis]:
    """Axes of both vectors of a converted layer; the channels of a rope key unchanged.

    Those of a latent, of each of its parts, are about zero, because a mean stays in it.
    """
    keys, values = (_moments(facts, kind) for kind in ("key", "value"))
    if not coding.channels:
        return axes(keys), axes(values)
    return in_parts(keys.about_zero(), coding.key_parts, axes), single_channels(values.about_zero())


def _moments(facts: dict[str, Any], kind: str) -> Moments:
    mean, covariance, fisher = (read(facts[f"{kind}_{name}"]) for name in ("mean", "covariance", "fisher"))
    return Moments(mean=mean, covariance=covariance, fisher=fisher).shrunk()


def basis_of(facts: dict[str, Any], kind: str, form: Form, attention: AttentionSpec) -> Basis:
    """The basis of a layer's keys (``kind`` "key") or values ("value") in ``form``."""
    moments = _moments(facts, kind)

    def of_block(block: Moments) -> Basis:
        return channels(block, attention.rope_pairs, form.block) if form.basis == CHANNELS else axes(block)

    return in_parts(moments, (form.block * attention.head_dim,) * (attention.num_kv_heads // form.block), of_block)


def read(tensor: Any) -> Tensor:
    """A tensor of facts, in memory or in a file."""
    found: Tensor = tensor if isinstance(tensor, Tensor) else tensor.read()
    return found
