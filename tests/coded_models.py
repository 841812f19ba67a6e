"""Tiny models whose caches hold codes, made of stock ones by random bases: what a conversion would have fitted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import anymla
from anymla.architectures.attention import SourceAttention, read_attention
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_model_spec
from anymla.architectures.parts import attention_path
from anymla.model_run.stream import decoder_layers
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.heads import rope_tables
from anymla.modeling.spec import KEY, config_entry
from anymla.register import converted_class, register
from tests.families import save_model
from tests.precision import Exact


def coded_model(
    model: Any, key_basis: str = "own", value_basis: str = "own", bits: int = 16, kind: str = "table", **changes: Any
) -> Any:
    """``model`` with CodedAttention in every layer; with kind "plain" it is the original."""
    register()
    spec = read_model_spec(model.config.to_dict())
    family, layers = FAMILIES[spec.text_model_type], list(spec.layers)
    names = {module: name for name, module in model.named_modules()}
    arguments, states = attention_arguments(model), model.state_dict()
    for index, block in enumerate(decoder_layers(model)):
        if (attention := layers[index].attention) is None:
            continue
        module = block.get_submodule(attention_path(block))
        source = read_attention(module, attention, family, model.config)
        width = attention.num_kv_heads * attention.head_dim
        coding = Coding(bits=((bits, width),), kind=kind)
        turns, scale = turns_of(source, arguments[index], model.config)
        coded = CodedSpec(
            keys=coding, values=coding, key_basis=key_basis, value_basis=value_basis, rope_scale=scale, **changes
        )
        layers[index] = replace(layers[index], attention=source.spec, coded=coded, module=names[module])
        states = {name: tensor for name, tensor in states.items() if not name.startswith(f"{names[module]}.")}
        tensors = coded_tensors(source, coded, index) | {"inv_freq": turns.float().view(torch.int32)}
        for part, norm in source.norms.items():
            tensors |= {f"{part}.{key}": tensor for key, tensor in norm.state_dict().items()}
        states |= {f"{names[module]}.{name}": tensor for name, tensor in tensors.items()}
    fields = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    made = converted_class(type(model).__name__)
    config = made.config_class(**fields, **{KEY: config_entry(tuple(layers))}, architectures=[made.__name__])
    converted = made._from_config(config, dtype=model.dtype, experts_implementation="eager").eval()
    missing, unexpected = converted.load_state_dict(states, strict=False)
    assert not unexpected and all("levels" in name for name in missing), (missing, unexpected)
    if bits < 16 and kind == "table":
        fit_levels(converted, bits)
    return converted


def coded_latent(model: Any, folder: Path, **settings: Any) -> Any:
    """``model`` after the steps mla and kvquant with ``settings``, at half its numbers."""
    text = {"calibration_tokens": 512, "calibration_length": 32}
    steps = [{"mla": {"kv_cache": 0.5, "reconstruction_steps": 0, **text}}, {"kvquant": text | settings}]
    anymla.run(save_model(model, folder / "source"), folder / "out", steps=steps)
    return AutoModelForCausalLM.from_pretrained(folder / "out", experts_implementation="eager").eval()


def coded_tensors(source: SourceAttention, coded: CodedSpec, seed: int) -> dict[str, Tensor]:
    """The tensors of a CodedAttention that computes what ``source`` does, in random bases."""
    w, spec = source.weights, source.spec
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {"q_proj.weight": w.query.flatten(0, 1), "q_proj.bias": w.query_bias.flatten()}
    widths = coded.block_widths(spec)
    sides = (
        ("key", coded.key_basis, widths[0], spec.linear_queries),
        ("value", coded.value_basis, widths[1], spec.linear_values),
    )
    for name, basis, width, linear in sides:
        weight, bias = getattr(w, name).flatten(0, 1), getattr(w, f"{name}_bias").flatten()
        if basis != "own":
            blocks = [
                channel_basis(spec, width, generator) if basis == "channels" else random_matrix(width, generator)
                for _ in range(len(weight) // width)
            ]
            made = torch.block_diag(*blocks)
            mean = torch.randn(len(weight), dtype=torch.float64, generator=generator)
            inverse = torch.cat([torch.linalg.inv(block).T for block in blocks])
            tensors |= {f"{name}_decoder.weight": inverse, f"{name}_decoder.bias": mean}
            if linear:
                weight, bias = made.T @ weight, made.T @ (bias - mean)
            else:
                stacked = torch.cat([block.T for block in blocks])
                tensors |= {f"{name}_encoder.weight": stacked, f"{name}_encoder.bias": -made.T @ mean}
        tensors |= {f"{name[0]}_proj.weight": weight, f"{name[0]}_proj.bias": bias}
    tensors |= {"o_proj.weight": w.output.flatten(1), "o_proj.bias": w.output_bias}
    if coded.key_basis == "channels":
        heads = widths[0] // spec.head_dim
        of_block = torch.arange(spec.rope_pairs).repeat_interleave(heads)
        tensors["channel_index"] = of_block.repeat(spec.num_kv_heads // heads)
    optional = {"gate_proj.weight": w.gate, "gate_proj.bias": w.gate_bias, "sinks": w.sinks, "query_gain": w.query_gain}
    return tensors | {name: tensor for name, tensor in optional.items() if tensor is not None}


def random_matrix(size: int, generator: torch.Generator) -> Tensor:
    """An invertible matrix, far from orthogonal but well conditioned."""
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    orthogonal, _ = torch.linalg.qr(noise)
    return orthogonal + 0.3 * noise / size**0.5


def channel_basis(spec: AttentionSpec, size: int, generator: torch.Generator) -> Tensor:
    """Keys of a block to coefficients: complex maps across heads within a rope pair, any map of dims without rope."""
    heads, pairs = size // spec.head_dim, spec.rope_pairs
    channels, basis = heads * pairs, torch.zeros(size, size, dtype=torch.float64)
    dims = torch.arange(size).view(heads, -1)
    for pair in range(pairs):
        real, imag = dims[:, pair], dims[:, pairs + pair]
        at = torch.arange(pair * heads, (pair + 1) * heads)
        a, b = random_matrix(heads, generator), 0.3 * random_matrix(heads, generator)
        for rows, columns, block in ((real, at, a), (imag, at, -b), (real, at + channels, b), (imag, at + channels, a)):
            basis[rows[:, None], columns] = block
    rest = dims[:, 2 * pairs :].flatten()
    if len(rest):
        basis[rest[:, None], torch.arange(2 * channels, size)] = random_matrix(len(rest), generator)
    return basis


def attention_arguments(model: Any) -> dict[int, dict[str, Any]]:
    """What every layer's attention is called with on tokens at the positions 0 and 1."""
    seen: dict[int, dict[str, Any]] = {}
    hooks = []
    for index, block in enumerate(decoder_layers(model)):
        if (path := attention_path(block)) is None:
            continue

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            seen[index] = kwargs

        hooks.append(block.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    exact = Exact() if model.dtype == torch.float64 else nullcontext()
    with torch.no_grad(), exact:  # the angles to the last digit of a float32
        model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def turns_of(source: SourceAttention, arguments: dict[str, Any], config: Any) -> tuple[Tensor, float]:
    """The angle of every rope pair at position 1, and what rope scales with."""
    like = torch.zeros(1, 2, 1, dtype=torch.float64)
    given = arguments.get("position_embeddings"), arguments.get("position_ids")
    cos, sin = rope_tables(source.spec.rope_table, source.spec.rope_pairs, *given, like, config)
    return torch.atan2(sin, cos)[0, 0, 1], float(torch.hypot(cos, sin).mean()) if cos.numel() else 1.0


@torch.no_grad()
def fit_levels(model: Any, bits: int) -> None:
    """Equally likely levels of what the layers code on some random tokens."""
    from anymla.modeling.coded_attention import CodedAttention

    coded, hooks = [part for part in model.modules() if isinstance(part, CodedAttention)], []
    for part in coded:
        for codec in (part.key_codec, part.value_codec):
            codec.set_tables({bits: torch.linspace(-1, 1, 2**bits).repeat(codec.width, 1)})

            def fit(codec: Any, inputs: tuple[Tensor], bits: int = bits) -> None:
                states = inputs[0].flatten(0, -2)
                places = (torch.arange(2**bits, dtype=states.dtype) + 0.5) / 2**bits
                codec.set_tables({bits: torch.quantile(states, places, dim=0).mT})

            hooks.append(codec.register_forward_pre_hook(fit))
    model(input_ids=torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(5)), use_cache=False)
    for hook in hooks:
        hook.remove()
