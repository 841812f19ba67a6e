"""KL and perplexity without the structures that each kind of importance finds least needed, of the step `saap`.

python benchmarks/width.py [MODEL] [--text TRAIN] [--held-out VALID ...] [--structures neurons] [--shares 0.8 0.6]
    [--allocation uniform global fluctuation]

Gradients are measured once, on windows of the calibration text. Every row sets its structures to zero, which is the
same as removing them (tests/test_saap.py). KL is in nats per token, of the original's next tokens against a row's.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anymla.architectures.model_spec import spec_of
from anymla.architectures.parts import attention_path
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.io.real_models import real_model
from anymla.methods.saap import SAAP
from anymla.methods.saap.scores import MagnitudeSurvey, TaylorSurvey
from anymla.methods.saap.settings import KINDS
from anymla.methods.saap.structures import members
from anymla.model_run.stream import decoder_layers
from anymla.register import register

ALLOCATIONS = ("uniform", "global", "fluctuation")
ORDER = ("random", "magnitude", "vector", "element", "fused")


@dataclass(frozen=True)
class Held:
    """A tensor that facts hold, as one in a file."""

    tensor: Tensor

    def read(self) -> Tensor:
        """The tensor."""
        return self.tensor


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(bundled_model()), help="a folder, or the name of a real model")
    parser.add_argument("--text", type=Path, default=bundled_text("train"))
    parser.add_argument("--held-out", type=Path, nargs="+", default=[bundled_text("valid")])
    parser.add_argument("--structures", choices=KINDS, default="neurons")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6], help="of the structures to keep")
    parser.add_argument("--importance", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--allocation", nargs="+", choices=ALLOCATIONS, default=["uniform"])
    parser.add_argument("--protect", type=int, nargs=2, help="first and last layers that stay whole")
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=6144, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="of a window")
    parser.add_argument("--eval-tokens", type=int, default=3072, help="of each held-out text")
    return parser.parse_args()


def layers_of(model: Any, spec: Any) -> list[Any]:
    """The layers, as the method knows them."""
    found = []
    for index, (module, layer) in enumerate(zip(decoder_layers(model), spec.layers, strict=True)):
        own = layer.kind is not None and layer.module is not None
        path = layer.module.split(f"layers.{index}.")[-1] if own else attention_path(module)
        attention = None if path is None else module.get_submodule(path)
        found.append(SimpleNamespace(index=index, module=module, old=layer, attention=attention, attention_path=path))
    return found


def facts_of(model: Any, layers: list[Any], kind: str, windows: Tensor) -> list[Any]:
    """All importances of the structures of every layer."""
    observers = [TaylorSurvey([kind]).observer(layer) for layer in layers]
    for weight in model.parameters():
        weight.requires_grad_(weight.is_floating_point())
    for window in windows:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for observer in observers:
            observer.add(SimpleNamespace())  # type: ignore[arg-type]
    model.zero_grad()
    model.requires_grad_(False)
    facts = [
        observer.scores() | MagnitudeSurvey([kind]).layer(layer, None)
        for observer, layer in zip(observers, layers, strict=True)
    ]
    return [{name: Held(tensor) for name, tensor in fact.items()} for fact in facts]


@torch.no_grad()
def set_to_zero(layers: list[Any], plan: Any) -> None:
    """Sets all numbers of the structures that ``plan`` removes to zero."""
    for layer, choice in zip(layers, plan.choices, strict=True):
        for kind, gone in ({} if choice is None else choice.gone).items():
            for member in (each for each in members(kind, layer) if each.scored):
                layer.module.get_parameter(member.name).index_fill_(member.dim, member.places[gone].flatten(), 0)


@torch.no_grad()
def quality(model: Any, windows: Tensor, original: list[Tensor]) -> tuple[float, float]:
    """KL from the ``original``'s log-probabilities, and perplexity."""
    lost = nll = 0.0
    for window, before in zip(windows, original, strict=True):
        after = model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
        lost += (before.exp() * (before - after)).sum(-1).mean().item()
        nll -= after[:-1].gather(1, window[1:, None]).mean().item()
    return lost / len(windows), math.exp(nll / len(windows))


@torch.no_grad()
def main() -> None:
    """Prints a table in Markdown, a row as soon as it is there."""
    given = arguments()
    folder = Path(given.model) if Path(given.model).is_dir() else real_model(given.model)
    register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    spec = spec_of(model.config.to_dict())
    drawn = {"length": given.length, "seed": 0}
    fitted = calibration_windows(given.text, tokenizer, tokens=given.tokens, **drawn)
    texts = {text: calibration_windows(text, tokenizer, tokens=given.eval_tokens, **drawn) for text in given.held_out}
    with torch.enable_grad():
        facts = facts_of(model, layers_of(model, spec), given.structures, fitted)
    before = {
        text: [model(input_ids=each[None]).logits[0].float().log_softmax(-1) for each in texts[text]] for text in texts
    }
    whole = " | ".join(f"0, {quality(model, texts[text], before[text])[1]:.2f}" for text in texts)
    print(
        "| keeps | importance | allocation: widths |", " | ".join(f"{text.stem}: KL, perplexity" for text in texts), "|"
    )
    print(f"|---|---|---|{'---|' * len(texts)}\n| 100% | | | {whole} |", flush=True)
    for share in given.shares:
        for importance, allocation in product(given.importance, given.allocation):
            first, last = given.protect or (None, None)
            settings = dict.fromkeys(KINDS, 1.0) | {given.structures: share, "protect_first": first}
            settings |= {"importance": importance, "allocation": allocation, "protect_last": last}
            plan = SAAP(**settings, multiple=given.multiple).plan(spec, facts)
            narrow = copy.deepcopy(model)
            set_to_zero(layers_of(narrow, spec), plan)
            found = [quality(narrow, texts[text], before[text]) for text in texts]
            told = " | ".join(f"{lost:.4f}, {perplexity:.2f}" for lost, perplexity in found)
            widths = [None if choice is None else choice.kept[given.structures] for choice in plan.choices]
            layers = " ".join("all" if width is None else str(width) for width in widths)
            print(f"| {share:.0%} | {importance} | {allocation}: {layers} | {told} |", flush=True)


if __name__ == "__main__":
    main()
