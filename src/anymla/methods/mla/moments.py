"""Second moments of one attention layer on calibration text: all that the algebra needs to know about the data.

Shapes: B windows, T tokens, H query heads, G key/value heads, n = H/G, d head_dim, P rope pairs, D hidden.
y = [keys of all kv heads ; values of all kv heads], 2Gd numbers per token, keys before rope and after their norm.
Sums run in float64; activations keep the model's precision, at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anymla.architectures.attention import AttentionWeights
from anymla.distributed import all_sum, all_sum_number
from anymla.methods.mla.sample import Sample
from anymla.modeling.absorbed import additive_mask
from anymla.modeling.heads import attention_weights, causal_mask

BLOCK_ROWS = 128  # query tokens whose attention is held at once


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Statistics of one layer (docs/mathematics.md, 'What is measured').

    gram [2Gd,2Gd], mean [2Gd]: E[y y^T] and E[y] over tokens. weighted_gram, weighted_mean: the same with token n
    weighted by the attention it receives, sum_m a_mn^2. query_gram [H,d,d]: E[q q^T]. rotation [H,P] complex:
    E[e^{i Delta theta_f}] over the distances that head h attends to. rope_scale: the factor that rope itself puts on
    scores (1 but for yarn and longrope). key_weight, value_weight [H]: E_t sum_n a_tn^2 ||W_o (v_n - o_t)||^2 and
    E_t sum_n a_tn^2. query_norm [H,P], key_norm [G,P]: mean 2-norm of each rope pair. sample: some of this process's
    tokens as they are.
    """

    gram: Tensor
    mean: Tensor
    weighted_gram: Tensor
    weighted_mean: Tensor
    query_gram: Tensor
    rotation: Tensor
    rope_scale: float
    key_weight: Tensor
    value_weight: Tensor
    query_norm: Tensor
    key_norm: Tensor
    sample: Sample


