"""Quality of every method at equal cached bytes, on trained models: a table, a plot, and the rows as JSON.

    python benchmarks/fidelity.py                                the bundled stories260K
    python benchmarks/fidelity.py MODEL... --text train.jsonl.xz --held-out valid.jsonl.xz
    python benchmarks/fidelity.py --sensitivity                  the default under other text, without its parts, probed

MODEL is a checkpoint folder, or a folder of such. Text that is not given is looked for beside each model, as
``train`` and ``valid`` with .txt, .jsonl or .jsonl.xz. Each row is measured in a process of its own and written at
once; what the JSON file already holds is not measured again (``--again`` forgets it). Settings of a method, among those
of peers.py, are chosen by perplexity on calibration text that was not fitted on; held-out text only gives the scores.
Writes OUT/fidelity.json, OUT/fidelity.md and OUT/images/fidelity.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from care import filled_plan, input_grams, without_partial_rope
from page import plot, write_page
from peers import METHODS, Method, Settings
from sensitivity import cases
from testbed.corpus import documents, domains, sample

import anymla
from anymla.data.text import bundled_text, calibration_windows, text_windows
from anymla.demo import bundled_model
from anymla.errors import InfeasibleError
from anymla.evaluation.benchmarks import Benchmarks
from anymla.evaluation.scores import score_model
from anymla.io.checkpoint import load_model, load_tokenizer
from anymla.io.device import peak_rss
from anymla.sweep.layer import CalibrationSplit

BUDGETS = (0.5, 0.3125, 0.25, 0.125, 0.0625)
CHOICE_TOKENS = 4096  # calibration text on which settings are tried


@dataclass(frozen=True)
class Protocol:
    """Text and sizes of one measurement; a row is measured again where any of them differs."""

    text: tuple[str, ...]
    held_out: tuple[str, ...]
    calibration_tokens: int
    calibration_length: int
    tokens: int
    length: int
    domain: str = ""
    held_out_domain: str = ""
    probe: int = 0  # tokens of the longest probe, 0 for none


def convert_best(model: Path, out: Path, method: Method, budget: float, common: Settings) -> Settings:
    """Converts with those settings of ``method`` that do best on calibration text; returns them.

    Raises:
        InfeasibleError: none of them fits the budget.
    """
    spec = next(iter(anymla.inspect(model).model_spec.attention_layers.values()))
    candidates = method.settings(spec, int(spec.cached_numbers * budget + 1e-9))
    if not candidates:
        raise InfeasibleError("no number of rotated dims fits")

    def best_of(choices: list[Settings]) -> Settings:
        if len(choices) == 1:
            return choices[0]
        few, tried = common | {"calibration_tokens": CHOICE_TOKENS}, []
        for settings in choices:
            report = anymla.convert(model, out, planned(model, few | settings, budget), overwrite=True)
            tried.append(report.after.perplexity)
        return choices[tried.index(min(tried))]

    best = best_of(candidates)
    best = best_of([best, *(best | changes for changes in method.changes)])
    anymla.convert(model, out, planned(model, common | best, budget), overwrite=True)
    return best


def planned(model: Path, settings: Settings, budget: float) -> anymla.MLAPlan:
    """The plan of ``settings``; with ``filled``, of CARE's ranks, which differ between layers."""
    recipe = {name: value for name, value in settings.items() if name != "filled"}
    plan = anymla.plan(model, **{"kv_cache": budget} | recipe)
    if not settings.get("filled"):
        return plan
    original = load_model(model)
    return filled_plan(plan, original, input_grams(original, _calibration(model, recipe)))


def _calibration(model: Path, settings: Settings) -> torch.Tensor:
    tokens, length = settings["calibration_tokens"], settings["calibration_length"]
    return calibration_windows(settings["calibration"], load_tokenizer(model), tokens=tokens, length=length, seed=0)


