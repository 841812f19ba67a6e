"""Ranks of the step `mla` spread over layers: one budget of bytes, whoever says where it goes."""

from __future__ import annotations

import json

import pytest
import torch

import anymla
from anymla.account import account
from anymla.architectures.model_spec import read_config, read_model_spec
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.errors import AnymlaError
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.mla.rank_survey import EnergySurvey, FisherSurvey
from anymla.methods.mla.ranks import RANKS, SURVEYED
from anymla.methods.mla.settings import MLA
from anymla.methods.ranks import Room, greedy, proportional
from tests.families import make_model, save_model

FAST = {"calibration_tokens": 1024, "calibration_length": 64, "reconstruction_steps": 0}
FACTS = [  # as surveys give them
    {"condition": [2.0, 1.0], "fisher": 4.0, "energies": [9.0, 8.0, 7.0] + [0.0] * 61},
    *[{"condition": [1.0, 1.0], "fisher": 1.0, "energies": [5.0, 1.0] + [0.0] * 62}] * 4,
]


@pytest.fixture(scope="module")
def spec():
    return read_model_spec(read_config(bundled_model()))


def numbers(plan):
    return [layer.cached_numbers for layer in plan.choices]


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_spread_keeps_the_budget(ranks, share, spec):
    step = MLA(kv_cache=share, ranks=ranks)
    dry = step.plan(spec)
    after = step.plan(spec, FACTS, dry.choices)
    even = MLA(kv_cache=share).plan(spec)
    for plan in (dry, after):
        assert sum(numbers(plan)) == sum(numbers(even))
        assert account(plan.after).cache_bytes_per_token == account(even.after).cache_bytes_per_token
    opened = any(layer.open_budget for layer in dry.choices)
    assert opened == (ranks in SURVEYED and share < 1) == (step.survey(spec, dry) is not None)
    assert not any(layer.open_budget for layer in after.choices)
    assert after == step.plan(spec, FACTS, dry.choices)  # pure
    if ranks in ("linear", "lorc"):
        assert numbers(after) == sorted(numbers(after), reverse=True)


def test_facts_say_where_numbers_go(spec):
    def found(ranks):
        return numbers(
            MLA(kv_cache=0.25, ranks=ranks).plan(spec, FACTS, MLA(kv_cache=0.25, ranks=ranks).plan(spec).choices)
        )

    assert found("fisher") == [40, 10, 10, 10, 10]  # 4 parts of 8, and 1 each
    assert max(found("energy")) == found("energy")[0]


def test_greedy_and_proportional_keep_to_their_rooms():
    rooms = [Room(1, 4), Room(1, 4), Room(2, 9)]
    assert greedy([[9, 8, 7], [1, 0.5], [6, 5, 4, 3]], rooms, 9) == [4, 1, 4]
    assert greedy([[1], [1], [1]], rooms, 2) == [1, 1, 2]  # never less
    assert sum(proportional([100, 1, 2], rooms, 9)) == 9 and proportional([100, 1, 2], rooms, 9)[0] == 4
    assert proportional([0, 0, 0], rooms, 17) == [4, 4, 9]


def test_plan_files_keep_what_they_say(spec, tmp_path):
    """A plan whose layers were edited is final; one with open layers asks its survey."""
    edited = MLA(kv_cache=0.5).plan(spec).choices
    step = MLA(kv_cache=0.25, ranks="energy")
    assert step.plan(spec, None, edited).choices == edited
    assert step.plan(spec, FACTS, edited).choices == edited


def test_targets_that_need_one_size_get_the_uniform_one(spec):
    for target in ("vllm", "deepseek", "gguf"):
        assert MLA(kv_cache=0.5, ranks="lorc", target=target).plan(spec) == MLA(kv_cache=0.5, target=target).plan(spec)


def test_a_rank_of_all_layers_is_refused(spec):
    with pytest.raises(AnymlaError, match="leave --kv-rank out"):
        anymla.plan(bundled_model(), kv_rank=8, ranks="energy")
    assert "kv-rank" in MLA(kv_rank=8, ranks="linear").refuses(spec)


@pytest.mark.parametrize(("family", "ranks"), [("llama", "lorc"), ("qwen3", "fisher"), ("llama", "energy")])
def test_conversions_in_layers_of_different_sizes(family, ranks, tmp_path):
    source = save_model(make_model(family, torch.float32, head_dim=8), tmp_path / "source")
    report = anymla.convert(source, tmp_path / "out", kv_cache=0.5, ranks=ranks, device="cpu", **FAST)
    written = json.loads((tmp_path / "out" / "account.json").read_text())
    names = ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once")
    assert all(written[name] == written["measured"][name] for name in names)
    even = account(MLA(kv_cache=0.5).plan(read_model_spec(read_config(source))).after)
    assert written["cache_bytes_per_token"] == even.cache_bytes_per_token
    assert [layer.rope_dims + layer.kv_rank for layer in report.layers] == [
        layer.cached_numbers for layer in report.plan.layers
    ]
    assert not any(layer.open_budget for layer in report.plan.layers)


def test_surveys_see_what_a_trained_model_needs(tmp_path):
    """Energies fall and are none below 0; gradients of every layer are there."""
    from tests.surveys import surveyed

    ids = calibration_windows(bundled_text("train"), load_tokenizer(bundled_model()), tokens=1024, length=64, seed=0)
    step = MLA(kv_cache=0.25, ranks="fisher")
    facts = surveyed(FisherSurvey(step), bundled_model(), ids, tmp_path / "fisher")
    assert len(facts) == 5 and all(fact["fisher"] > 0 for fact in facts)
    assert EnergySurvey(step).backward is False
