"""What keys and values are on calibration text, and what an error of theirs costs: their moments and Fisher matrices.

Shapes: T tokens of a window, G key/value heads of d numbers, N sampled tokens. Keys are before rope and after their
norm; a head's dims are [real parts of the rope pairs | imaginary parts | dims without rope]. In a layer with latent or
factorised attention latent [r] and rope key [R] before rope stand in their place, in one of low rank what it caches.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from anymla.architectures.attention import read_attention
from anymla.distributed import all_rows, all_sum, all_sum_number, world
from anymla.methods.base import Survey
from anymla.methods.cache_coding.plan import layer_window
from anymla.methods.cache_coding.rope import RopeSeen
from anymla.methods.mla.source import with_exact_window
from anymla.methods.mla.weights import ConvertedLayer, build_attention
from anymla.methods.mla.whole import whole_layer
from anymla.model_run.stream import LayerBatch
from anymla.modeling.coded_attention import CodedAttention
from anymla.modeling.latent_attention import LatentAttention

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer

KINDS = ("key", "value")
SAMPLE = 8192  # tokens to fit tables on
LARGEST = 0.01  # of a window's tokens: their gradients count as much as the least of them


class KeyValueSurvey(Survey):
    """Moments of keys and of values, and of the loss's gradients with respect to them, per layer.

    The facts of a layer, for "key" and for "value":

    - "key_mean" [Gd], "key_covariance" and "key_fisher" [Gd,Gd], float64
    - "key_sample" and "key_gradients" [N,Gd] of the same tokens, float32
    - "tokens", how many were summed
    - of the layer's rope "inv_freq" [P] and "rope_scale" (rope.py)

    The Fisher matrix is E[g g^T]. Here g is one token's gradient of the window's whole negative log-likelihood, in
    nats. An error of covariance D in every key costs about tr(F D) / 2 nats of KL per token. That holds for errors that
    are small and independent, and for text that is like the model's own. It compares keys, values and layers.

    A hundredth of the tokens may hold most of the matrix. Others look to these tokens, whatever they mean. A few of
    them say little about directions. So the largest gradients of a window are scaled down to the percentile of their
    squares, and the matrix is then scaled up to its old trace.

    Args:
        first_tokens: how many of every window are left out, because they stay exact.
        exact_window: latest tokens that each query sees exactly. Their part counts in no gradient.
        sample: most tokens in the samples, of all processes.
    """

    backward: ClassVar[bool] = True

    def __init__(self, first_tokens: int, exact_window: int = 0, sample: int = SAMPLE) -> None:
        self.first_tokens, self.exact_window, self.sample = first_tokens, exact_window, sample

    def observer(self, layer: Layer) -> KeyValueSums:
        """Sums over the windows."""
        return KeyValueSums(layer, self.first_tokens, self.exact_window, self.sample // world())

    def layer(self, layer: Layer, observed: KeyValueSums) -> dict[str, Any]:
        """The facts of the layer, over all processes."""
        return observed.facts()


class KeyValueSums:
    """Sums of keys, values and their gradients while a layer runs forwards and back.

    Every family's keys are made in its own way. So the layer runs with our attention at full budget, which is exact.
    Its cache would hold the keys and values themselves, in another order. With an exact window, near keys and values do
    not come from the cache. So gradients with respect to the cache come from far queries alone. A layer that was
    converted runs unchanged: its "keys" and "values" are both vectors that it caches, before rope.
    """

    def __init__(self, layer: Layer, first_tokens: int, exact_window: int, sample: int) -> None:
        if (spec := layer.old.attention) is None:
            raise ValueError(f"layer {layer.index} has no softmax attention")
        self.layer, self.path, self.original = layer, layer.attention_path, layer.attention
        self.first, self.sizes = first_tokens, layer.old.coded_sizes
        if layer.old.kind is not None:
            attention: Any = copy.deepcopy(self.original)
            self.order = torch.arange(sum(self.sizes), device=layer.original.device)
        else:
            source = read_attention(self.original, spec, layer.family, layer.config)
            if window := layer_window(spec, exact_window):
                source = with_exact_window(source, window)
            whole = whole_layer(source.weights)
            attention = build_attention(self.original, source, whole, layer.config, layer.original.dtype)
            self.order = _places(whole, spec.rope_pairs, spec.head_dim)
        attention.always_expands = True
        self.made, self.rope = Made(attention), RopeSeen(attention)
        layer.module.set_submodule(self.path, attention)
        self.sums = {kind: Sums(size, layer.original.device) for kind, size in zip(KINDS, self.sizes, strict=True)}
        tokens = layer.windows.choice.stop * (layer.original.shape[1] - first_tokens)
        self.sampled = torch.linspace(0, tokens - 1, min(sample, tokens), dtype=torch.float64).long()
        self.tokens = 0

    def add(self, batch: LayerBatch) -> None:
        """Takes one window."""
        coded, gradient = (states[0, self.first :, self.order] for states in self.made.taken())
        gradient = gradient * (batch.hidden.shape[1] - 1)  # of the sum over the window's tokens
        count = len(coded)
        places = self.sampled - self.tokens
        places = places[(places >= 0) & (places < count)].to(coded.device)
        parts = (each.split(self.sizes, -1) for each in (coded, gradient))
        for kind, states, gradients in zip(KINDS, *parts, strict=True):
            self.sums[kind].add(states, gradients, places)
        self.tokens += count

    def facts(self) -> dict[str, Any]:
        """All that was summed, over all processes; the layer has its own attention again."""
        self.layer.module.set_submodule(self.path, self.original)
        tokens = round(all_sum_number(self.tokens, self.layer.original.device))
        if self.rope.found is None:
            raise ValueError(f"layer {self.layer.index} got no window")
        inv_freq, rope_scale = self.rope.found
        found: dict[str, Any] = {"tokens": tokens, "inv_freq": inv_freq, "rope_scale": rope_scale}
        for kind, sums in self.sums.items():
            found |= {f"{kind}_{name}": value for name, value in sums.facts(tokens).items()}
        return found


class Sums:
    """Sums of one kind of states [T,Gd] and of their gradients."""

    def __init__(self, width: int, device: Any) -> None:
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.gram, self.fisher = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))
        self.power = torch.zeros((), dtype=torch.float64, device=device)  # of all gradients, as they are
        self.sample: list[tuple[Tensor, Tensor]] = []

    def add(self, states: Tensor, gradients: Tensor, places: Tensor) -> None:
        """Takes one window, and the tokens at ``places`` as a sample."""
        self.sample.append((states[places].float().cpu(), gradients[places].float().cpu()))
        states, gradients = states.double(), gradients.double()
        self.sum += states.sum(0)
        self.gram += states.T @ states
        power = gradients.square().sum(-1)
        self.power += power.sum()
        if limit := power.quantile(1 - LARGEST, interpolation="lower"):
            gradients = gradients * (limit / power.clamp_min(limit)).sqrt()[:, None]
        self.fisher += gradients.T @ gradients

    def facts(self, tokens: int) -> dict[str, Tensor]:
        """Mean, covariance, Fisher matrix and sample over all processes' ``tokens``."""
        mean, gram, fisher, power = (all_sum(each) / tokens for each in (self.sum, self.gram, self.fisher, self.power))
        fisher *= power / fisher.trace().clamp_min(torch.finfo(power.dtype).tiny)
        sample, gradients = (all_rows(torch.cat(rows).to(mean.device)) for rows in zip(*self.sample, strict=True))
        moments = {"mean": mean, "covariance": gram - torch.outer(mean, mean), "fisher": fisher}
        return moments | {"sample": sample, "gradients": gradients}


