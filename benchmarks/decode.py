"""One decode step, original against converted: time, live cache bytes, and the floor that this machine sets.

    python benchmarks/decode.py              attention alone, the whole model, caches of codes; about half an hour
    python benchmarks/decode.py --quick      a few shapes

"coded" has a cache of 8, 4 or 3 bits per number: no rank is cut. Beside it are our latent of 16-bit numbers at 25 %,
and transformers' own QuantizedCache (hqq, 4 bits), where hqq is installed.

The model is random, Llama-shaped: hidden 1024, 8 layers, 16 heads of 64. "original" is the faster of
scaled_dot_product_attention and plain matrix products; both are printed.
floor = max(multiply-adds / rate of such thin products with the cache in memory, cache bytes / copy rate);
in-cache floor: the same with the rate that those products reach when the cache fits the CPU's own caches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import copy_rate, cycle, fastest_of, product_rate
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.utils import is_hqq_available

from anymla.account import measure
from anymla.modeling.absorbed import absorbed_attention
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.coding_spec import CodedSpec, Coding
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.modeling_anymla import AnymlaLlamaConfig, AnymlaLlamaForCausalLM
from anymla.modeling.spec import KEY, LayerSpec, config_entry
from anymla.report.tables import table
from anymla.report.units import size

HEADS, HEAD_DIM, LAYERS, HIDDEN = 16, 64, 8, 1024
ROPE_SHARE = 0.25  # of the cached numbers
CODED_BITS, HQQ = (8, 4, 3), "hqq 4 bits"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def split(kv_heads: int, budget: float) -> tuple[int, int]:
    """(rank, rope dims) of a budget."""
    cached = int(2 * kv_heads * HEAD_DIM * budget)
    rope_dims = int(cached * ROPE_SHARE) // 2 * 2
    return cached - rope_dims, rope_dims


def plain_attention(query, key, value, scaling):
    """Matrix products and a softmax; query heads of a group are rows of one product."""
    batch, heads, new, d = query.shape
    rows = query.reshape(batch, key.shape[1], -1, d) * scaling
    weights = (rows @ key.mT).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).view(batch, heads, new, -1)


def attention_row(
    dtype: torch.dtype, kv_heads: int, budget: float, length: int, batch: int, copied: float
) -> dict[str, Any]:
    """Attention of one layer and one new token: seconds of every way, and the floors."""
    rank, rope_dims = split(kv_heads, budget)
    numbers, kept = 2 * kv_heads * HEAD_DIM, rank + rope_dims

    def random(*shape):
        return torch.randn(shape).to(dtype)

    cache = (batch, kv_heads, length, HEAD_DIM)
    original = cycle(lambda: (random(*cache), random(*cache)), batch * length * numbers * dtype.itemsize)
    shapes = (batch, 1, length, rank), (batch, 1, length, rope_dims)
    latent = cycle(lambda: tuple(random(*shape) for shape in shapes), batch * length * kept * dtype.itemsize)
    query, query_latent, query_rope = (random(batch, HEADS, 1, width) for width in (HEAD_DIM, rank, rope_dims))
    times = fastest_of(
        {
            "sdpa": lambda: scaled_dot_product_attention(query, *original(), enable_gqa=kv_heads < HEADS),
            "plain": lambda: plain_attention(query, *original(), HEAD_DIM**-0.5),
            "absorbed": lambda: absorbed_attention(query_latent, query_rope, *latent(), None, HEAD_DIM**-0.5)[0],
        }
    )
    operations = batch * length * HEADS * (2 * rank + rope_dims)
    moved = batch * length * kept * dtype.itemsize / copied
    floors = {
        name: max(operations / product_rate(HEADS, rank, tokens, dtype, streamed=streamed), moved)
        for name, tokens, streamed in (("floor", length, True), ("in-cache floor", 4096, False))
    }
    return times | floors | {"cache_bytes": [batch * length * n * dtype.itemsize for n in (numbers, kept)]}


def sizes_of(kv_heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """The config of all models."""
    return {
        "vocab_size": 4096,
        "hidden_size": HIDDEN,
        "intermediate_size": 2816,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 65536,
        "dtype": dtype,
    }


def converted(kv_heads: int, dtype: torch.dtype, **cached: Any) -> Any:
    """A converted model with random weights; ``cached``: its layers' latent or coded cache."""
    attention = AttentionSpec(
        num_heads=HEADS, num_kv_heads=kv_heads, head_dim=HEAD_DIM, rope_pairs=HEAD_DIM // 2, scaling=HEAD_DIM**-0.5
    )
    layers = tuple(
        LayerSpec(module=f"model.layers.{index}.self_attn", attention=attention, **cached) for index in range(LAYERS)
    )
    return AnymlaLlamaForCausalLM(
        AnymlaLlamaConfig(
            **sizes_of(kv_heads, dtype),
            **{KEY: config_entry(layers)},
            **({"qk_head_dim": HEAD_DIM + cached["latent"].qk_rope_head_dim} if "latent" in cached else {}),
        )
    ).eval()


