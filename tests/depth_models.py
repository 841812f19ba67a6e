"""Models with fewer layers, as transformers runs the whole one where some of its layers do nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anymla
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.mka.states import StatesSeen
from anymla.model_run.stream import LayerBatch, decoder_layers, layers_give_tuples
from tests.families import logits, token_ids

FAST = {"calibration_tokens": 512, "calibration_length": 32, "device": "cpu"}


def smaller(source: Any, folder: Path, *, progress: Any = None, **settings: Any) -> Path:
    """Runs the step `mka` on a model; of its layers any may go."""
    step = {"mka": {"protect_first": 0, "protect_last": 0, **FAST, **settings}}
    anymla.run(source, folder, steps=[step], progress=progress)
    return folder


def removed(folder: Path) -> list[int]:
    """The layers that are gone, as the model card lists them."""
    return [int(row[0]) for row in rows(folder)]


def losses(folder: Path) -> list[float]:
    """The KL of each round, as the card lists it."""
    return [float(row[4]) for row in rows(folder)]


def rows(folder: Path) -> list[list[str]]:
    """What the card says of each removed layer."""
    table = (folder / "README.md").read_text(encoding="utf-8").partition("| layer removed")[2]
    lines = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@contextmanager
def without(model: Any, gone: Collection[int]) -> Iterator[None]:
    """Within the block, these layers hand on what they are given."""
    tuples, layers = layers_give_tuples(model, token_ids(1, 8)), decoder_layers(model)
    for index in gone:
        layers[index].forward = lambda hidden_states, *_, **__: (hidden_states, None) if tuples else hidden_states
    try:
        yield
    finally:
        for index in gone:
            del layers[index].forward


def logits_without(model: Any, gone: Collection[int], ids: Tensor) -> Tensor:
    """Logits where these layers do nothing."""
    with without(model, gone), torch.no_grad():
        return logits(model, ids)


def calibration_ids(windows: int, length: int) -> Tensor:
    """The windows [N,T] that the step calibrates on when it is told nothing else."""
    tokenizer, tokens = load_tokenizer(bundled_model()), windows * length
    return calibration_windows(bundled_text("train"), tokenizer, tokens=tokens, length=length, seed=0)


def kl_without(model: Any, gone: Collection[int], ids: Tensor) -> float:
    """KL in nats per token where these layers do nothing; as in scores, a window's last token predicts nothing."""
    both = (logits(model, ids), logits_without(model, gone, ids))
    expected, found = (each[:, :-1].log_softmax(-1) for each in both)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@torch.no_grad()
def layer_states(model: Any, ids: Tensor) -> list[Any]:
    """What each layer makes of windows, as the search for pairs looks at it."""
    facts = []
    for before, after in pairwise(model(ids, output_hidden_states=True).hidden_states):
        seen = StatesSeen()
        seen.add(LayerBatch(windows=slice(0, len(ids)), hidden=before, output=after, attention=None))
        facts.append(seen.facts())
    return facts
