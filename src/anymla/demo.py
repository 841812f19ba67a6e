"""`anymla demo`: the bundled model at several budgets, the paper's method beside ours at equal measured bytes."""

from __future__ import annotations

import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from anymla.data.text import bundled_text, read_documents, token_windows, tokenize
from anymla.errors import InfeasibleError, OutputError
from anymla.evaluation.generation import continuation
from anymla.evaluation.likelihood import untracked
from anymla.evaluation.scores import Scores, score_model
from anymla.io.checkpoint import load_model, load_tokenizer, new_folder
from anymla.pipeline import convert
from anymla.report.quality_plot import quality_plot
from anymla.report.tables import table

if TYPE_CHECKING:
    from rich.console import Console

    from anymla.evaluation.likelihood import Track

BUDGETS = (0.5, 0.3125, 0.25, 0.125)
KEPT = 0.3125  # the converted model that the demo leaves behind
PAPER = ("high", "low", "uniform", "two-norm")
OURS, WINDOWED = "anymla", "anymla, exact window"
WINDOW, EVALUATION_WINDOWS = 256, 64
FAST: dict[str, Any] = {  # fewer gradient steps than the default: minutes, not a quarter of an hour
    "calibration_tokens": 24576,
    "calibration_length": WINDOW,
    "reconstruction_steps": 99,
}
PAPER_ROPE_DIMS = (2, 4)  # of 8 per head
PAPER_SETTINGS: dict[str, Any] = {
    "factorization": "joint-svd",
    "expected_rotation": False,
    "calibration_tokens": 8192,  # for its 2-norm means and the choice of the width; the SVD looks at weights alone
    "calibration_length": WINDOW,
}
PROMPT = "Once upon a time, there was a little girl named Lily. She"
MARK = "results.json"


def bundled_model() -> Path:
    """The small trained model in the package: stories260K, a Llama with GQA (MIT)."""
    return bundled_text("train").parent / "stories260K"


def run_demo(output: Path, console: Console | None, track: Track = untracked) -> dict[str, Any]:
    """Converts, scores, tells a story and writes ``output``; returns what it wrote to results.json.

    Raises:
        OutputError: ``output`` exists and is not an earlier demo's.
    """
    if output.exists() and not (output / MARK).is_file():
        raise OutputError(f"{output} exists and is not an earlier demo's folder: choose another -o")
    started, source = time.monotonic(), bundled_model()
    original, tokenizer = load_model(source), load_tokenizer(source)
    windows = token_windows(tokenize(read_documents(bundled_text("valid")), tokenizer), WINDOW, "bundled text")[
        :EVALUATION_WINDOWS
    ]
    base = score_model(original, windows, original)
    with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        rows = [
            _row(source, folder, Path(scratch), budget, method, windows, original)
            for budget, method in track(list(product(BUDGETS, (OURS, WINDOWED, *PAPER))), "conversion")
        ]
        converted = load_model(folder / "model")
        stories = {
            name: continuation(model, tokenizer, PROMPT, max_new_tokens=96, do_sample=False)
            for name, model in (("original", original), (f"converted, {KEPT:.4g} of the cache", converted))
        }
        results = {
            "original": base.to_dict(),
            "rows": [_plain(row) for row in rows],
            "stories": stories,
            "seconds": time.monotonic() - started,
        }
        (folder / MARK).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        point = base.cache_bytes_per_token, base.perplexity
        quality_plot(folder / "quality.png", _curves(rows), point, {OURS: "-", WINDOWED: ":"})
        if console is not None:
            _show(console, base, rows, stories, output)
    return results