def coded_model(kv_heads: int, dtype: torch.dtype, bits: int) -> Any:
    """A model whose cache holds ``bits`` bits per number, keys in channels; levels are the normal's quantiles."""
    width = kv_heads * HEAD_DIM
    coding = Coding(bits=((bits, width),))
    model = converted(kv_heads, dtype, coded=CodedSpec(keys=coding, values=coding, key_basis="channels"))
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float32) + 0.5) / 2**bits).expand(width, -1)
    for layer in model.model.layers:
        part = layer.self_attn
        part.key_codec.set_tables({bits: levels})
        part.value_codec.set_tables({bits: levels})
        angles = 1e4 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float32) / (HEAD_DIM // 2))
        part.inv_freq.copy_(angles.view(torch.int32))
        part.channel_index.copy_(torch.arange(HEAD_DIM // 2).repeat_interleave(kv_heads))
    return model


def make_models(kv_heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """The original with both attentions, and converted models; random weights."""
    AttentionInterface.register("plain", plain_interface)
    sizes = sizes_of(kv_heads, dtype)
    torch.set_default_dtype(dtype)
    models: dict[str, Any] = {
        "sdpa": LlamaForCausalLM(LlamaConfig(**sizes)).eval(),
        "plain": LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="plain")).eval(),
    }
    for budget in (0.25, 0.125):
        rank, rope_dims = split(kv_heads, budget)
        latent = LatentSpec(kv_lora_rank=rank, qk_rope_head_dim=rope_dims)
        models[f"{budget:.1%}"] = converted(kv_heads, dtype, latent=latent)
    torch.set_default_dtype(torch.float32)
    return models


def plain_interface(module, query, key, value, attention_mask, scaling, **kwargs):
    return plain_attention(query, key, value, scaling).transpose(1, 2), None


def step_row(models: dict[str, Any], length: int, batch: int) -> dict[str, Any]:
    """One step of the whole model through a DynamicCache of ``length`` tokens, seconds; and the live cache's bytes."""
    ids, row, sizes = torch.zeros(batch, 1, dtype=torch.long), {}, {}
    for name, model in models.items():
        cache = hqq_cache(model, length, batch) if name == HQQ else filled_cache(model, length, batch)
        sizes[name] = sum(live_bytes(layer) for layer in cache.layers)

        def step(model=model, cache=cache):
            model(input_ids=ids, past_key_values=cache)  # the cache grows by a token, as in use

        row |= fastest_of({name: step}, seconds=1.0, at_least=3)
        del cache
    return row | {"cache_bytes": sizes}


def filled_cache(model: Any, length: int, batch: int) -> DynamicCache:
    """A cache of random tokens in the model's own layout."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "values"):
            like = getattr(layer, name)
            shape = (*like.shape[:2], length, like.shape[-1])
            codes = like.dtype == torch.uint8
            filled = torch.randint(0, 256, shape, dtype=like.dtype) if codes else torch.randn(shape).to(like.dtype)
            setattr(layer, name, filled)
    return cache


def hqq_cache(model: Any, length: int, batch: int) -> QuantizedCache:
    """The same as transformers' own cache of 4 bits: groups of 64, the latest 128 tokens at 16 bits."""
    cache = QuantizedCache("hqq", model.config, nbits=4)
    for layer in cache.layers:
        shape = (batch, model.config.num_key_value_heads, length, HEAD_DIM)
        layer.update(*(torch.randn(shape).to(model.dtype) for _ in range(2)))
    return cache


def live_bytes(layer: Any) -> int:
    """Bytes of what a cache layer holds."""
    held = [layer.keys, layer.values]
    for codes, about in (
        getattr(layer, name) for name in ("_quantized_keys", "_quantized_values") if hasattr(layer, name)
    ):
        held += [codes, *(each for each in about.values() if isinstance(each, torch.Tensor))]
    if (first := getattr(layer, "first", None)) is not None:
        held += [first.keys, first.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def attention_table(shapes: dict[str, list[Any]], console: Console) -> list[dict[str, Any]]:
    """Measures and prints the attention part."""
    copied = copy_rate()
    columns = ("shape", "tokens", "batch", "sdpa ms", "plain ms", "absorbed ms", "original/absorbed", "absorbed/floor")
    lines, rows = [], []
    for dtype in shapes["dtype"]:
        for kv_heads in shapes["kv_heads"]:
            for budget in (0.25, 0.125):
                for length in shapes["length"]:
                    for batch in shapes["batch"]:
                        row = attention_row(DTYPES[dtype], kv_heads, budget, length, batch, copied)
                        name = f"{dtype}, {HEADS}:{kv_heads} heads, {budget:.1%}"
                        rows.append({"shape": name, "length": length, "batch": batch, **row})
                        times = [f"{row[key] * 1e3:.2f}" for key in ("sdpa", "plain", "absorbed")]
                        ratio = min(row["sdpa"], row["plain"]) / row["absorbed"]
                        floors = [row["absorbed"] / row[key] for key in ("floor", "in-cache floor")]
                        lines.append(
                            (name, length, batch, *times, f"{ratio:.2f}", *(f"{floor:.2f}" for floor in floors))
                        )
                        console.print(f"measured {name}, {length} tokens, batch {batch}", style="dim")
    console.print(table("Attention of one layer, one new token", (*columns, "absorbed/in-cache floor"), lines))
    return rows


def step_table(shapes: dict[str, list[Any]], console: Console) -> list[dict[str, Any]]:
    """Measures and prints the whole model's step."""
    lines, rows = [], []
    for dtype in shapes["dtype"]:
        for kv_heads in shapes["kv_heads"]:
            models = make_models(kv_heads, DTYPES[dtype])
            per_token = {name: measure(model).cache_bytes_per_token for name, model in models.items()}
            for length in shapes["length"]:
                for batch in shapes["batch"]:
                    row = step_row(models, length, batch)
                    rows.append({"dtype": dtype, "kv_heads": kv_heads, "length": length, "batch": batch, **row})
                    best = min(row["sdpa"], row["plain"])
                    for budget in ("25.0%", "12.5%"):
                        whole, part = row["cache_bytes"]["sdpa"], row["cache_bytes"][budget]
                        lines.append(
                            (
                                f"{dtype}, {HEADS}:{kv_heads} heads, {budget}",
                                length,
                                batch,
                                *(f"{row[name] * 1e3:.1f}" for name in ("sdpa", "plain", budget)),
                                f"{best / row[budget]:.2f}",
                                size(per_token[budget]),
                                f"{size(whole)} -> {size(part)} ({part / whole:.1%})",
                            )
                        )
                    console.print(f"measured {dtype}, {kv_heads} KV heads, {length} tokens, batch {batch}", style="dim")
            del models
    columns = (
        "model",
        "tokens",
        "batch",
        "sdpa ms",
        "plain ms",
        "converted ms",
        "original/converted",
        "per token",
        "live cache",
    )
    console.print(table("One decode step of the whole model (stock DynamicCache)", columns, lines))
    return rows


def coded_table(shapes: dict[str, list[Any]], console: Console) -> list[dict[str, Any]]:
    """Measures and prints the whole model's step with caches of codes."""
    lines, rows = [], []
    for dtype in shapes["dtype"]:
        for kv_heads in shapes["kv_heads"]:
            models = make_models(kv_heads, DTYPES[dtype])
            models = {name: models[name] for name in ("sdpa", "plain", "25.0%")}
            torch.set_default_dtype(DTYPES[dtype])
            models |= {f"{bits} bits": coded_model(kv_heads, DTYPES[dtype], bits) for bits in CODED_BITS}
            torch.set_default_dtype(torch.float32)
            if is_hqq_available():
                models[HQQ] = models["sdpa"]
            for length in shapes["length"]:
                for batch in shapes["batch"]:
                    row = step_row(models, length, batch)
                    rows.append({"dtype": dtype, "kv_heads": kv_heads, "length": length, "batch": batch, **row})
                    best, whole = min(row["sdpa"], row["plain"]), row["cache_bytes"]["sdpa"]
                    for name in [*models][2:]:
                        part = row["cache_bytes"][name]
                        shape = f"{dtype}, {HEADS}:{kv_heads} heads, {name}"
                        times = (f"{best * 1e3:.1f}", f"{row[name] * 1e3:.1f}", f"{best / row[name]:.2f}")
                        lines.append((shape, length, batch, *times, f"{size(part)} ({part / whole:.1%})"))
                        console.print(*lines[-1], style="dim")
            del models
    columns = ("model", "tokens", "batch", "original ms", "ms", "original/this", "live cache")
    console.print(table("One decode step with a cache of codes", columns, lines))
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--part", choices=("attention", "step", "coded", "all"), default="all")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args()
    shapes: dict[str, list[Any]] = {
        "dtype": list(DTYPES),
        "kv_heads": [16, 4],
        "length": [1024, 4096, 8192, 32768],
        "batch": [1, 4],
    }
    if options.quick:
        shapes |= {"length": [1024, 32768], "batch": [1]}
    console, results = Console(width=160, highlight=False), {}
    for name, measured in (("attention", attention_table), ("step", step_table), ("coded", coded_table)):
        if options.part in (name, "all"):
            results[name] = measured(shapes, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
