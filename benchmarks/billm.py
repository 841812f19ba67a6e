"""What weights in under three bits cost: the step `billm` and parts of it, beside integers of 2, 3 and 4 bits.

python benchmarks/billm.py [MODEL] --text TEXT --held-out TEXT [--tokens 8192] [--only billm ...]

Bits are those that are stored, of all linears in the decoder layers: planes and scales, or integers with a scale, and
for RTN a zero, of 16 bits per group. The steps `gptq` and `hqq` give keys and values four bits at least. KL is in nats
per token, to the original, on text that calibration did not see. MODEL is a folder, or the name of a real model that
comes as a Python package; default: the bundled one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from testbed.corpus import sample
from torch import Tensor, nn

import anymla
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.evaluation.evaluate import evaluate
from anymla.io.checkpoint import load_model, load_tokenizer
from anymla.io.real_models import real_model
from anymla.model_run.stream import decoder_layers
from anymla.run_outcome import packed_bits

BILLM: dict[str, dict[str, Any]] = {
    "billm": {},
    "billm, levels own": {"levels": "own"},
    "billm, blocks of 64": {"block_size": 64},
    "billm, no split": {"split": False},
    "billm, no salient columns": {"most_salient": 0},
    "billm, columns": {"compensation": "columns"},
    "billm, centred levels": {"levels": "centred"},
    "billm, as the authors' code": {"levels": "centred", "compensation": "columns", "search_on": "saliency"},
    "billm, no compensation": {"compensation": "none"},
    "block signs alone": {"split": False, "most_salient": 0, "compensation": "none"},
}
GROUPS = ((2, 32), *((bits, group) for bits in (2, 3, 4) for group in (64, 128)))
RTN = {f"RTN {bits} bit, groups of {group}": (bits, group) for bits, group in GROUPS}

STEPS: dict[str, dict[str, Any]] = {
    f"{name} {bits} bit, groups of 64": {name: {"bits": bits, "group": 64}}
    for bits in (2, 3)
    for name in ("hqq", "gptq")
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(bundled_model()))
    parser.add_argument("--text", default=str(bundled_text("train")))
    parser.add_argument("--held-out", nargs="+", default=[str(bundled_text("valid"))])
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--length", type=int, default=512, help="of a calibration window")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", default=[*BILLM, *STEPS, *RTN])
    return parser.parse_args()


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """``weight`` [O,I] in integers of so many bits, from the least to the largest of each group of columns."""
    parts = []
    for part in weight.double().split(group, dim=1):
        least, largest = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((largest - least) / (2**bits - 1)).clamp_min(1e-12)
        parts.append(((part - least) / step).round() * step + least)
    return torch.cat(parts, 1).to(weight.dtype)


def write_rounded(model: str, output: Path, bits: int, group: int) -> float:
    """Writes ``model`` with its layers' linears rounded; returns the bits per weight that it would be stored in."""
    loaded, stored, weights = load_model(Path(model)), 0, 0
    for module in decoder_layers(loaded).modules():
        if isinstance(module, nn.Linear):
            out, into = module.weight.shape
            module.weight.data = rounded(module.weight.data, bits, group)
            weights += out * into
            stored += bits * out * into + 32 * out * -(-into // group)
    loaded.save_pretrained(output)
    load_tokenizer(Path(model)).save_pretrained(output)
    return stored / weights


def row(name: str, model: str, text: dict[str, Any], held_out: list[str], tokens: int) -> str:
    """A row of the table: the model with weights as ``name`` says."""
    with tempfile.TemporaryDirectory() as scratch:
        output, began = Path(scratch) / "out", time.monotonic()
        if name in BILLM:
            anymla.run(model, output, steps=[{"billm": BILLM[name] | text}])
            bits = packed_bits(output) or 16
        elif name in STEPS:
            [(step, settings)] = STEPS[name].items()
            anymla.run(model, output, steps=[{step: settings | (text if step == "gptq" else {})}])
            bits = packed_bits(output) or 16
        else:
            bits = write_rounded(model, output, *RTN[name])
        minutes = (time.monotonic() - began) / 60
        found = [evaluate(output, each, model, tokens=tokens) for each in held_out]
    cells = " | ".join(f"{scores.perplexity:.2f} | {scores.kl:.3f}" for scores in found)
    return f"| {name} | {bits:.2f} | {cells} | {minutes:.1f} |"


def main() -> None:
    """Prints a table in Markdown, a row as soon as it is there."""
    given = arguments()
    model = given.model if Path(given.model).is_dir() else str(real_model(given.model))
    with tempfile.TemporaryDirectory() as scratch:
        texts = [Path(each) for each in (given.text, *given.held_out)]
        plain = [sample([path], Path(scratch) / f"{number}.jsonl") for number, path in enumerate(texts)]
        text = {"calibration": plain[0], "calibration_tokens": given.tokens, "calibration_length": given.length}
        whole = [evaluate(model, each, tokens=given.eval_tokens) for each in plain[1:]]
        names = " | ".join(f"perplexity, {path.parent.name}/{path.name} | KL" for path in texts[1:])
        print(f"| weights | bits per weight | {names} | minutes |")
        print("|---|---:|", "---:|---:|" * len(whole), "---:|", sep="")
        scores = " | ".join(f"{each.perplexity:.2f} | 0" for each in whole)
        print(f"| original | 16 | {scores} | |", flush=True)
        for name in given.only:
            print(row(name, model, text, plain[1:], given.eval_tokens), flush=True)


if __name__ == "__main__":
    main()
