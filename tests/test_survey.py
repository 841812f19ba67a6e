"""Surveys: what they find is what autograd through the whole model finds; they stop, go on, and hold one layer."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor  # of what other tests compile
from torch.nn.functional import cross_entropy

from anymla.io.safetensors import Stored
from anymla.io.work import WorkFolder
from anymla.model_run.stream import decoder_layers
from tests.families import save_model, token_ids
from tests.family_models import tiny_model
from tests.surveys import Fisher, Hidden, Taylor, WeightSums, digest, fitted, in_memory, surveyed

FAMILIES = ("llama", "gemma2", "qwen3", "gpt2", "mixtral", "gpt_oss")
WINDOWS = token_ids(batch=8, length=14)
LAYERS = {"num_hidden_layers": 3}


class Stop(Exception):
    """Stands for any end that Python sees."""


def whole_model(model, windows):
    """Per window and layer: gradients of the weights, and hidden states after the layer with theirs, by autograd."""
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # older transformers leave soft-caps out of sdpa
    layers, found = decoder_layers(model.requires_grad_(True)), []
    for window in windows:
        states = {}

        def keep(module, args, output, states=states):
            states[module] = output[0] if isinstance(output, tuple) else output
            states[module].retain_grad()

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, window[1:]).backward()
        for hook in hooks:
            hook.remove()
        found.append(
            [
                (
                    {name: weight.grad for name, weight in layer.named_parameters()},
                    states[layer].detach(),
                    states[layer].grad,
                )
                for layer in layers
            ]
        )
    model.zero_grad(set_to_none=True)
    return found


def saved(folder, family="llama", dtype=torch.float64, **changes):
    model = tiny_model(family, dtype, **changes)
    return model, save_model(model, folder / "model")


class Seen(Taylor):
    """Keeps every batch, and the gradients with it."""

    def __init__(self):
        super().__init__()
        self.batches = {}

    def observer(self, layer):
        outer = self

        class Keep(WeightSums):
            def add(self, batch):
                super().add(batch)
                gradients = {name: weight.grad for name, weight in self.weights.items()}
                outer.batches[layer.index, batch.windows.start] = (gradients, batch.output, batch.gradient.clone())

        return Keep(layer, lambda weight, gradient: gradient)


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-9 + 1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in FAMILIES), ("gemma2", True)])
def test_gradients_are_those_of_the_whole_model(family, tied, tmp_path):
    model, folder = saved(tmp_path, family, tie_word_embeddings=tied)
    survey = Seen()
    surveyed(survey, folder, WINDOWS, tmp_path / "out")
    expected = whole_model(model, fitted(WINDOWS))
    assert sorted(survey.batches) == [(layer, window) for layer in range(2) for window in range(len(expected))]
    for (layer, window), (gradients, output, gradient) in survey.batches.items():
        weights, states, theirs = expected[window][layer]
        assert close(output, states)
        assert close(gradient, theirs)
        assert gradients.keys() == weights.keys()
        for name, value in weights.items():
            mine = gradients[name]
            assert (mine is None or not mine.any()) if value is None else close(mine, value), name


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_fisher_and_taylor(memory, tmp_path):
    model, folder = saved(tmp_path, **LAYERS)
    fisher = surveyed(Fisher(), folder, WINDOWS, tmp_path / "fisher", memory=memory)
    taylor = surveyed(Taylor(), folder, WINDOWS, tmp_path / "taylor", memory=memory)
    assert all(isinstance(value, Stored) for fact in fisher for value in fact.values())  # read when they are needed
    expected = whole_model(model, fitted(WINDOWS))
    for index, (layer, found) in enumerate(zip(decoder_layers(model), in_memory(fisher), strict=True)):
        for name, weight in layer.named_parameters():
            gradients = torch.stack([window[index][0][name] for window in expected])
            assert close(found[name], gradients.square().sum(0))
            score = (gradients * weight.detach()).abs().sum().item()
            assert taylor[index]["scores"][name] == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_forwards(memory, tmp_path):
    model, folder = saved(tmp_path, **LAYERS)
    facts = in_memory(surveyed(Hidden(), folder, WINDOWS, tmp_path / "out", memory=memory, skip={1}))
    with torch.no_grad():
        inner = model.model(input_ids=WINDOWS, use_cache=False, output_hidden_states=True).hidden_states
        last = []
        hook = decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: last.append(output))
        model(input_ids=WINDOWS)
        hook.remove()
    states = [*inner[:3], last[0][0] if isinstance(last[0], tuple) else last[0]]
    squares = [each.square().sum().item() for each in states]
    assert facts[1] is None
    for index in (0, 2):
        assert facts[index]["index"] == index
        assert facts[index]["norms"] == pytest.approx([squares[index], squares[index], squares[index + 1]])
        assert close(facts[index]["mean"].double(), states[index].sum((0, 1)))


def test_only_layers_that_are_looked_at(tmp_path):
    _, folder = saved(tmp_path, num_hidden_layers=4)
    whole = surveyed(Taylor(), folder, WINDOWS, tmp_path / "whole")
    some = surveyed(Taylor({1, 2, 3}), folder, WINDOWS, tmp_path / "some", skip={2})
    assert some == [None, whole[1], None, whole[3]]
    assert surveyed(Taylor(), folder, WINDOWS, tmp_path / "none", skip={0, 1, 2, 3}) == []


def test_16_bits_go_back_in_float32(tmp_path):
    model, folder = saved(tmp_path, dtype=torch.bfloat16)
    found = in_memory(surveyed(Fisher(), folder, WINDOWS, tmp_path / "out"))
    expected = whole_model(model.float(), fitted(WINDOWS))
    for index, layer in enumerate(decoder_layers(model)):
        for name, _ in layer.named_parameters():
            theirs = sum(window[index][0][name].square() for window in expected)
            assert found[index][name].dtype == torch.float32
            assert torch.allclose(found[index][name], theirs, rtol=1e-3, atol=1e-3 * theirs.max().item())


@pytest.mark.parametrize("kind", [Fisher, Taylor, Hidden])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_goes_on_after_a_stop_at_each_layer(kind, memory, tmp_path, monkeypatch):
    _, folder = saved(tmp_path, **LAYERS)
    whole = digest(surveyed(kind(), folder, WINDOWS, tmp_path / "whole", memory=memory))
    commit, stops = WorkFolder.commit, 0

    def stop(work, **changes):
        commit(work, **changes)
        raise Stop

    monkeypatch.setattr(WorkFolder, "commit", stop)
    while True:  # every run gets one step further
        try:
            found = surveyed(kind(), folder, WINDOWS, tmp_path / "out", memory=memory)
        except Stop:
            stops += 1
            continue
        break
    assert stops == (7 if kind.backward else 3)  # three layers up, the loss, three down
    assert digest(found) == whole
    assert not list((tmp_path / ".out.partial" / ".work").glob("*after*"))


def test_a_finished_survey_runs_nothing(tmp_path, monkeypatch):
    _, folder = saved(tmp_path)
    first = surveyed(Taylor(), folder, WINDOWS, tmp_path / "out")
    monkeypatch.setattr("anymla.sweep.survey.Decoder", None)
    assert surveyed(Taylor(), folder, WINDOWS, tmp_path / "out") == first


@pytest.mark.slow
def test_killed_anywhere(tmp_path):
    _, folder = saved(tmp_path, **LAYERS)
    command = [sys.executable, "-m", "tests.survey_process", "kills", folder, tmp_path / "runs", "5", "12"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind, report in json.loads(done.stdout).items():
        assert report["points"] > 12, kind
        assert all(code == -9 and equal for code, _, equal in report["trials"]), (kind, report)
        assert len({str(far) for _, far, _ in report["trials"]}) > 2, kind  # they went on from various layers


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    _, folder = saved(tmp_path, **LAYERS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, front in (("one", []), ("two", launch)):
        command = [sys.executable, *front, "-m", "tests.survey_process", "facts", folder, tmp_path / name]
        (tmp_path / name).mkdir()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for kind in ("fisher", "taylor", "hidden"):
        one, *two = (
            torch.load(tmp_path / name, weights_only=True)
            for name in (f"one/{kind}-0.pt", f"two/{kind}-0.pt", f"two/{kind}-1.pt")
        )
        for facts in two:
            torch.testing.assert_close(facts, one, rtol=1e-9, atol=1e-12)


def live_bytes():
    """Bytes of all tensors in memory, each storage once."""
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor) and not each.is_meta:
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


class Watched:
    """An observer, with the bytes that are live at each of its batches; no other layer has weights then."""

    def __init__(self, observer, layer, seen):
        self.observer, self.module, self.seen = observer, layer.module, seen
        lists = [each for each in gc.get_objects() if type(each) is torch.nn.ModuleList]
        layers = next(list(each) for each in lists if layer.module in list(each))
        self.others = [each for each in layers if each is not layer.module]

    def add(self, batch):
        assert all(weight.is_meta for other in self.others for weight in other.parameters())
        assert not any(weight.is_meta for weight in self.module.parameters())
        self.seen.append(live_bytes())
        self.observer.add(batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Fisher, Hidden])
def test_memory_does_not_grow_with_layers(kind, tmp_path, monkeypatch):
    peaks, observer, layer = [], kind.observer, kind.layer
    for layers in (2, 6):
        folder, seen = saved(tmp_path / str(layers), num_hidden_layers=layers)[1], []
        monkeypatch.setattr(kind, "observer", lambda *args, seen=seen: Watched(observer(*args), args[1], seen))
        monkeypatch.setattr(kind, "layer", lambda survey, of, watched: layer(survey, of, watched.observer))
        gc.collect()
        before = live_bytes()
        surveyed(kind(), folder, WINDOWS, tmp_path / str(layers) / "out", memory=0)
        peaks.append(max(seen) - before)
    assert peaks[1] <= 1.02 * peaks[0]
