"""What every method must keep to: one function per promise, run over all methods by test_methods.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

import anymla
from anymla.account import measure
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.errors import AnymlaError
from anymla.methods.base import method_of
from tests.families import token_ids
from tests.other_process import forking

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}


@dataclass(frozen=True)
class Sample:
    """Settings of a method for a tiny model, some that change nothing, and the steps that must come before it."""

    settings: dict[str, Any]
    neutral: dict[str, Any]
    before: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Case:
    """A method, its sample, and the tiny model it is tried on; ``kept``: where promises find a run that was made."""

    name: str
    sample: Sample
    source: Path
    kept: Path | None = None

    def steps(self, *, neutral: bool = False) -> list[dict[str, Any]]:
        """The whole recipe."""
        return [*self.sample.before, {self.name: self.sample.neutral if neutral else self.sample.settings}]

    def run(self, output: Path, *, neutral: bool = False) -> Path:
        """Runs it into ``output``."""
        anymla.run(self.source, output, steps=self.steps(neutral=neutral))
        return output

    def done(self, folder: Path) -> Path:
        """A finished run, to be read only: in ``folder``, or the kept one."""
        output = (self.kept or folder) / "out"
        return output if output.exists() else self.run(output)

    def base(self, folder: Path) -> Path:
        """The model as it is before the method."""
        if not self.sample.before:
            return self.source
        anymla.run(self.source, folder, steps=list(self.sample.before))
        return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids=ids, **inputs).logits.double()


def near(model: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    assert (found - expected).abs().max().item() <= TOLERANCE[dtype] * max(1, expected.abs().max().item())


def neutral_settings_change_nothing(case: Case, folder: Path) -> None:
    before, after = load(case.base(folder / "base")), load(case.run(folder / "neutral", neutral=True))
    near(after, logits(after, token_ids()), logits(before, token_ids()))


def all_ways_of_reading_agree(case: Case, folder: Path) -> None:
    """Token by token = at once = in chunks = in a batch that is padded on the left.

    In float64: where float32 rounds another way, a number may get its other neighbour's code.
    """
    model, ids = load(case.done(folder)).double(), token_ids()
    whole = logits(model, ids)
    for width in (1, 5):
        cache, parts = None, []
        for start in range(0, ids.shape[1], width):
            with torch.no_grad():
                output = model(input_ids=ids[:, start : start + width], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits.double())
        near(model, torch.cat(parts, 1), whole)
    pad = 3
    padded = torch.cat([ids.new_zeros(len(ids), pad), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= pad).long().expand(len(ids), -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    near(model, logits(model, padded, attention_mask=mask, position_ids=positions)[:, pad:], whole)


def account_is_what_is_measured(case: Case, folder: Path) -> None:
    account = json.loads(((done := case.done(folder)) / "account.json").read_text())
    names = ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once")
    assert all(account[name] == account["measured"][name] for name in names)
    live = measure(load(done))
    assert [account[name] for name in names] == [getattr(live, name) for name in names]


def saved_again_it_is_the_same(case: Case, folder: Path) -> None:
    first = load(case.done(folder))
    first.save_pretrained(folder / "again")
    second = load(folder / "again")
    assert torch.equal(logits(first, token_ids()), logits(second, token_ids()))


def plans_are_pure(case: Case, folder: Path) -> None:
    """The same plan twice, ready for JSON, from a spec that nothing changes, without torch."""
    spec = read_model_spec(read_config(case.source))
    for step in case.sample.before:
        (name, settings), *_ = step.items()
        spec = method_of(name, settings).plan(spec).after
    kept, method = dataclasses.replace(spec), method_of(case.name, case.sample.settings)
    plan = method.plan(spec)
    assert plan == method.plan(spec)
    assert spec == kept
    json.dumps([choice.model_dump() if isinstance(choice, BaseModel) else choice for choice in plan.choices])
    code = (
        "import sys, json; from anymla.methods.base import method_of; "
        f"method_of({case.name!r}, json.loads({json.dumps(json.dumps(case.sample.settings))})); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


KILLED = """
import os, signal, transformers
import anymla, anymla.runner, anymla.sweep.run
for kill_at, output in enumerate(outputs, 1):
    if not (child := os.fork()):
        seen = []
        def progress(*_):
            seen.append(1)
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            anymla.run(source, output, steps=steps, progress=progress)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def a_killed_run_goes_on_to_the_same_bytes(case: Case, folder: Path) -> None:
    whole = files(case.done(folder))
    outputs = [folder / f"killed-{kill_at}" for kill_at in (1, 2)]
    forking().run(KILLED, source=str(case.source), steps=case.steps(), outputs=list(map(str, outputs)))
    for output in outputs:
        assert not output.exists()
        case.run(output)
        assert files(output) == whole


def what_cannot_be_is_refused_before_weights(case: Case, folder: Path) -> None:
    """A folder with a config and no weights: a wrong model and a wrong setting are named, and nothing is written."""
    source = folder / "config-only"
    source.mkdir()
    config = json.loads((case.source / "config.json").read_text()) | {"model_type": "t5", "is_encoder_decoder": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnymlaError):
        anymla.run(source, folder / "out", steps=case.steps())
    with pytest.raises(AnymlaError, match="no_such_setting"):
        anymla.run(case.source, folder / "out", steps=[*case.sample.before, {case.name: {"no_such_setting": 1}}])
    assert sorted(path.name for path in folder.iterdir()) == ["config-only"]


def files(folder: Path) -> dict[str, bytes]:
    """All files that hold no times."""
    timed = {"conversion.json", "tuning.json", "run.json", "metrics.jsonl", "report.html", "README.md"}
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name not in timed
    }


PROMISES: tuple[Callable[[Case, Path], None], ...] = (
    neutral_settings_change_nothing,
    all_ways_of_reading_agree,
    account_is_what_is_measured,
    saved_again_it_is_the_same,
    plans_are_pure,
    a_killed_run_goes_on_to_the_same_bytes,
    what_cannot_be_is_refused_before_weights,
)