class Made:
    """What an attention made of the window that it saw last: all that it would cache, before rope."""

    def __init__(self, attention: LatentAttention | CodedAttention) -> None:
        self.outputs: dict[str, Tensor] = {}
        if isinstance(attention, CodedAttention):  # of low rank
            parts = (("key_encoder", "k_proj"), ("value_encoder", "v_proj"))  # the first of each that it has
            self.beside = [plain if getattr(attention, name) is None else name for name, plain in parts]
            self.added: list[str] = []
        else:
            linear = attention.spec.linear_keys
            self.beside = ["kv_a_proj_with_mqa" if linear else "k_a_proj_with_mqa"]
            self.added = [] if linear else ["v_a_proj"]  # values, where they do not come out of the same matrix
        for name in self.beside + self.added:
            attention.get_submodule(name).register_forward_hook(self._keeps(name))

    def taken(self) -> tuple[Tensor, Tensor]:
        """The numbers [1,T,2Gd], or [1,T,r+R], and their gradients; then forgotten."""
        made = [self.outputs[name] for name in self.beside]
        states = torch.cat([each.detach() for each in made], -1)
        gradient = torch.cat([torch.zeros_like(each) if each.grad is None else each.grad for each in made], -1)
        for name in self.added:
            added = self.outputs[name].detach()
            states = states + pad(added, (0, states.shape[-1] - added.shape[-1]))
        self.outputs.clear()
        return states, gradient

    def _keeps(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                self.outputs[name] = output

        return keep


def _places(whole: ConvertedLayer, pairs: int, head_dim: int) -> Tensor:
    """Where in the cache of an attention at full budget each number of [keys | values] is [2Gd]."""
    latent, channels = whole.latent.encoder, whole.channels.encoder(pairs, head_dim)
    return torch.cat([latent, pad(channels, (0, channels.shape[1]))]).argmax(0)
