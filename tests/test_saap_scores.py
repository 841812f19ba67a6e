"""Scores of width pruning: they are those of their formulas, and worth their gradients."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from anymla.architectures.model_spec import spec_of
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.saap import SAAP
from anymla.methods.saap.scores import fused, total
from anymla.methods.saap.structures import members
from anymla.model_run.stream import decoder_layers
from tests.families import logits as logits_of
from tests.families import make_model, token_ids
from tests.test_saap import (
    WHOLE,
    Held,
    facts_of,
    layers_of,
    zeroed,
)


def test_scores_are_those_of_their_formulas():
    """Of every window's gradient through the whole model, with no sum that runs along."""
    model, windows = make_model("llama", torch.float64), token_ids(3, 20)
    fact, weights = facts_of(model, "neurons", windows)[0], decoder_layers(model)[0].mlp
    model.requires_grad_(True)
    loss = [cross_entropy(model(input_ids=each[None]).logits[0, :-1], each[1:]) for each in windows]
    vector = element = 0
    for weight, sums in ((weights.gate_proj.weight, 1), (weights.up_proj.weight, 1), (weights.down_proj.weight, 0)):
        gradients = torch.stack([torch.autograd.grad(each, weight, retain_graph=True)[0] for each in loss])
        first, fisher = gradients.mean(0) * weight, gradients.square().mean(0)
        vector += first.sum(sums).abs()
        element += (first - weight * fisher * weight / 2).abs().sum(sums)
    assert torch.allclose(fact["neurons.vector"].read(), vector, rtol=1e-9)
    assert torch.allclose(fact["neurons.element"].read(), element, rtol=1e-9)


def test_the_closed_form_is_where_learned_noise_goes():
    generator = torch.Generator().manual_seed(0)
    scores = [
        {f"neurons.{name}": Held(torch.rand(30, generator=generator) ** 3) for name in ("vector", "element")}
        for _ in range(2)
    ]
    vector, element = (torch.cat([each[f"neurons.{name}"].read() for each in scores]) for name in ("vector", "element"))
    logs = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([logs], lr=0.05)
    for _ in range(400):
        noise = (2 * logs).exp()
        lost = (vector / (2 * noise[0]) + element / (2 * noise[1]) + logs.sum()).mean()
        optimiser.zero_grad()
        lost.backward()
        optimiser.step()
    learned = (vector / noise[0] + element / noise[1]).detach()
    assert torch.allclose(torch.cat(fused(scores, "neurons", "fused")), learned, rtol=1e-2)


def test_a_vector_is_summed_before_it_is_absolute():
    owned = members("neurons", next(layers_of(model := make_model("llama"), spec_of(model.config.to_dict()))))
    ones = {each.name: torch.ones_like(model.model.layers[0].get_parameter(each.name)) for each in owned}
    ones["mlp.up_proj.weight"][:, ::2] = -1
    assert torch.equal(total(owned, ones), torch.full((64,), 2.0 * 48))


def test_importance_is_worth_its_gradients():
    """KL on held-out stories: fused loses less than chance, no more than vector, and more is lost of fewer neurons."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bundled_model()), load_tokenizer(bundled_model())
    fitted = calibration_windows(bundled_text("train"), tokenizer, tokens=12288, length=64, seed=0)
    held_out = calibration_windows(bundled_text("valid"), tokenizer, tokens=2048, length=64, seed=0)
    facts, spec = facts_of(model, "neurons", fitted), spec_of(model.config.to_dict())
    before = logits_of(model, held_out).log_softmax(-1)

    def lost(share, importance):
        plan = SAAP(**WHOLE | {"neurons": share}, multiple=4, importance=importance).plan(spec, facts)
        after = logits_of(zeroed(model, plan), held_out).log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1).mean().item()

    losses = {share: {name: lost(share, name) for name in ("fused", "vector", "random")} for share in (0.8, 0.6)}
    for found in losses.values():
        assert found["fused"] <= found["vector"] < found["random"]
    assert 0 < lost(0.95, "fused") < losses[0.8]["fused"] < losses[0.6]["fused"] < lost(0.3, "fused")
