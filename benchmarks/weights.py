"""Quality at the true bits of a weight: every step that packs weights, on a real model.

python benchmarks/weights.py SmolLM2-135M-Instruct --text wikitext.txt   # or a folder
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.text import read_documents
from anymla.io.checkpoint import load_tokenizer
from anymla.io.real_models import PACKAGES, real_model
from anymla.io.safetensors import read_header

STEPS = [f"{name} {bits}" for bits in (8, 4, 3, 2) for name in ("rtn", "hqq", "gptq")] + [
    f"gptq {bits} largest" for bits in (4, 3, 2)
]


def log_probs(model: Any, windows: Tensor) -> Tensor:
    """Log-probabilities [N,T,V] of the next tokens of ``windows`` [N,T]."""
    with torch.no_grad():
        return torch.cat([model(input_ids=window[None]).logits.float().log_softmax(-1) for window in windows])


def true_bits(folder: Path) -> float:
    """Bits per weight of the packed layers, with all that is stored beside them."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in read_header(file).items()}
    packed = [name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")]
    sizes = sum(stored[f"{name}{part}"].size for name in packed for part in ("_packed", "_scale", "_shape"))
    numbers = 0
    for name in packed:
        rows, columns = stored[f"{name}_shape"].read().tolist()
        numbers += rows * columns
    return 8 * sizes / numbers


def given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct", help="one of these, or a folder")
    parser.add_argument("--text", required=True, help="to score on")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration", help="text for gptq. Default: the bundled stories")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=STEPS, help="as 'gptq 4', or 'gptq 4 largest' for its scales")
    return parser.parse_args()


def main() -> None:
    options = given()
    source = real_model(options.model) if options.model in PACKAGES else Path(options.model)
    ids = load_tokenizer(source)("\n\n".join(read_documents(options.text)), return_tensors="pt").input_ids[0]
    windows = ids[: options.tokens].reshape(-1, 512)

    def scores(folder: Path, original: Tensor | None) -> tuple[Tensor, float, float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = log_probs(model, windows)
        loss = -found[:, :-1].gather(-1, windows[:, 1:, None]).mean().item()
        kl = 0.0 if original is None else (original.exp() * (original - found)).sum(-1).mean().item()
        return found, float(torch.tensor(loss).exp()), kl

    original, perplexity, _ = scores(source, None)
    print("| step | bits | true bits per weight | all weights, MB | KL, nats | perplexity | seconds |")
    print("|---|---|---|---|---|---|---|")
    print(f"| original | 16 | 16 | | 0 | {perplexity:.2f} | |", flush=True)
    for name, bits, *scales in (step.split() for step in options.only):
        settings: dict[str, Any] = {"bits": int(bits), "group": options.group}
        if name == "gptq":
            settings |= {
                "calibration": options.calibration,
                "calibration_tokens": options.calibration_tokens,
                "scales": (*scales, "hqq")[0],
            }
        with tempfile.TemporaryDirectory() as place:
            began = time.monotonic()
            anymla.run(source, out := Path(place) / "out", steps=[{name: settings}])
            seconds = time.monotonic() - began
            size = json.loads((out / "account.json").read_text())["weight_bytes"] / 1e6
            _, perplexity, kl = scores(out, original)
            row = f"{true_bits(out):.3f} | {size:.1f} | {kl:.4f} | {perplexity:.2f} | {seconds:.0f}"
            print(f"| {' '.join((name, *scales))} | {bits} | {row} |", flush=True)


if __name__ == "__main__":
    main()
