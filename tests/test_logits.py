"""Logits in parts are those of the whole, for every family; memory does not grow with vocabulary times length."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import anymla
from anymla.account import Account, LayerAccount
from anymla.architectures.families import FAMILIES, TEXT_ONLY_INSIDE
from anymla.architectures.vision import VISION
from anymla.data.text import bundled_text
from anymla.errors import CheckpointError
from anymla.evaluation import logits as in_parts
from anymla.evaluation.likelihood import Query, answers, untracked
from anymla.evaluation.logits import Logits, logits_of_pass
from anymla.evaluation.reference import Reference
from anymla.evaluation.scores import ScoreSums, score_model
from anymla.model_run.stream import decoder_layers, logits_of
from tests.families import FAST, logits, make_model, save_model, token_ids
from tests.family_models import SINCE, tiny_model
from tests.vision_models import CASES as VISION_CASES
from tests.vision_models import tiny_vision_model

HEADS = {  # what families do behind the last hidden states
    "gemma2": {"final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "falcon_h1": {"lm_head_multiplier": 0.4},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"vocab_size": 640},  # more than the tokenizer has
}
NO_CACHE = Account(layers=(LayerAccount(cache_bytes_per_token=4, cached_numbers=1, cache_bytes_at={}),))


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of three positions of two windows, where the vocabulary has 512."""
    monkeypatch.setattr(in_parts, "MOST", 2 * 512 * 3 + 1)


def whole_of(found: Logits) -> torch.Tensor:
    parts = list(found.parts())
    assert len(parts) > 3, "all at once"
    return torch.cat([found.at(part) for part in parts], dim=1)


@torch.no_grad()
def test_the_error_of_kl_is_that_over_windows():
    first, second = (make_model("llama", rope_theta=theta) for theta in (1e4, 10.0))
    windows = token_ids(6, 20)
    each = torch.tensor([score_model(first, window[None], second).kl for window in windows], dtype=torch.float64)
    found = score_model(first, windows, second)
    assert found.kl == pytest.approx(float(each.mean()))
    assert found.kl_error == pytest.approx(float(each.std() / 6**0.5))
    together = Reference.of(second, windows, batch=4).scores(first, NO_CACHE)
    assert (together.kl, together.kl_error) == pytest.approx((found.kl, found.kl_error))
    assert score_model(first, windows[:1], second).kl_error is None
    assert score_model(first, windows).kl_error is None


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TEXT_ONLY_INSIDE])
@torch.no_grad()
def test_parts_are_the_whole_for_every_family(small_parts, family):
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"the installed transformers has no {family}")
    if Version(transformers.__version__) < Version(since := SINCE.get(family, "5")):
        pytest.skip(f"transformers runs {family} since {since}")
    model, ids = tiny_model(family, torch.float32), token_ids(2, 14)
    heads = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: heads.append(output.numel()))
    found = whole_of(logits_of_pass(model, {"input_ids": ids}))
    most = max(heads)
    expected = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert most <= in_parts.MOST, "the head ran on all positions at once"


@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_what_heads_do_is_done_to_parts(small_parts, family):
    model, plain, ids = tiny_model(family, **HEADS[family]), tiny_model(family), token_ids(2, 14)
    expected = logits(model, ids)
    torch.testing.assert_close(whole_of(logits_of_pass(model, {"input_ids": ids})), expected)
    changes = HEADS[family].keys() & {"final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"}
    assert not changes or not torch.allclose(expected, logits(plain, ids))


@pytest.mark.parametrize("case", VISION_CASES)
@torch.no_grad()
def test_parts_are_the_whole_for_vision_language_models(small_parts, case):
    if case not in CONFIG_MAPPING or VISION[case] not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {case}")
    model, ids = tiny_vision_model(case, torch.float32), token_ids(2, 14) % 400 + 3
    try:
        expected = logits(model, ids)
    except AttributeError as error:  # Llama 4 in transformers 5.24
        pytest.skip(f"the installed transformers does not run it: {error}")
    found = whole_of(logits_of_pass(model, {"input_ids": ids}))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "opt"])
