"""What a window of exact keys and values beside the latent brings, and what it costs in contexts of several lengths.

    python benchmarks/window.py MODEL --text train.jsonl.xz --held-out valid.jsonl.xz
    python benchmarks/window.py --speed                       time of one attention with a window, over one without

Scored in contexts of --length tokens; bytes, those of the window included, are given for contexts of that length and of
4096 tokens, as a share of the original's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fidelity import Protocol, held_out_windows
from rich.console import Console
from testbed.corpus import sample
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import anymla
from anymla.evaluation.scores import score_model
from anymla.io.checkpoint import load_model
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.latent_spec import LatentSpec
from anymla.modeling.modeling_anymla import attention_class
from anymla.modeling.spec import LayerSpec
from anymla.report.tables import table

LONG = 4096
CASES = ((0.25, 0), (0.125, 0), (0.125, 16), (0.125, 64), (0.0625, 64))  # latent, window


SPEC = AttentionSpec(num_heads=16, num_kv_heads=16, head_dim=64, rope_pairs=32, scaling=0.125)


def attention(window: int) -> Any:
    """One attention with random weights: hidden 1024, 16 heads of 64."""
    config = LlamaConfig(hidden_size=1024, num_attention_heads=16, head_dim=64, attn_implementation="sdpa")
    latent = LatentSpec(kv_lora_rank=192, qk_rope_head_dim=64, exact_window=window)  # an eighth of the cache
    spec = LayerSpec(attention=SPEC, latent=latent)
    return attention_class(spec)(LlamaAttention(config, 0), config, spec)


def seconds(run: Callable[[], Any]) -> float:
    """The median of a few runs."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return median(times[2:])


def prefill(made: Any, length: int, *, gradient: bool) -> float:
    """Seconds of a pass over ``length`` tokens without a cache."""
    hidden, angles = torch.randn(1, length, 1024), torch.randn(1, length, 64)

    def run() -> None:
        with torch.set_grad_enabled(gradient):
            output, _ = made(hidden, position_embeddings=(angles.cos(), angles.sin()))
            if gradient:
                output.square().sum().backward()

    return seconds(run)


def decode(made: Any, length: int) -> float:
    """Seconds of a step behind ``length`` cached tokens, the copy that DynamicCache makes included."""
    hidden, angles, cache = torch.randn(1, length, 1024), torch.randn(1, length, 64), DynamicCache()
    rope = angles.cos(), angles.sin()
    with torch.no_grad():
        for part in torch.arange(length).split(2048):
            made(hidden[:, part], position_embeddings=tuple(each[:, part] for each in rope), past_key_values=cache)
        step = {"position_embeddings": tuple(each[:, :1] for each in rope), "past_key_values": cache}
        return seconds(lambda: made(hidden[:, :1], **step))


def show_speed() -> None:
    """Prints what a window of 64 tokens costs in time."""
    plain, windowed = attention(0), attention(64)
    cases = [("prefill", partial(prefill, gradient=False), length) for length in (256, 1024, 4096)]
    cases += [("with gradient", partial(prefill, gradient=True), length) for length in (256, 1024, 4096)]
    cases += [("decode step", decode, length) for length in (1024, 32768)]
    rows = []
    for name, run, length in cases:
        times = [run(made, length) for made in (plain, windowed)]
        rows.append((name, str(length), *(f"{1000 * each:.1f}" for each in times), f"{times[1] / times[0]:.2f}"))
    columns = ("what", "tokens", "ms without", "ms with a window of 64", "ratio")
    Console(width=100, highlight=False).print(
        table("One attention, hidden 1024, 16 heads of 64, float32", columns, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--held-out", nargs="+")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24576)
    options = parser.parse_args()
    if options.speed:
        return show_speed()
    if not (options.model and options.text and options.held_out):
        parser.error("give MODEL, --text and --held-out, or --speed")
    original, rows = load_model(options.model), []
    sizes = (32768, options.length, options.tokens, options.length)
    protocol = Protocol(tuple(options.text), tuple(options.held_out), *sizes)
    windows = held_out_windows(options.model, protocol)
    whole = score_model(original, windows)
    with tempfile.TemporaryDirectory() as scratch:
        out, text = Path(scratch) / "out", sample(map(Path, protocol.text), Path(scratch) / "calibration.jsonl")
        common = {"calibration": text, "calibration_length": options.length, "overwrite": True}
        for share, window in CASES:
            anymla.convert(options.model, out, kv_cache=share, exact_window=window, **common)
            scores = score_model(load_model(out), windows, original)
            kept = [
                f"{(scores.cache_bytes_per_token + scores.cache_window_bytes / n) / whole.cache_bytes_per_token:.1%}"
                for n in (options.length, LONG)
            ]
            rows.append((f"{share:.4g}", str(window), *kept, f"{scores.perplexity:.2f}", f"{scores.kl:.3f}"))
    columns = ("latent", "window", f"bytes at {options.length}", f"at {LONG}", "perplexity", "KL")
    title = f"{options.model.name} in contexts of {options.length} tokens; the original: {whole.perplexity:.2f}"
    Console(width=100, highlight=False).print(table(title, columns, rows))


if __name__ == "__main__":
    main()
