"""What is compared in bytes.py: each system, the cases it is measured in, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from cache_baselines import (
    CareLatents,
    Codec,
    HadamardInt,
    Kivi,
    PlainPCA,
    Tables,
    levels_of,
    nearest_level,
)
from cache_bench import Bench
from fidelity import convert_best
from peers import METHODS
from simulation import observed, simulated
from torch import Tensor
from transformers import QuantizedCache

import anymla
from anymla.account import measure
from anymla.errors import InfeasibleError
from anymla.evaluation.logits import Logits, logits_of_pass
from anymla.io.checkpoint import load_model
from anymla.model_run.stream import decoder_layers
from anymla.modeling.heads import multiply_pairs

BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.094, 0.078, 0.0625, 0.031)
CHUNK = 16  # tokens that run at once through a cache object: later ones read what it made of these
FIRST = 4  # tokens that stay exact on top of a latent
OURS_CHEAP, OURS = "anymla, decode cost 2", "anymla"
OURS_MLA, OURS_MLA_KVQUANT = "anymla, mla + transform coding", "anymla, mla + kvquant"
Settings = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    """``cases``: settings by their name. ``run``: the scores in one of them, with its bytes."""

    cases: dict[str, Settings]
    run: Callable[[Bench, Settings], Row]


def sized(bench: Bench, per_token: float, once: float) -> Row:
    """Bytes of a token, bytes that every sequence takes once, and both over the tokens of a scored window."""
    whole = per_token + once / bench.protocol.length
    return {
        "bytes_per_token": per_token,
        "bytes_once": once,
        "bytes": whole,
        "share": whole / bench.token_bytes,
    }


def run_codec(make: Callable[[Bench], Codec]) -> Callable[[Bench, Settings], Row]:
    """A codec of cache_baselines.py, fitted on the calibration windows."""

    def run(bench: Bench, settings: Settings) -> Row:
        codec = make(bench)
        for name, value in settings.items():
            setattr(codec, name, value)
        if type(codec).fit is not Codec.fit:
            if "observed" not in bench.notes:
                bench.notes["observed"] = observed(bench.original, bench.calibration, before_rope=True)
            codec.fit(bench.notes["observed"])
        layers = bench.original.config.num_hidden_layers
        per_token = layers * codec.code_bits(bench.numbers // (2 * layers)) / 8
        with simulated(bench.original, codec):
            scores = bench.scores(bench.plain)
        replaced = codec.exact_tokens() * (bench.token_bytes - per_token)
        return scores | sized(bench, per_token, replaced)

    return run


def run_quantised_cache(bench: Bench, settings: Settings) -> Row:
    """The cache object of transformers itself: every window runs through one, a chunk of tokens at a time."""
    config = copy.deepcopy(bench.original.config)
    if getattr(config, "layer_types", None):  # it refuses sliding windows; no text here is longer than one
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    cache: Any = None

    def through_cache(ids: Tensor) -> Logits:
        nonlocal cache
        cache = QuantizedCache("hqq", config, axis_key=1, axis_value=1, **settings)
        runs = (bench.original(input_ids=part, past_key_values=cache) for part in ids.split(CHUNK, dim=1))
        return Logits.of(torch.cat([run.logits for run in runs], dim=1))

    scores = bench.scores(through_cache)
    coded = waiting = 0
    for layer in cache.layers:
        waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        for codes, meta in (layer._quantized_keys, layer._quantized_values):
            coded += codes.nbytes + 2 * (meta["scale"].numel() + meta["zero"].numel())
    per_token = coded / (bench.protocol.length - waiting)
    exact = settings["residual_length"] / 2  # tokens that wait to be coded, in the mean
    return scores | sized(bench, per_token, exact * (bench.token_bytes - per_token))


def run_steps(*methods: str) -> Callable[[Bench, Settings], Row]:
    """Methods of anymla through its public API; the bytes are those that the live cache measures.

    Settings are those of the one method, or of several by their names.
    """

    def run(bench: Bench, settings: Settings) -> Row:
        out = bench.scratch / "out"
        text = {"calibration": bench.calibration_file, "calibration_tokens": bench.protocol.calibration_tokens}
        named = settings if len(methods) > 1 else {methods[0]: settings}
        steps = [{method: text | named[method]} for method in methods]
        anymla.run(bench.folder, out, steps, overwrite=True, restart=True)
        model = load_model(out, dtype="float32")
        found = measure(model)
        once = found.cache_bytes_once * 2 / model.config.dtype.itemsize  # first tokens count as 16-bit numbers
        return bench.scores(forward_of(model)) | sized(bench, found.cache_bytes_per_token, once)

    return run


def forward_of(model: Any) -> Callable[[Tensor], Logits]:
    return lambda ids: logits_of_pass(model, {"input_ids": ids})


def run_latent(name: str) -> Callable[[Bench, Settings], Row]:
    """A conversion to a latent by peers.py's method ``name``; with ``bits``, static tables on what it caches."""

    def run(bench: Bench, settings: Settings) -> Row:
        share, bits = settings["share"], settings.get("bits", 16)
        size = bench.calibration_size()
        common = {
            "calibration": bench.calibration_file,
            "calibration_tokens": size["tokens"],
            "calibration_length": size["length"],
        }
        out = bench.scratch / f"{name} {share}"
        if out not in bench.notes:
            bench.notes[out] = convert_best(bench.folder, out, METHODS[name], share, common)
        model = load_model(out, dtype="float32")
        numbers = measure(model).numbers_per_layer * bench.original.config.num_hidden_layers
        if bits < 16:
            tables_on_latents(model, bench.calibration, bits)
        exact = FIRST * (16 - bits) / 8 * numbers
        scores = bench.scores(forward_of(model)) | sized(bench, numbers * bits / 8, exact)
        return scores | {"chosen": bench.notes[out]}

    return run


