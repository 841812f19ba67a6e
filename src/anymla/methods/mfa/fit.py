"""One layer of the original to factorised attention: mla's choice of channels, a latent, and a refit of the output."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymla.distributed import all_sum
from anymla.methods.base import Changed
from anymla.methods.mfa.bridge import bridged
from anymla.methods.mla.choose import LayerFit
from anymla.methods.mla.factorization.output_aware import OutputAware
from anymla.methods.mla.latent import Latent, LatentProblem, blockwise
from anymla.methods.mla.observe import AttentionObserver, Measured
from anymla.methods.mla.rope import RopeChoice
from anymla.modeling.mfa_attention import MfaAttention

if TYPE_CHECKING:
    from anymla.methods.mfa.settings import MFA
    from anymla.sweep.layer import Layer


def fit_layer(settings: MFA, layer: Layer, observed: AttentionObserver) -> Changed:
    """Puts the factorised attention that loses least in the place of the layer's own."""
    measured = observed.measured()
    fit = MfaFit(settings, layer, measured)
    best = fit.best()
    changed = Changed(spec=fit.spec(best.attention), result=asdict(fit.result(best)))
    layer.module.set_submodule(layer.attention_path, best.attention)
    measured.close()
    return changed


@dataclass(frozen=True)
class SeparateLatents(OutputAware):
    """One latent of keys and one of values, each by what the output needs most; the budget is split by the same."""

    def __call__(self, problem: LatentProblem, rank: int) -> Latent:
        """The latent: first the keys' numbers, then the values', which are one at least."""
        size, mean = problem.key_size, problem.weighted_mean
        root, inverse = self.roots(problem.metric)
        white = self.seen(problem, root)
        values, vectors = zip(*map(torch.linalg.eigh, (white[:size, :size], white[size:, size:])), strict=True)
        places = torch.cat(values).topk(rank).indices
        keys = min(int((places < size).sum()), rank - 1)
        kept = [each[:, len(each) - count :].flip(1) for each, count in zip(vectors, (keys, rank - keys), strict=True)]
        both = torch.block_diag(*kept)
        encoder, decoder = blockwise(root, both).T, blockwise(inverse, both)
        norms = encoder.norm(dim=1)
        return Latent(encoder / norms[:, None], decoder * norms, mean)


class MfaFit(LayerFit):
    """The candidates of one layer, as factorised attention."""

    def __init__(self, settings: MFA, layer: Layer, measured: Measured) -> None:
        super().__init__(settings.as_mla(), layer, measured)
        self.mfa = settings
        if not settings.key_reuse:
            self.factorization = SeparateLatents()

    def _build(self, rope_dims: int, rope: RopeChoice) -> MfaAttention:
        latent = super()._build(rope_dims, rope)
        values = 0 if self.mfa.key_reuse else _value_columns(latent.kv_b_proj.weight, latent.head_dim)
        spec = self.mfa.spec(latent.kv_lora_rank, latent.qk_rope_head_dim, values)
        gram = None if spec.q_lora_rank is None else self._gram
        return bridged(latent, spec, self.layer.config, self.layer.saved, gram)

    @cached_property
    def _gram(self) -> Tensor:
        """Moments [D+1,D+1] of the input with a 1 after it, on the windows to fit on."""
        total: Tensor | None = None
        for batch in self.measured.inputs.split(self.layer.batch, self.layer.windows.fit):
            states = pad(batch.flatten(0, 1).double(), (0, 1), value=1.0)
            total = states.T @ states if total is None else total + states.T @ states
        if total is None:
            raise ValueError("no windows to fit on")
        return all_sum(total) / all_sum(total[-1:, -1:].clone())


def _value_columns(decoder: Tensor, head_dim: int) -> int:
    """How many of the latent's numbers no key reads; ``decoder`` [2 G d,r], of each head key rows, then value rows."""
    keys = decoder.unflatten(0, (-1, 2, head_dim))[:, 0]
    return int((keys == 0).all(dim=(0, 1)).sum())