@torch.no_grad()
def test_tail_of_final_states_in_parts(small_parts, family):
    """What conversion scores with: the model's own norm and head on some positions."""
    model, ids, seen = tiny_model(family), token_ids(2, 14), []
    hook = decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    expected = logits(model, ids)
    hook.remove()
    hidden, tuples = seen[0][0] if isinstance(seen[0], tuple) else seen[0], isinstance(seen[0], tuple)
    found = Logits(hidden, lambda states, part: logits_of(model, states[:, part], tuples=tuples), tuple(expected.shape))
    torch.testing.assert_close(whole_of(found), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_those_of_whole_logits(monkeypatch, dtype):
    model, original = make_model("llama", dtype), make_model("llama", dtype, attention_bias=True)
    windows = token_ids(3, 40)
    whole = score_model(model, windows, original)
    monkeypatch.setattr(in_parts, "MOST", 512 * 7)
    parts = score_model(model, windows, original)
    rounding = 1e-6 if dtype != torch.bfloat16 else 1e-3
    assert (parts.perplexity, parts.kl) == pytest.approx((whole.perplexity, whole.kl), rel=rounding)
    assert parts.top1_agreement == pytest.approx(whole.top1_agreement, abs=0.01)
    with torch.no_grad():
        log_p, log_q = (logits(each, windows)[:, :-1].double().log_softmax(-1) for each in (model, original))
    kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    assert parts.kl == pytest.approx(kl.item(), rel=1e-6 if dtype != torch.bfloat16 else 1e-2)


def test_answers_are_those_of_whole_logits(monkeypatch):
    model, ids = make_model("llama", torch.float64), token_ids(3, 40).tolist()
    queries = [Query(ids[0], 1), Query(ids[1][:23], 20), Query(ids[2][:9], 3, (5, ids[2][5], 9, *ids[2][3:9]))]
    settings = {"context": None, "batch_size": 3, "track": untracked, "label": "test"}
    whole = answers(model, queries, **settings)
    monkeypatch.setattr(in_parts, "MOST", 3 * 512 * 4)
    parts = answers(model, queries, **settings)
    for one, other, query in zip(whole, parts, queries, strict=True):
        assert len(one.log_probs) == len(query.ids) - query.start
        torch.testing.assert_close(one.log_probs, other.log_probs)
        assert torch.equal(one.likeliest, other.likeliest)


def test_a_model_goes_on_as_before():
    model, ids = make_model("llama", torch.float64), token_ids(1, 8)
    expected = logits(model, ids)
    with torch.no_grad():
        found = logits_of_pass(model, {"input_ids": ids})
        found.at(slice(0, 3))
    assert torch.equal(logits(model, ids), expected)
    assert not model._forward_hooks and not model.model._forward_hooks and "forward" not in vars(model.model)


def test_nan_in_any_part_is_refused(monkeypatch):
    monkeypatch.setattr(in_parts, "MOST", 8)
    sums, values = ScoreSums(), torch.zeros(1, 4, 8)
    values[:, 2] = torch.nan
    sums.add(Logits.of(values), torch.zeros(1, 4, dtype=torch.long), None)
    with pytest.raises(CheckpointError, match="NaN"):
        sums.scores(NO_CACHE)


PEAK = "import sys; from anymla.cli import app; from anymla.io.device import peak_rss; app(standalone_mode=False); " + (
    "sys.stderr.write(f'peak {peak_rss()}')"
)
LONG = {"max_position_embeddings": 2048, "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory):
    """A model of which all but nothing is its embedding, and its conversion."""
    folder = tmp_path_factory.mktemp("large")
    changes = LONG | {"num_key_value_heads": 4, "vocab_size": 262_144, "tie_word_embeddings": True}
    source = save_model(make_model("llama", torch.float32, **changes), folder / "source")
    anymla.convert(source, folder / "converted", kv_cache=0.5, **FAST)
    return source, folder / "converted"


def peak_of(*words):
    """Most bytes that a command held, in a process of its own."""
    command = [sys.executable, "-c", PEAK, *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rpartition("peak ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("against", [True, False])
def test_memory_of_an_evaluation_does_not_grow_with_length(large_vocabulary, against):
    source, converted = large_vocabulary
    other = ["--against", source] if against else []
    text = ["--text", bundled_text("valid"), "--tokens", 2048, "--json"]
    peaks = [peak_of("eval", converted, *text, *other, "--length", length) for length in (256, 2048)]
    assert abs(peaks[1] / peaks[0] - 1) < 0.2, peaks
    assert max(peaks) < 2 << 30


@pytest.mark.slow
def test_memory_of_a_tuning_does_not_grow_with_length(large_vocabulary, tmp_path):
    source, converted = large_vocabulary
    text = ["--data", bundled_text("train"), "--tokens", 2048, "--eval-data", bundled_text("valid"), "--batch", 1]
    text += ["--teacher", source, "--eval-tokens", 2048, "--eval-every", 100, "--json"]
    text += ["--train", "attention", "--learning-rate", 1e-4]  # no trials
    peaks = [
        peak_of("tune", converted, "-o", tmp_path / str(length), *text, "--length", length) for length in (256, 2048)
    ]
    assert abs(peaks[1] / peaks[0] - 1) < 0.2, peaks


@pytest.mark.slow
def test_memory_of_a_conversion_does_not_grow_with_length(large_vocabulary, tmp_path):
    options = ["--reconstruction-steps", 0, "--calibration-tokens", 16384, "--json"]
    peaks = [
        peak_of("convert", large_vocabulary[0], "-o", tmp_path / str(length), *options, "--calibration-length", length)
        for length in (256, 2048)
    ]
    assert abs(peaks[1] / peaks[0] - 1) < 0.2, peaks
