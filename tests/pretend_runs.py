"""Runs converted models on a pretended GPU, and prints what was found and counted: a line of JSON for each case.

python -m tests.pretend_runs FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import anymla
import anymla.modeling.dense_weight
import anymla.pipeline
from anymla.evaluation.likelihood import Query, answers, untracked
from anymla.evaluation.scores import score_model
from anymla.methods.mla.moments import MomentSums
from anymla.methods.mla.reconstruct import Reconstruction
from anymla.modeling.arguments import cache_of
from anymla.training.pairs import AttentionPairs
from anymla.training.parameters import always_expand, attention_names
from anymla.training.trainer import TuneTrainer
from tests.coded_models import coded_model
from tests.families import make_model, save_model, token_ids
from tests.pretend_gpu import NAME, Held, Pretend
from tests.pretend_kinds import CODECS, FIXED, OFFLOADED, SPREAD, STEPS

FIRST, SECOND = f"{NAME}:0", f"{NAME}:1"
PADDED = ("exact window", "transform_coding", "kvquant", "int")
PROMPT, PAD, SETTLED = 12, 3, 2  # tokens; padding of the first sequence; decode steps before the count begins


def made(kind: str, folder: Path, original: Any) -> Any:
    """A model of the kind, on the CPU."""
    if kind in CODECS:
        return coded_model(make_model("llama", torch.float32), bits=CODECS[kind], kind=kind, first_tokens=2)
    anymla.run(original, folder / kind, steps=STEPS[kind])
    return AutoModelForCausalLM.from_pretrained(folder / kind).eval()


@torch.no_grad()
def decoded(
    model: Any, device: str, mode: Any = None, *, padded: bool, between: Callable[[Any], None] = lambda cache: None
) -> Tensor:
    """Logits [T,B,V] of a prompt's last token and of those after it; ``mode`` counts what the later ones cost."""
    ids = token_ids(length=PROMPT + 5)
    mask = torch.ones_like(ids)
    mask[0, : PAD if padded else 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    ids, mask, positions = (each.to(device) for each in (ids, mask, positions))
    cache, found, start = None, [], 0
    for step, stop in enumerate(range(PROMPT, ids.shape[1] + 1)):
        if step == SETTLED and mode is not None:
            mode.forget()
        inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]} if padded else {}
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **inputs)
        cache, start = cache_of(output), stop
        found.append(output.logits[:, -1])
        between(cache)
    return torch.stack(found)


def compared(expected: Tensor, mode: Pretend, found: Tensor) -> dict[str, Any]:
    """How far off the pretended GPU is, and what lines of anymla cost there."""
    seen = {name: [each for each in getattr(mode, name) if " at " in each] for name in ("waits", "copies")}
    off = (found.cpu() - expected).abs().max() / expected.abs().max()
    return {"off": float(off)} | seen


def decoding(kind: str, model: Any) -> dict[str, Any]:
    """The kind on one GPU."""
    padded = kind in PADDED
    expected = decoded(model, "cpu", padded=padded)
    with Pretend() as mode:
        model.to(FIRST)
        found = compared(expected, mode, decoded(model, FIRST, mode, padded=padded))
        model.to("cpu")
    return found


def spread(model: Any) -> dict[str, Any]:
    """A model whose second layer is on a second GPU."""
    expected = decoded(model, "cpu", padded=False)
    first = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), FIRST)
    with Pretend() as mode:
        dispatch_model(model, first | dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), SECOND))
        devices = sorted({str(each.device) for each in (*model.parameters(), *model.buffers())})
        return compared(expected, mode, decoded(model, FIRST, mode, padded=False)) | {"devices": devices}


def offloaded(model: Any) -> dict[str, Any]:
    """A cache whose layers leave the GPU after each pass, and come back before the next."""
    expected, seen = decoded(model, "cpu", padded=True), Counter[str]()

    def between(cache: Any) -> None:
        for layer in cache.layers:
            layer.offload()
            seen[str(layer.keys.device)] += 1
            layer.prefetch()

    with Pretend() as mode:
        model.to(FIRST)
        found = compared(expected, mode, decoded(model, FIRST, mode, padded=True, between=between))
        model.to("cpu")
    return found | {"devices": sorted(seen)}


