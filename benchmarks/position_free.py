"""Whether codes would gain from a position-free latent beside coded keys in one layer (docs/choices.md).

The allocator gets further forms of keys: the slowest pairs of every head lose their rotation, for its expectation over
far tokens, and get axes of their own, across frequencies. "joint": these axes hold values too, and one coefficient is
read twice. What a lost rotation costs is charged; nothing is built.

    python benchmarks/position_free.py MODEL [--text TEXT] [--tokens N]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.data.text import bundled_text, calibration_windows
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.cache_coding import TransformCoding, plan
from anymla.methods.cache_coding.basis import Moments, axes, channels
from anymla.methods.cache_coding.energies import EnergySurvey, read
from anymla.methods.cache_coding.forms import Form
from anymla.modeling.attention_spec import AttentionSpec
from anymla.sweep.run import surveyed

BUDGETS, COSTS = (0.25, 0.125, 0.0625, 0.03125), (1.0, 2.0)
FIRST, WINDOW, LENGTH = 4, 16, 512


@dataclass(frozen=True)
class Slow(Form):
    """Keys in channels whose ``slow`` slowest pairs of each head are position-free; ``kept``: in this row."""

    slow: int
    kept: bool

    @property
    def name(self) -> str:
        """With the pairs."""
        return f"{self.basis} {self.block} slow {self.slow} {'own' if self.kept else 'joint'}"

    def costs(self, kind: str, attention: AttentionSpec) -> tuple[int, int]:
        """A joint coefficient is read for the scores and for the context."""
        each, fixed = super().costs(kind, attention)
        return each * (2 if kind == "value" else 1), fixed

    def groups(self, kind: str, attention: AttentionSpec) -> Iterator[tuple[int, ...]]:
        """Fast channels' two parts, then axes; of values all are axes."""
        pairs = self.block * (attention.rope_pairs - self.slow) if kind == "key" else 0
        width = 2 * pairs + 2 * self.block * self.slow * self.kept if kind == "key" else self._joint(attention)
        for start in range(0, width * (attention.num_kv_heads // self.block), width):
            yield from ((start + pair, start + pairs + pair) for pair in range(pairs))
            yield from ((place,) for place in range(start + 2 * pairs, start + width))

    def _joint(self, attention: AttentionSpec) -> int:
        return self.block * (attention.head_dim + 2 * self.slow)


@dataclass(frozen=True)
class Energies(plan.Energies):
    """Also what lost rotations cost, by the form of keys."""

    lost: Mapping[str, float]


class Layer(plan._Layer):
    """A layer with the further forms."""

    def pairs(self) -> list[tuple[Form, Form]]:
        """The usual ones, then keys beside any values, or joint with those of the same heads."""
        found, own = super().pairs(), self.energies
        values = dict.fromkeys(pair[1] for pair in found)
        mixed = [form for form in FORMS[self.attention] if form.name in own.keys]
        found += [(form, other) for form in mixed if form.kept for other in values]
        return found + [(form, form) for form in mixed if not form.kept]

    def _lost(self, pair: tuple[Form, Form], bit: float) -> float:
        return super()._lost(pair, bit) + self.energies.lost.get(pair[0].name, 0.0)

    def coding(self, pair: tuple[Form, Form], keys: Sequence[int], values: Sequence[int]) -> Any:
        """The choice and its loss."""
        found = super().coding(pair, keys, values)
        return pair, found.predicted_kl + self.energies.lost.get(pair[0].name, 0.0) / 2


FORMS: dict[AttentionSpec, list[Slow]] = {}


def rotations(model: Any, windows: Tensor, frequencies: Tensor) -> list[Tensor]:
    """Per layer |E e^{i distance theta}|^2 [H,P] over what heads attend to beyond the exact tokens."""
    sums: list[Tensor] = []
    for window in windows:
        with torch.no_grad():
            maps = model(window[None], output_attentions=True, use_cache=False).attentions
        for index, weights in enumerate(maps):
            weights = weights[0].double().square()
            weights[:, :, :FIRST] = 0
            far = torch.stack([weights.diagonal(-distance, 1, 2).sum(-1) for distance in range(WINDOW + 1, LENGTH)], 1)
            if index == len(sums):
                sums.append(torch.zeros_like(far))
            sums[index] += far
    angles = torch.arange(WINDOW + 1, LENGTH, dtype=torch.float64)[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)
    return [(far.to(turns.dtype) @ turns / far.sum(1, keepdim=True)).abs().square() for far in sums]


def layer_energies(attention: AttentionSpec, facts: dict[str, Any], kept: Tensor) -> Energies:
    """The usual ones and those of all further forms; ``kept`` [H,P]: the share that the expected rotation keeps."""
    heads, size, pairs = attention.num_kv_heads, attention.head_dim, attention.rope_pairs
    kept = kept.view(heads, -1, pairs).mean(1)
    keys, values = ({**facts[f"{kind}_energies"]} for kind in ("key", "value"))
    moments = {
        kind: Moments(**{name: read(facts[f"{kind}_{name}"]) for name in ("mean", "covariance", "fisher")}).shrunk()
        for kind in ("key", "value")
    }
    samples = [read(facts[f"{kind}_sample"]).double() for kind in ("key", "value")]
    key, value = (sample - sample.mean(0) for sample in samples)
    cross = key.T @ value / len(key)
    lost = {}
    for form in FORMS[attention]:
        keys[form.name], values[form.name], lost[form.name] = [], [], 0.0
        for first in range(0, heads, form.block):
            fast, slow = _dims(form, first, attention)
            scale = torch.stack([kept[at // size, at % size % pairs] for at in slow]).sqrt()
            loose = moments["key"].of(torch.tensor(slow))
            read_scaled = loose.fisher * torch.outer(scale, scale)
            still = Moments(mean=loose.mean, covariance=loose.covariance, fisher=read_scaled)
            turning = channels(moments["key"].of(torch.tensor(fast)), pairs - form.slow, form.block)
            own = [first * size + dim for dim in range(form.block * size)]
            both = _joined(still, moments["value"].of(torch.tensor(own)), cross[slow][:, own])
            keys[form.name] += [*turning.energies.tolist(), *(axes(still).energies.tolist() if form.kept else [])]
            values[form.name] += axes(both).energies.tolist()
            costs = loose.fisher.diagonal() * loose.covariance.diagonal() * (1 - scale.square())
            lost[form.name] += costs.sum().item()
    return Energies(keys=keys, values=values, lost=lost)


def _dims(form: Slow, first: int, attention: AttentionSpec) -> tuple[list[int], list[int]]:
    """Where the keys of a block's fast pairs are, and those of its slow ones."""
    pairs, heads = attention.rope_pairs, range(first, first + form.block)
    places = [(head * attention.head_dim + dim, dim % pairs) for head in heads for dim in range(2 * pairs)]
    fast = [place for place, pair in places if pair < pairs - form.slow]
    return fast, [place for place, pair in places if pair >= pairs - form.slow]


def _joined(keys: Moments, values: Moments, cross: Tensor) -> Moments:
    covariance = torch.cat([torch.cat([keys.covariance, cross], 1), torch.cat([cross.T, values.covariance], 1)])
    fisher = torch.block_diag(keys.fisher, values.fisher)
    return Moments(mean=torch.cat([keys.mean, values.mean]), covariance=covariance, fisher=fisher)


def main() -> None:
    """Prints, per cost and budget, the predicted KL without and with the forms, and what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default=str(bundled_text("train")))
    parser.add_argument("--tokens", type=int, default=8192)
    asked = parser.parse_args()
    settings = {"calibration": asked.text, "calibration_tokens": asked.tokens, "calibration_length": LENGTH}
    method, spec = TransformCoding.of(settings, "settings"), read_model_spec(read_config(asked.model))
    attentions = [*spec.attention_layers.values()]
    model = AutoModelForCausalLM.from_pretrained(asked.model, attn_implementation="eager").eval()
    windows = calibration_windows(asked.text, load_tokenizer(asked.model), tokens=asked.tokens, length=LENGTH, seed=0)
    for attention in attentions:
        blocks = [form.block for form in plan.forms(attention, 2.0)[1]]
        slow = sorted({attention.rope_pairs * part // 8 for part in (2, 4, 6)} - {0})
        FORMS[attention] = [Slow("channels", *each) for each in itertools.product(blocks, slow, (True, False))]
    with tempfile.TemporaryDirectory() as folder:
        survey = EnergySurvey(method, WINDOW, COSTS)
        facts = surveyed(method, survey, asked.model, spec, Path(folder) / "survey", memory=1 << 30)
        turns = rotations(model, windows, read(facts[0]["inv_freq"]).double())
        energies = [layer_energies(*each) for each in zip(attentions, facts, turns, strict=True)]
        report(method, attentions, energies, facts)
    for index, kept in enumerate(turns):
        print(f"layer {index}: share kept by pair {[round(each, 2) for each in kept.mean(0).tolist()]}")


def report(method: TransformCoding, attentions: Sequence[AttentionSpec], energies: Any, facts: Any) -> None:
    """One line per cost and budget."""
    for cost, budget in itertools.product(COSTS, BUDGETS):
        settings = method.model_copy(update={"kv_cache": budget, "decode_cost": cost})
        usual = [plan.Energies(keys=each["key_energies"], values=each["value_energies"]) for each in facts]
        before = sum(layer.predicted_kl for layer in plan.plan_layers(attentions, usual, settings))
        own, plan._Layer = plan._Layer, Layer
        chosen: Any = plan.plan_layers(attentions, energies, settings)
        plan._Layer = own
        after = sum(lost for _, lost in chosen)
        mixed = [pair[0].name for pair, _ in chosen if isinstance(pair[0], Slow)]
        print(f"cost {cost:g} {budget:.2%}: {before:.6f} -> {after:.6f}, chosen {mixed}", flush=True)


if __name__ == "__main__":
    main()