class MomentSums:
    """Running sums of :class:`Moments`; feed it batches, then take :meth:`moments`.

    Attention to the last ``window`` tokens does not count: they are seen exactly (modeling/exact_window.py).
    """

    def __init__(self, weights: AttentionWeights, window: int = 0) -> None:
        self.weights, self.window = weights, window
        (kv_heads, d), heads, device = weights.key.shape[:2], len(weights.query), weights.query.device
        y, pairs = 2 * kv_heads * d, weights.rope_pairs

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.received, self.rope_scale = 0, zeros(), zeros() + 1
        self.gram, self.mean, self.weighted_gram, self.weighted_mean = zeros(y, y), zeros(y), zeros(y, y), zeros(y)
        self.query_gram = zeros(heads, d, d)
        self.rotation = zeros(heads, pairs, dtype=torch.complex128)
        self.output_gram = torch.einsum("Dhd,Dhe->hde", weights.output, weights.output).double()
        self.attended, self.key_weight, self.value_weight = zeros(heads), zeros(heads), zeros(heads)
        self.query_norm, self.key_norm = zeros(heads, pairs), zeros(kv_heads, pairs)
        self.sample: Sample | None = None
        self.blocks: tuple[Tensor | None, list[tuple[slice, slice, bool]]] = (None, [])  # of the last mask

    def add(self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> None:
        """Adds a batch: query [B,H,T,d], key and value [B,G,T,d] before rope, cos and sin [1,1,T,P].

        ``mask`` [1,1 or H,T,T] is additive, None where only the future is masked.
        """
        precision = torch.promote_types(query.dtype, torch.float32)
        query, key, value = query.to(precision), key.to(precision), value.to(precision)
        batch, _, length, _ = key.shape
        turn = torch.complex(cos[0, 0].to(precision), sin[0, 0].to(precision))  # [T,P]
        if mask is None:
            mask = additive_mask(causal_mask(length, length, None, query.device), precision)
        if self.sample is None:
            self.sample = Sample.of(query, key, turn / turn.abs(), mask)
        received = self._add_attention(query, key, value, turn, mask)
        self.rope_scale = turn.abs().square().mean() if turn.numel() else self.rope_scale
        y = torch.cat([key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)], dim=-1).flatten(0, 1).double()
        weight = received.flatten().double()
        self.tokens += batch * length
        self.received += weight.sum()
        self.gram += y.T @ y
        self.mean += y.sum(0)
        self.weighted_gram += (y * weight[:, None]).T @ y
        self.weighted_mean += weight @ y
        flat = query.transpose(0, 1).flatten(1, 2).double()
        self.query_gram += flat.transpose(1, 2) @ flat
        turned = 2 * turn.shape[1]
        self.query_norm += to_complex(query[..., :turned]).abs().double().sum(dim=(0, 2))
        self.key_norm += to_complex(key[..., :turned]).abs().double().sum(dim=(0, 2))

    def _add_attention(self, query: Tensor, key: Tensor, value: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        """Adds what heads attend to; returns what every token receives, sum_m a_mn^2 [B,T]."""
        kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
        received = query.new_zeros(len(query), query.shape[2])
        unit = turn / turn.abs()
        back = torch.cat([unit.real, -unit.imag, unit.real.new_ones(len(unit), 1)], dim=1)  # e^{-i n theta}, and 1
        query, key = rotate(query, turn) * self.weights.scaling, rotate(key, turn)
        if self.weights.query_gain is not None:
            query = query * self.weights.query_gain.to(query.dtype)
        if self.blocks[0] is not mask:  # to find what rows see, the CPU waits for the device
            starts = (slice(at, at + BLOCK_ROWS) for at in range(0, query.shape[2], BLOCK_ROWS))
            self.blocks = mask, [(rows, *seen_by(mask[:, :, rows])) for rows in starts]
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            sums = AttentionSums(query[:, heads], value[:, head], back)
            for rows, seen, masked in self.blocks[1]:  # a block of rows at a time bounds memory to its [B,n,R,S] scores
                own = mask[:, heads if mask.shape[1] > 1 else slice(None), rows, seen] if masked else None
                attention = self._attention(query[:, heads, rows], key[:, head, seen], own, heads)
                sums.add(attention, rows, seen, self.window)
            received += sums.received.sum(1)
            self._add_heads(heads, sums, value[:, head], unit)
        return received

    def _attention(self, query: Tensor, key: Tensor, mask: Tensor | None, heads: slice) -> Tensor:
        """Attention probabilities [B,n,R,S] of a block of rows, by the heads that share one key head; after rope."""
        sinks = None if self.weights.sinks is None else self.weights.sinks[heads]
        mask = None if mask is None else mask.to(query.dtype)
        return attention_weights(query @ key.unsqueeze(1).mT, mask, self.weights.softcap, sinks)

    def _add_heads(self, heads: slice, sums: AttentionSums, value: Tensor, turn: Tensor) -> None:
        """Adds what the heads that share one ``value`` [B,T,d] attend to and give.

        sum_mn a_mn^2 ||W_o (v_n - o_m)||^2 is expanded, so that nothing but sums over n is needed of a^2.
        """
        metric = self.output_gram[heads]
        output, value = sums.output.double(), value.unsqueeze(1).double()
        value_norm = ((value @ metric) * value).sum(-1)  # ||W_o v||^2, [B,n,T]
        read = output @ metric
        output_norm, cross = (read * output).sum(-1), (read * sums.squared_output.double()).sum(-1)
        received, given = sums.received.double(), sums.given.double()
        distance = given * output_norm - 2 * cross + received * value_norm
        self.key_weight[heads] += distance.sum(dim=(0, 2)).clamp_min(0)
        self.value_weight[heads] += received.sum(dim=(0, 2))
        pairs = turn.shape[1]
        mean_turn = torch.complex(sums.turned[..., :pairs].contiguous(), sums.turned[..., pairs:-1].contiguous())
        self.attended[heads] += sums.turned[..., -1].double().sum(dim=(0, 2))
        self.rotation[heads] += (turn * mean_turn).sum(dim=(0, 2)).to(self.rotation.dtype)

    def moments(self) -> Moments:
        """The means of all that was added; ends the sums, whose memory they take over.

        Raises:
            ValueError: nothing was added.
        """
        if self.sample is None:
            raise ValueError("moments of no tokens")
        over_tokens = ("gram", "mean", "query_gram", "key_weight", "value_weight", "query_norm", "key_norm")
        tokens = all_sum_number(self.tokens, self.gram.device)
        for name in over_tokens:
            all_sum(getattr(self, name)).div_(tokens)
        all_sum(self.received)
        for name in ("weighted_gram", "weighted_mean"):
            all_sum(getattr(self, name)).div_(self.received.clamp_min(1e-300))
        all_sum(self.rotation).div_(all_sum(self.attended).clamp_min(1e-300)[:, None])
        means = {name: getattr(self, name) for name in (*over_tokens, "rotation", "weighted_gram", "weighted_mean")}
        return Moments(rope_scale=float(self.rope_scale), sample=self.sample, **means)


class AttentionSums:
    """Sums over the tokens that each row attends to, and over the rows that attend to each token, of n heads.

    ``back`` [T,2P+1]. output: sum_n a_mn v_n [B,n,T,d]; of attention outside the exact window alone: squared_output,
    sum_n a_mn^2 v_n [B,n,T,d]; turned, sum_n a_mn back_n [B,n,T,2P+1]; given, sum_n a_mn^2, and received, sum_m a_mn^2
    [B,n,T].
    """

    def __init__(self, query: Tensor, value: Tensor, back: Tensor) -> None:
        self.value, self.back = value.unsqueeze(1), back
        self.output, self.squared_output = (query.new_empty(*query.shape[:3], value.shape[-1]) for _ in range(2))
        self.turned = query.new_empty(*query.shape[:3], back.shape[1])
        self.given, self.received = query.new_empty(query.shape[:3]), query.new_zeros(query.shape[:3])

    def add(self, attention: Tensor, rows: slice, seen: slice, window: int) -> None:
        """Takes the attention [B,n,R,S] of ``rows`` to the tokens ``seen``, the last ``window`` of each among them."""
        self.output[:, :, rows] = attention @ self.value[:, :, seen]
        if window:
            attention = attention.tril_(rows.start - seen.start - window)
        self.turned[:, :, rows] = attention @ self.back[seen]
        squared = attention.square_()
        self.squared_output[:, :, rows] = squared @ self.value[:, :, seen]
        self.given[:, :, rows] = squared.sum(-1)
        self.received[:, :, seen] += squared.sum(2)


def seen_by(mask: Tensor) -> tuple[slice, bool]:
    """The tokens that any row of an additive ``mask`` [B,H,R,T] looks at, from first to last; whether it changes more.

    A row that looks at none is spread over all.
    """
    allowed = mask > torch.finfo(mask.dtype).min / 4
    if not bool(allowed.any(-1).all()):
        return slice(0, mask.shape[-1]), True
    columns = allowed.flatten(0, -2).any(0).nonzero()
    seen = slice(int(columns[0]), int(columns[-1]) + 1)
    return seen, bool(mask[..., seen].any())


def to_complex(pairs: Tensor) -> Tensor:
    """Half-split pairs [..., 2N] as complex numbers [..., N]."""
    real, imag = pairs.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imag.contiguous())


def rotate(heads: Tensor, turn: Tensor) -> Tensor:
    """Heads [..., d] with their first P pairs, half-split, times complex ``turn`` [..., P]."""
    turned = to_complex(heads[..., : 2 * turn.shape[-1]]) * turn
    return torch.cat([turned.real, turned.imag, heads[..., 2 * turn.shape[-1] :]], dim=-1)
