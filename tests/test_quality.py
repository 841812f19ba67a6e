"""On the bundled trained model the default beats every strategy of the paper at the same cached numbers."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoModelForCausalLM

import anymla
from anymla.data.text import bundled_text, read_documents, text_windows
from anymla.demo import bundled_model
from anymla.errors import InfeasibleError
from anymla.evaluation.scores import score_model
from anymla.io.checkpoint import load_tokenizer

SETTINGS = {"calibration_tokens": 16384, "calibration_length": 256, "reconstruction_steps": 40}
PAPER = ("high", "low", "uniform", "two-norm")
CEILING = {0.5: 1.15, 0.25: 1.95, 0.125: 9.0}  # perplexity over the original's; measured 1.11 to 8.1


@pytest.fixture(scope="module")
def windows():
    documents, tokenizer = read_documents(bundled_text("valid")), load_tokenizer(bundled_model())
    return text_windows(documents, tokenizer, "bundled text", length=256, tokens=48 * 256)


@pytest.fixture(scope="module")
def scores_of(windows, original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")

    @functools.cache
    def convert_and_score(**settings):
        anymla.convert(bundled_model(), folder / "model", overwrite=True, **SETTINGS | settings)
        return score_model(AutoModelForCausalLM.from_pretrained(folder / "model").eval(), windows, original)

    return convert_and_score


@pytest.mark.slow
@pytest.mark.parametrize("budget", list(CEILING))
def test_default_is_ahead_of_every_paper_strategy(scores_of, windows, original, budget):
    ours = scores_of(kv_cache=budget)
    assert ours.cache_numbers_per_token_per_layer == 64 * budget
    assert ours.perplexity < CEILING[budget] * score_model(original, windows).perplexity
    compared = 0
    for strategy in PAPER:
        for rope_dims in (2, 4):
            paper = {"rope": strategy, "factorization": "joint-svd", "expected_rotation": False, "rope_dims": rope_dims}
            try:
                theirs = scores_of(kv_cache=budget, **paper)
            except InfeasibleError:
                continue
            compared += 1
            assert theirs.cache_numbers_per_token_per_layer == ours.cache_numbers_per_token_per_layer
            assert ours.kl < theirs.kl
    assert compared == {0.5: 8, 0.25: 4, 0.125: 0}[budget]  # 16 numbers hold no 4 dims of 4 heads and a latent


@pytest.mark.slow
def test_every_part_of_the_default_earns_its_place(scores_of):
    """Taking any one part away loses quality at a quarter of the cache."""
    default = scores_of(kv_cache=0.25).kl
    assert default < scores_of(kv_cache=0.25, expected_rotation=False).kl
    for factorization in ("joint-svd", "split-svd", "whitened", "balanced-pca"):
        assert default < scores_of(kv_cache=0.25, factorization=factorization).kl
    for rope in ("high", "low", "uniform", "two-norm"):
        assert default < scores_of(kv_cache=0.25, rope=rope).kl


@pytest.mark.slow
def test_more_cache_is_better(scores_of):
    losses = [scores_of(kv_cache=budget).kl for budget in (0.125, 0.25, 0.5, 0.75, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6


@pytest.mark.slow
def test_calibrated_split_is_no_worse_than_fixed_ones(scores_of):
    chosen = scores_of(kv_cache=0.3125).kl
    fixed = [scores_of(kv_cache=0.3125, rope_dims=rope_dims).kl for rope_dims in (4, 6, 8, 10)]
    assert chosen < 1.05 * min(fixed)