def conversion(folder: Path, original: Any) -> dict[str, Any]:
    """The same conversion on the CPU and on a GPU, and what the loops inside of it cost there."""
    seen: Counter[str] = Counter()

    def counting(own: Callable[..., None]) -> Callable[..., None]:
        def run(self: Any, *args: Any) -> None:
            before, again = Counter(mode.waits), self in known
            known.append(self)
            own(self, *args)
            seen.update({name: count for name, count in (mode.waits - before).items() if again})

        return run

    known: list[Any] = []
    anymla.run(original, folder / "on-cpu", steps=[{"mla": FIXED | {"device": "cpu"}}])
    loops = ((MomentSums, "add"), (Reconstruction, "_add_gradients"))
    kept = [getattr(owner, name) for owner, name in loops]
    with Pretend() as mode:
        for (owner, name), own in zip(loops, kept, strict=True):
            setattr(owner, name, counting(own))
        anymla.run(original, folder / "on-gpu", steps=[{"mla": FIXED | {"device": FIRST}}])
        for (owner, name), own in zip(loops, kept, strict=True):
            setattr(owner, name, own)
    both = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("on-cpu", "on-gpu"))
    expected, found = (decoded(model, "cpu", padded=False) for model in both)
    return {"off": float((found - expected).abs().max() / expected.abs().max()), "waits": sorted(seen)}


def scoring(model: Any) -> dict[str, Any]:
    """What it costs to score two windows, and four, and to answer as many questions."""
    windows, counted = token_ids(4, 24), []
    queries = [Query(ids.tolist(), 20) for ids in windows]
    expected = score_model(model, windows).perplexity
    with Pretend() as mode:
        model.to(FIRST)
        for many in (2, 4):
            mode.forget()
            found = score_model(model, windows[:many]).perplexity
            answers(model, queries[:many], context=None, batch_size=many, track=untracked, label="")
            counted.append(sum(count for name, count in mode.waits.items() if "scores.py" in name or "likelih" in name))
        model.to("cpu")
    return {"off": abs(found / expected - 1), "waits": counted}


def tuning(model: Any, teacher: Any, *, layerwise: bool) -> dict[str, Any]:
    """A step's loss and its way back, in the stage of layers or of logits."""

    def loss(device: str) -> Tensor:
        trainer: Any = object.__new__(TuneTrainer)
        trainer.model, trainer.teacher = model.to(device).train(), teacher.to(device)
        trainer.pairs = AttentionPairs(teacher, model, attention_names(model)) if layerwise else None
        trainer.tuning = SimpleNamespace(cross_entropy=0.5, temperature=1.0, top_k=None, redraw=0.0)
        inputs = {"input_ids": token_ids(2, 24).to(device)}
        with trainer.pairs.hooked() if layerwise else torch.enable_grad():
            total = trainer.compute_loss(model, inputs)
        total.backward()
        return total.detach()[None]

    always_expand(model)
    expected = loss("cpu")
    with Pretend() as mode:
        model.to(FIRST), teacher.to(FIRST)
        mode.forget()
        found = compared(expected, mode, loss(FIRST))
        teacher.to("cpu")
    return found


def cases(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that is run, one after the other."""
    anymla.modeling.dense_weight.Tensor = Held  # what a plain weight is
    anymla.pipeline.matmul_speed = lambda device: 1e12
    stock = make_model("llama", torch.float32).eval()
    original = save_model(stock, folder / "original")
    models = {}
    for kind in (*STEPS, *CODECS):
        models[kind] = made(kind, folder, original)
        yield f"decode {kind}", decoding(kind, models[kind])
    for kind in OFFLOADED:
        yield f"offload {kind}", offloaded(models[kind])
    yield "score", scoring(models["mla"])
    yield "convert", conversion(folder, original)
    for kind in SPREAD:
        yield f"spread {kind}", spread(models[kind])
    for layerwise in (True, False):
        student = AutoModelForCausalLM.from_pretrained(folder / "mla")
        yield f"tune {'layers' if layerwise else 'logits'}", tuning(student, stock, layerwise=layerwise)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in cases(Path(sys.argv[1])):
        sys.stdout.write(json.dumps(case) + "\n")
        sys.stdout.flush()
