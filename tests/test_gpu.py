"""On a GPU, where there is one: what it computes is what the CPU computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import anymla
from anymla.evaluation.scores import score_model
from tests.damage import TRAIN, VALID
from tests.families import make_model, save_model, token_ids
from tests.pretend_kinds import FIXED, STEPS

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device in this machine")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny GQA model."""
    return save_model(make_model("llama", torch.float32), tmp_path_factory.mktemp("gpu") / "source")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """It, converted on the GPU."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    anymla.convert(source, folder, device="cuda", **FIXED)
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids.to(model.device)).logits.double().cpu()


def test_conversion_is_that_on_the_cpu(source, converted, tmp_path):
    anymla.convert(source, tmp_path / "out", device="cpu", **FIXED)
    mine, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (converted, tmp_path / "out"))
    off = (logits(mine, token_ids()) - logits(theirs, token_ids())).abs().max()
    assert off <= 1e-2 * logits(theirs, token_ids()).abs().max()
    scores = [score_model(model.to(device), token_ids()).perplexity for model in (mine,) for device in ("cpu", "cuda")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "offloaded"}], ids=["resident", "offloaded"])
def test_generated_tokens_are_those_of_the_cpu(kind, options, source, tmp_path):
    anymla.run(source, tmp_path / "out", steps=STEPS[kind])
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), token_ids()
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **given)
    assert torch.equal(model.to("cuda").generate(ids.cuda(), **given, **options).cpu(), expected)


def test_tuning_in_bfloat16_takes_steps(source, converted, tmp_path):
    data = {"data": str(TRAIN), "eval_data": str(VALID), "eval_tokens": 256, "tokens": 2048, "length": 64, "batch": 4}
    settings = {"device": "cuda", "precision": "bfloat16", "gradient_checkpointing": True}
    report = anymla.tune(converted, tmp_path / "tuned", teacher=source, **data, **settings)
    assert report.steps == 8 and report.after.kl < report.before.kl


@pytest.mark.skipif(GPUS < 2, reason="less than two CUDA devices in this machine")
def test_layers_may_be_on_two_gpus(converted):
    alone = AutoModelForCausalLM.from_pretrained(converted).eval()
    first = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), 0)
    both = first | dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), 1)
    spread = AutoModelForCausalLM.from_pretrained(converted, device_map=both).eval()
    assert torch.allclose(logits(spread, token_ids()), logits(alone, token_ids()), atol=1e-4)
