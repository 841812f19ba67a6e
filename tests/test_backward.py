"""Gradients of the final loss, layer by layer, are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from anymla.model_run import backward
from anymla.model_run.activations import Activations, Budget
from anymla.model_run.backward import layer_gradients, loss_gradient
from anymla.model_run.stream import decoder_layers, first, layer_inputs, layers_give_tuples
from tests.families import token_ids
from tests.family_models import tiny_model

FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen3", "gpt2", "bloom", "mixtral", "gpt_neox", "cohere2")


def whole_gradients(model, ids):
    """Per window: the loss and the gradients of all weights of the layers, by autograd through the model."""
    found = []
    for window in ids:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits, window[1:])
        loss.backward()
        named = decoder_layers(model).named_parameters()
        found.append((loss.item(), {name: weight.grad.clone() for name, weight in named if weight.grad is not None}))
    model.zero_grad(set_to_none=True)
    return found


def streams(model, ids, folder):
    """Hidden states before each layer and after the last, all arguments, and whether layers give tuples."""
    tuples = layers_give_tuples(model, ids[:1, :8])
    inputs = layer_inputs(model, ids, tuples=tuples)
    arguments = layer_inputs(model, ids[:1], tuples=tuples).arguments
    hidden, boundaries = inputs.hidden, []
    for layer, given in zip(decoder_layers(model), arguments, strict=True):
        boundaries.append(hidden)
        with torch.no_grad():
            hidden = torch.cat([first(layer(window[None], **given)) for window in hidden])
    kept = []
    for states in (*boundaries, hidden):
        kept.append(Activations(tuple(states.shape), states.dtype, "cpu", Budget(1 << 30, folder)))
        kept[-1][:] = states
    return kept, arguments, tuples


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part_bytes", [64 << 20, 1])
def test_gradients_are_those_of_the_whole_model(family, part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(backward, "PART_BYTES", part_bytes)
    try:
        model = tiny_model(family, torch.float64)
    except KeyError:
        pytest.skip(f"the installed transformers has no {family}")
    model, ids = model.eval(), token_ids(batch=3, length=14)
    expected = whole_gradients(model, ids)
    kept, arguments, tuples = streams(model, ids, tmp_path)
    gradient = kept[-1].like(torch.float64)
    for number, window in enumerate(ids):
        place = slice(number, number + 1)
        loss, gradient[place] = loss_gradient(model, kept[-1][place], window[None], tuples=tuples)
        assert loss == pytest.approx(expected[number][0], rel=1e-9)
    layers = decoder_layers(model)
    for index in range(len(layers) - 1, -1, -1):
        for sample in layer_gradients(layers[index], kept[index], gradient, arguments[index]):
            for name, weight in layers[index].named_parameters():
                whole = expected[sample.windows.start][1].get(f"{index}.{name}")
                assert (weight.grad is None or not weight.grad.any()) if whole is None else True
                if whole is not None:
                    assert torch.allclose(weight.grad, whole, rtol=1e-7, atol=1e-12), (index, name)
        assert all(weight.grad is None and not weight.requires_grad for weight in layers[index].parameters())


def test_without_weights_the_gradient_alone_moves_on(tmp_path):
    model, ids = tiny_model("llama", torch.float64).eval(), token_ids(batch=2, length=10)
    kept, arguments, _tuples = streams(model, ids, tmp_path)
    layer, moved = decoder_layers(model)[-1], []
    for weights in (True, False):
        gradient = kept[-1].like(torch.float64)
        gradient[:] = torch.ones(gradient.shape, dtype=torch.float64)
        for _ in layer_gradients(layer, kept[-2], gradient, arguments[-1], weights=weights):
            assert all((weight.grad is not None) is weights for weight in layer.parameters())
        moved.append(gradient[:])
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], torch.ones_like(moved[0]))
