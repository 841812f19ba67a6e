"""Converts a tiny model of a family and compares it with the original: what the support table is made of."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_model_spec
from anymla.exports.vllm.writer import REFUSED
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.spec import ModelSpec
from tests.families import converted_layers, save_model, token_ids
from tests.family_models import tiny_model
from tests.precision import Exact

FAST = {"calibration_tokens": 512, "calibration_length": 32, "reconstruction_steps": 2}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
PROMPT, LENGTH, PADDING = 30, 36, 7


@dataclass(frozen=True)
class Row:
    """One line of the support table: the largest difference of logits in either dtype, over every way of running."""

    name: str
    features: str
    layers: str
    errors: dict[torch.dtype, float]


def check_family(name: str, model_type: str, changes: dict[str, Any], folder: Path) -> Row:
    """The identity at full budget in float64 and float32, and half the cache; fails where one of them does."""
    errors = {}
    for dtype in TOLERANCE:
        model = tiny_model(model_type, dtype, **changes)
        source = save_model(model, folder / f"{dtype}".removeprefix("torch."))
        with Exact() if dtype == torch.float64 else nullcontext():
            errors[dtype] = full_budget_error(source, folder / f"full-{source.name}")
    with Exact():
        half_budget(folder / "float64", folder / "half")
    config = load(folder / "half").config
    model_spec = read_model_spec(tiny_model(model_type, **changes).config.to_dict())
    specs = converted_layers(config)
    beyond = {name for name in REFUSED for layer in specs if getattr(layer.attention, name)}
    assert bool(beyond) == (model_spec.beyond is not None), (beyond, model_spec.beyond)
    converted, layers = len(specs), len(model_spec.layers)
    kept = "" if converted == layers else f", {layers - converted} kept"
    return Row(
        name, describe(model_spec, [layer.parts[0] for layer in specs]), f"{converted} of {layers}{kept}", errors
    )


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, in the dtype it has."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()


def full_budget_error(source: Path, output: Path) -> float:
    """Largest difference of logits: whole prompt, cached decode, and both with a left-padded batch."""
    anymla.convert(source, output, kv_cache=1.0, **FAST)
    converted = load(output)
    capped = any(layer.attention.softcap for layer in converted_layers(converted.config))
    original = load(source, **{"attn_implementation": "eager"} if capped else {})  # older transformers' sdpa drops it
    assert converted.dtype == original.dtype
    worst = 0.0
    for run in (prefill, decode, padded_decode):
        expected = run(original)
        assert expected.std() > 0.05  # a model whose logits say nothing would pass any test
        worst = max(worst, (run(converted) - expected).abs().max().item())
    return worst


def half_budget(source: Path, output: Path) -> None:
    """Half the cache: it holds what the plan says, decodes as it prefills, and survives save and load."""
    plan = anymla.plan(source, kv_cache=0.5)
    anymla.convert(source, output, kv_cache=0.5, **FAST)
    converted = load(output)
    cache = converted(input_ids=token_ids()[:, :8], use_cache=True).past_key_values
    for index, planned in enumerate(plan.layers):
        if planned is not None:
            layer = cache.layers[index]
            numbers = (layer.keys.numel() + layer.values.numel()) / (2 * layer.keys.shape[-2])
            assert numbers == planned.cached_numbers
    own = (decode(load(source)) - prefill(load(source))).abs().max().item()  # some families differ by themselves
    assert (decode(converted) - prefill(converted)).abs().max().item() <= max(1e-9, 10 * own)
    converted.save_pretrained(output.with_name("again"))
    again = load(output.with_name("again"))
    assert all(
        torch.equal(*each) for each in zip(again.state_dict().values(), converted.state_dict().values(), strict=True)
    )
    assert (prefill(again) - prefill(converted)).abs().max() < 1e-12  # products may round by where their tensors lie


@torch.no_grad()
def prefill(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids(length=LENGTH), use_cache=False).logits


@torch.no_grad()
def decode(model: Any, **inputs: Any) -> torch.Tensor:
    """A prompt, then token by token from the cache."""
    ids = token_ids(length=LENGTH)
    output = model(input_ids=ids[:, :PROMPT], use_cache=True)
    logits = [output.logits]
    for index in range(PROMPT, LENGTH):
        step = ids[:, index : index + 1]
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def padded_decode(model: Any) -> torch.Tensor:
    """The second of two sequences is shorter and padded on its left; then one token from the cache."""
    ids, mask = token_ids(length=LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    output = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
    return torch.cat([output.logits[1, PADDING:], output.logits[0], step.logits.flatten(0, 1)])


def describe(model_spec: ModelSpec, layers: list[AttentionSpec]) -> str:
    """What is special about a family's attention, in the order of the computation."""
    family, specs = FAMILIES[model_spec.model_type], list(model_spec.attention_layers.values())
    first, rotated = specs[0], sum(spec.rope_pairs > 0 for spec in specs)
    named = {name for layer in layers for name, value in vars(layer).items() if value}
    grouping = "MHA" if first.num_kv_heads == first.num_heads else "MQA" if first.num_kv_heads == 1 else "GQA"
    facts = {
        grouping: True,
        "biases": first.qkv_bias,
        "clipped QKV": "clip" in named,
        "QK-norm over the width": any(layer.norm_over == "width" for layer in layers),
        "QK-norm after rope": family.norm_after_rope,
        "QK-norm": "norms" in named and not family.norm_after_rope and layers[0].norm_over != "width",
        "no rope": rotated == 0,
        "rope in some layers": 0 < rotated < len(specs),
        "partial rope": any(0 < 2 * spec.rope_pairs < spec.head_dim for spec in specs),
        "interleaved rope": rotated > 0 and family.rope == "interleaved",
        "query temperature": "temperature" in named,
        "ALiBi": any("alibi" in str(layer.position_bias) or layer.position_bias == "mpt" for layer in layers),
        "sliding window": any(spec.sliding_window for spec in specs) or "local_window" in named,
        "soft-cap": "softcap" in named,
        "sinks": "sinks" in named,
        "gated output": "gate" in named,
        "normed output": "output_norm" in named,
    }
    return ", ".join(name for name, has in facts.items() if has)
