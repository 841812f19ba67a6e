"""The survey of keys and values: what it finds is what autograd through the stock model finds."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from anymla.methods.cache_coding.survey import KeyValueSurvey
from anymla.model_run.stream import decoder_layers
from tests.families import save_model, token_ids
from tests.family_models import tiny_model
from tests.surveys import fitted, in_memory, surveyed

WINDOWS = token_ids(batch=8, length=14)
FIRST = 2
KEYS = {"llama": "k_proj", "qwen3": "k_norm", "gemma2": "k_proj"}


def states_and_gradients(model, windows, keys):
    """Keys and values of every layer [tokens,Gd], and gradients of the windows' summed losses, by autograd."""
    model.set_attn_implementation("eager")  # older transformers leave soft-caps out of sdpa
    made, found = {}, {}

    def keep(place):
        def hook(module, args, output):
            output.retain_grad()
            made[place] = output

        return hook

    for index, layer in enumerate(decoder_layers(model)):
        for kind, name in (("key", keys), ("value", "v_proj")):
            getattr(layer.self_attn, name).register_forward_hook(keep((index, kind)))
    for window in windows:
        logits = model.requires_grad_(True)(input_ids=window[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, window[1:], reduction="sum").backward()
        for place, output in made.items():
            rows = (each[0, FIRST:].flatten(1) for each in (output.detach(), output.grad))
            found.setdefault(place, []).append(list(rows))
    return {place: [torch.cat(each) for each in zip(*rows)] for place, rows in found.items()}


def limited_gradients(gradients):
    """Gradients [windows,12,Gd], the largest of each window as long as the second: 1 % of so few is the largest one."""
    lengths = gradients.norm(dim=-1, keepdim=True)
    return gradients * (lengths.sort(dim=1).values[:, -2:-1] / lengths).clamp(max=1)


@pytest.mark.parametrize("family", KEYS)
def test_moments_and_fisher_are_those_of_the_stock_model(family, tmp_path):
    model = tiny_model(family)
    folder = save_model(model, tmp_path / "model")
    facts = in_memory(surveyed(KeyValueSurvey(FIRST, sample=20), folder, WINDOWS, tmp_path / "out"))
    for (index, kind), (states, gradients) in states_and_gradients(model, fitted(WINDOWS), KEYS[family]).items():
        found = {name.removeprefix(f"{kind}_"): value for name, value in facts[index].items()}
        assert found["tokens"] == len(states) == 7 * 12
        places = torch.linspace(0, 83, 20, dtype=torch.float64).long()
        limited = limited_gradients(gradients.view(7, 12, -1)).flatten(0, 1)
        fisher = limited.T @ limited
        expected = {
            "mean": states.mean(0),
            "covariance": states.T.cov(correction=0),
            "fisher": fisher / fisher.trace() * gradients.square().sum() / len(gradients),
            "sample": states[places].float(),
            "gradients": gradients[places].float(),
        }
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5 * values.abs().max().item())