def tables_on_latents(model: Any, calibration: Tensor, bits: int) -> None:
    """Codes latents and rope keys, before they are rotated, by static levels per channel; first tokens stay exact."""
    for layer in decoder_layers(model):
        layer.self_attn.compress = CodedLatent(layer.self_attn, bits)
    with torch.no_grad():
        for window in calibration:
            model.base_model(input_ids=window[None], use_cache=False)
    for layer in decoder_layers(model):
        layer.self_attn.compress.fit()


class CodedLatent:
    """``compress`` of a LatentAttention, with codes for what it gives; until ``fit`` it gathers."""

    def __init__(self, attention: Any, bits: int) -> None:
        self.attention, self.bits, self.plain = attention, bits, attention.compress
        self.samples: list[Tensor] = []
        self.levels: Tensor | None = None

    def fit(self) -> None:
        self.levels, self.samples = levels_of(torch.cat(self.samples), self.bits), []

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        still = torch.ones_like(cos), torch.zeros_like(sin)
        latent, rope_key = self.plain(hidden, *still, *more, **named)
        row = torch.cat([latent, rope_key], dim=-1)
        if self.levels is None:
            self.samples.append(row[:, 0, FIRST:].flatten(0, 1))
        else:
            coded = nearest_level(row, self.levels)
            row = torch.cat([row[:, :, :FIRST], coded[:, :, FIRST:]], dim=2)
        latent, rope_key = row.split([latent.shape[-1], rope_key.shape[-1]], dim=-1)
        pairs = self.attention.channel_frequency
        return latent, multiply_pairs(rope_key, cos[..., pairs], sin[..., pairs])


def _bits(*widths: int) -> dict[str, Settings]:
    return {f"{bits} bits": {"bits": bits} for bits in widths}


def _budgets(**more: Any) -> dict[str, Settings]:
    return {f"{budget:.4g}": {"kv_cache": budget} | more for budget in BUDGETS}


def _tables(*widths: tuple[int, int]) -> dict[str, Settings]:
    return {f"K {keys} V {values}": {"key_bits": keys, "value_bits": values} for keys, values in widths}


def _latents(*kept: tuple[float, int]) -> dict[str, Settings]:
    return {f"{share:.4g} of the numbers at {bits} bits": {"share": share, "bits": bits} for share, bits in kept}


def _coded_mla(method: str, name: str, told: str, *kept: tuple[float, float]) -> dict[str, Settings]:
    """Pairs of a share of the numbers, for the step mla, and what the setting ``name`` of ``method`` is then."""
    return {
        f"{share:.4g} of the numbers, {value:.4g} {told}": {
            "mla": {"kv_cache": share, "reconstruction_steps": 0},  # nothing here is trained
            method: {name: value},
        }
        for share, value in kept
    }


PLAIN_LATENTS = _latents((0.5, 16), (0.25, 16), (0.125, 16))
CODED_LATENTS = _latents((0.75, 5), (0.5, 8), (0.75, 4), (0.5, 4), (0.5, 3), (0.25, 4), (0.25, 2))
PCA_CASES = {
    f"{budget:.4g}, window {recent}": {"bits": 16 * budget, "recent": recent}
    for recent, budget in product((0, 16), BUDGETS)
}
SYSTEMS: dict[str, System] = {
    OURS: System(_budgets(decode_cost="any"), run_steps("transform_coding")),
    OURS_CHEAP: System(_budgets(decode_cost=2.0), run_steps("transform_coding")),
    OURS_MLA: System(
        _coded_mla("transform_coding", "kv_cache", "of the bytes", *product((0.75, 0.5), (0.125, 0.078, 0.25))),
        run_steps("mla", "transform_coding"),
    ),
    OURS_MLA_KVQUANT: System(
        _coded_mla("kvquant", "bits", "bits", *product((0.5,), (8, 4, 3, 2))), run_steps("mla", "kvquant")
    ),
    "KVQuant": System(_bits(4, 3, 2), run_steps("kvquant")),
    "static NUQ tables": System(_tables((8, 8), (4, 4), (3, 3), (2, 2), (2, 1), (1, 1)), run_codec(lambda _: Tables())),
    "KVTC-like": System(PCA_CASES, run_codec(lambda _: PlainPCA())),
    "KIVI-like": System(_bits(4, 3, 2), run_codec(lambda _: Kivi())),
    "Hadamard int per token": System(_bits(8, 4, 3, 2), run_codec(lambda bench: HadamardInt(head_dim=bench.head_dim))),
    "transformers QuantizedCache (HQQ)": System(
        {
            f"{bits} bits, residual {residual}": {"nbits": bits, "residual_length": residual}
            for residual, bits in product((128, 32), (8, 4, 2))
        },
        run_quantised_cache,
    ),
    "CARE": System(PLAIN_LATENTS, run_codec(lambda _: CareLatents(first=0))),
    "CARE + NUQ tables": System(CODED_LATENTS, run_codec(lambda _: CareLatents())),
    "TransMLA": System(PLAIN_LATENTS, run_latent("TransMLA")),
    "TransMLA + NUQ tables": System(_latents((0.5, 8), (0.5, 4), (0.5, 2)), run_latent("TransMLA")),
    "MHA2MLA": System(PLAIN_LATENTS, run_latent("MHA2MLA")),
    "MHA2MLA + NUQ tables": System(_latents((0.5, 8), (0.5, 4), (0.5, 2)), run_latent("MHA2MLA")),
}


def measured(name: str, bench: Bench, settings: Settings) -> Row:
    """A row, or why there is none."""
    try:
        return SYSTEMS[name].run(bench, settings)
    except InfeasibleError as error:
        return {"infeasible": str(error)}