def _row(
    source: Path, folder: Path, scratch: Path, budget: float, method: str, windows: Any, original: Any
) -> dict[str, Any]:
    """What a method makes of a budget; the kept model goes to folder/model."""
    if method in PAPER:
        scored = _paper_row(source, scratch, budget, method, windows, original)
        return {"budget": budget, "method": method} | scored
    settings: dict[str, Any] = {"kv_cache": budget}
    if method == WINDOWED:
        tokens = round(budget * WINDOW / 2)  # half of the bytes, in contexts as long as those scored
        settings = {"kv_cache": budget - tokens / WINDOW, "exact_window": tokens}
    target = folder / "model" if (budget, method) == (KEPT, OURS) else scratch / OURS
    convert(source, target, overwrite=True, **FAST | settings)
    scores = score_model(load_model(target), windows, original)
    return {"budget": budget, "method": method, "scores": scores} | settings


def _paper_row(
    source: Path, scratch: Path, budget: float, strategy: str, windows: Any, original: Any
) -> dict[str, Any]:
    """The paper's strategy at the number of rotated dims per head that does best on held-out calibration text."""
    widths: dict[int, float] = {}
    for rope_dims in PAPER_ROPE_DIMS:
        settings = PAPER_SETTINGS | {"kv_cache": budget, "rope": strategy, "rope_dims": rope_dims}
        try:
            report = convert(source, scratch / str(rope_dims), overwrite=True, **settings)
        except InfeasibleError as error:
            reason = str(error)
            continue
        widths[rope_dims] = report.after.perplexity
    if not widths:
        return {"infeasible": reason}
    best = min(widths, key=lambda rope_dims: widths[rope_dims])
    return {"rope_dims": best, "scores": score_model(load_model(scratch / str(best)), windows, original)}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"scores": row["scores"].to_dict()} if "scores" in row else row


def _curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "scores" in row:
            curves.setdefault(_name(row), []).append((_bytes(row["scores"]), row["scores"].perplexity))
    return curves


def _name(row: dict[str, Any]) -> str:
    return str(row["method"]) if row["method"] in (OURS, WINDOWED) else f"MHA2MLA, {row['method']}"


def _bytes(score: Scores) -> float:
    """Bytes per token in contexts as long as those scored, the exact window's included."""
    return score.cache_bytes_per_token + score.cache_window_bytes / WINDOW


def _show(console: Console, base: Scores, rows: list[dict[str, Any]], stories: dict[str, str], output: Path) -> None:
    columns = ("method", "cache kept", "bytes/token", "perplexity", "KL", "top-1")
    lines = [("original", "100 %", f"{base.cache_bytes_per_token:g}", f"{base.perplexity:.2f}", "0", "100 %")]
    for row in rows:
        name = _name(row) if row["method"] in (OURS, WINDOWED) else f"  {_name(row)}"
        if "infeasible" in row:
            lines.append((name, f"{row['budget']:.2%}", "-", "too small", "-", "-"))
            continue
        score: Scores = row["scores"]
        kept = _bytes(score) / base.cache_bytes_per_token
        quality = (f"{score.perplexity:.2f}", f"{score.kl:.3f}", f"{score.top1_agreement:.1%}")
        lines.append((name, f"{kept:.2%}", f"{_bytes(score):g}", *quality))
    console.print(
        table(f"stories260K on {base.tokens:,} tokens of TinyStories that calibration did not see", columns, lines)
    )
    console.print(
        "Bytes are measured from the live cache; KL (nats per token) and top-1 agreement are to the original."
    )
    console.print(
        f"Exact window: in these contexts of {WINDOW} tokens half of the bytes are the last tokens' keys and values."
    )
    console.print("anymla: 99 gradient steps per layer; by default there are more, and less is lost.")
    console.print("MHA2MLA: joint SVD, the better of 2 and 4 rotated dims per head on held-out calibration text.")
    for name, story in stories.items():
        console.print(Text.assemble("\n", (name, "bold"), ": ", story))
    console.print(f"\nWrote {output / 'model'}, {output / MARK} and {output / 'quality.png'}.")
    console.print("Next, on your own model:  anymla inspect MODEL  and  anymla convert MODEL -o OUT --kv-cache 0.25")