def held_out_windows(model: Path, protocol: Protocol) -> torch.Tensor:
    """Windows [N,T] to score on: a text's first; where it has several domains, some from all over it."""
    paths, length = [Path(path) for path in protocol.held_out], protocol.length
    texts, tokens = documents(paths, protocol.held_out_domain), None if domains(paths) else protocol.tokens
    windows = text_windows(texts, load_tokenizer(model), paths[0], length=length, tokens=tokens)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[: protocol.tokens // length]
    return windows[chosen] if domains(paths) else windows


def measure(model: Path, protocol: Protocol, name: str, budget: float, settings: Settings) -> dict[str, Any]:
    """One row: converts and scores. ``settings`` are put on top of the method's own."""
    method, started = METHODS[name], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        common: Settings = {
            "calibration": sample(map(Path, protocol.text), Path(scratch) / "calibration.jsonl", protocol.domain),
            "calibration_tokens": protocol.calibration_tokens,
            "calibration_length": protocol.calibration_length,
        } | settings
        if method.window:  # equal bytes in contexts as long as those that are scored
            tokens = round(budget * method.window * protocol.length)
            common |= {"exact_window": tokens, "kv_cache": budget - tokens / protocol.length}
        original, windows, out = load_model(model), held_out_windows(model, protocol), Path(scratch) / "out"
        if method.rebuilds:
            scores = score_rebuilt(model, original, windows, budget, common)
        else:
            try:
                chosen = convert_best(model, out, method, budget, common)
            except InfeasibleError as error:
                return {"infeasible": str(error)}
            scores = asdict(score_model(load_model(out), windows, original)) | {"settings": chosen}
            scores["cache_bytes_per_token"] += scores["cache_window_bytes"] / protocol.length
            if method.window:
                scores["settings"] = {"exact_window": f"{tokens} tokens"}
            if protocol.probe:
                scores["probe"] = probe(out, model, protocol.probe)
    return scores | {
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss(),
        "original": asdict(score_model(original, windows)),
    }


def probe(converted: Path, model: Path, length: int) -> list[dict[str, Any]]:
    """What both find again in contexts of ``length`` tokens, its half, ...: copied rows, passages, a needle."""
    found = anymla.evaluate(converted, against=model, benchmarks=Benchmarks(probe=True), length=length)
    return [row.to_dict() for row in found.benchmarks["probe"]]


def score_rebuilt(model: Path, original: Any, windows: torch.Tensor, budget: float, common: Settings) -> dict[str, Any]:
    """CARE before partial rope; the bytes are those of its latents, counted, since no cache of anymla's holds them."""
    size, calibration = score_model(original, windows[:1]), _calibration(model, common)
    layers, split = original.config.num_hidden_layers, CalibrationSplit.of(len(calibration))
    numbers = int(size.cache_numbers_per_token_per_layer * budget + 1e-9) * layers
    grams = input_grams(original, calibration[split.fit])
    tried = {filled: load_model(model) for filled in (False, True)}
    for filled, changed in tried.items():
        without_partial_rope(changed, grams, numbers, filled=filled)
    best = min(tried, key=lambda filled: score_model(tried[filled], calibration[split.choice]).perplexity)
    each = size.cache_bytes_per_token / (size.cache_numbers_per_token_per_layer * layers)
    counted = {"cache_bytes_per_token": numbers * each, "cache_numbers_per_token_per_layer": numbers / layers}
    scores = asdict(score_model(tried[best], windows, original))
    return scores | counted | {"settings": {"filled": True} if best else {}}


class Rows:
    """The measured rows and the file that holds them."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = [] if again or not path.is_file() else json.loads(path.read_text())

    def add(self, key: dict[str, Any], *job: Any) -> None:
        """Measures what ``key`` names, in a fresh process, unless it is there."""
        if self.has(key):
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            row = key | pool.submit(measure, *job).result()
        self.keep({}, row)
        print({name: row.get(name) for name in ("model", "method", "case", "budget", "perplexity", "kl")}, flush=True)

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a row is what ``key`` names."""
        key = json.loads(json.dumps(key))  # lists for tuples, as in the file
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def keep(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        """Writes ``row`` with ``key``, where that is not empty in place of the rows that it names."""
        others = [row for row in self.rows if not key or any(row.get(name) != key[name] for name in key)]
        self.rows = [*others, key | row]
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(partial, self.path)


def find_models(folders: list[Path]) -> list[Path]:
    """The checkpoint folders among ``folders`` and inside them."""
    found = [folder for given in folders for folder in (given, *sorted(given.glob("*")))]
    return [folder for folder in found if (folder / "config.json").is_file()]


def text_of(model: Path, given: list[Path] | None, name: str) -> tuple[str, ...]:
    """The text files of a split, 'train' or 'valid': as given, bundled, or beside the model."""
    if given:
        return tuple(str(path) for path in given)
    if model == bundled_model():
        return (str(bundled_text(name)),)
    beside = [place / f"{name}{end}" for place in (model, model.parent) for end in (".txt", ".jsonl", ".jsonl.xz")]
    found = next((path for path in beside if path.is_file()), None)
    if found is None:
        sys.exit(f"{model}: no {name} text beside it; give --text and --held-out")
    return (str(found),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", default=[bundled_model()])
    parser.add_argument("-o", "--out", type=Path, default=Path("docs"))
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--held-out", type=Path, nargs="+")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=24576, help="held-out tokens to score on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "fidelity.json", options.again)
    for model in find_models(options.models):
        texts = (text_of(model, options.text, "train"), text_of(model, options.held_out, "valid"))
        sizes = (options.calibration_tokens, options.length, options.tokens, options.length)
        protocol = Protocol(*texts, *sizes)
        jobs = [
            ({"case": None, "method": name, "budget": budget}, protocol, {})
            for budget in options.budgets
            for name in options.methods
        ]
        if options.sensitivity:
            jobs = cases(protocol, anymla.inspect(model).model_spec.max_position_embeddings, options.budgets)
        for named, changed, settings in jobs:
            short = asdict(changed) | {
                side: [Path(path).name for path in getattr(changed, side)] for side in ("text", "held_out")
            }
            rows.add(
                {"model": model.name, **named, "protocol": short},
                model,
                changed,
                named["method"],
                named["budget"],
                settings,
            )
    write_page(options.out / "fidelity.md", rows.rows, METHODS)
    plot(options.out / "images" / "fidelity.png", rows.rows, METHODS)


if __name__ == "__main__":
    main()
