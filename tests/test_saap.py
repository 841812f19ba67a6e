"""Width pruning: removing is zeroing, scores find what is dead, and the result is a stock checkpoint."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import read_model_spec
from anymla.architectures.parts import attention_path
from anymla.architectures.stock_config import config_after
from anymla.methods.saap import SAAP
from anymla.methods.saap.build import shrink
from anymla.methods.saap.structures import members
from anymla.model_run.stream import decoder_layers
from tests.families import logits as logits_of
from tests.families import token_ids
from tests.family_models import tiny_model
from tests.precision import Exact

HALF = {"neurons": 0.5, "heads": 0.4, "multiple": 8, "importance": "random"}


def kinds_of(name):
    """Which structures of a family can be removed."""
    spec = read_model_spec(tiny_model(name).config.to_dict())
    whole = {"neurons": 1.0, "heads": 1.0}
    return [kind for kind in whole if SAAP(**whole | {kind: 0.5}).refuses(spec) is None]


def layer_of(model, spec, plan, index):
    """What a sweep hands to the method."""
    block = decoder_layers(model)[index]
    path = attention_path(block)
    return SimpleNamespace(
        index=index,
        module=block,
        old=spec.layers[index],
        planned=plan.after.layers[index],
        choice=plan.choices[index],
        new_config=config_after(model.config, spec, plan.after).get_text_config(),
        attention=None if path is None else block.get_submodule(path),
        attention_path=path,
    )


def narrowed(model, method):
    """The model without structures, made by transformers of the new config; and the model with these set to zero."""
    spec = read_model_spec(model.config.to_dict())
    plan = method.plan(spec, [])
    shrunk, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    for index in [index for index, choice in enumerate(plan.choices) if choice is not None]:
        layer = layer_of(zeroed, spec, plan, index)
        for kind, gone in layer.choice.gone.items():
            for member in members(kind, layer):
                tensor = layer.module.state_dict()[member.name]
                if member.scored:
                    tensor.index_fill_(member.dim, member.places[gone].flatten(), 0)
        shrink(part := layer_of(shrunk, spec, plan, index), part.choice.gone)
    with torch.device("meta"):
        stock = type(model)(config_after(model.config, spec, plan.after))
    fresh = type(model)(stock.config).to(model.dtype).eval()
    fresh.load_state_dict(shrunk.state_dict())
    return fresh, zeroed


def near(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max().item() <= tolerance * expected.abs().max().item()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.inside])
def test_removing_is_zeroing(name):
    model = tiny_model(name)
    kinds = kinds_of(name)
    for kind in kinds:
        others = {other: 1.0 for other in ("neurons", "heads") if other != kind}
        fresh, zeroed = narrowed(model, SAAP(**HALF | others))
        with Exact() if model.dtype == torch.float64 else nullcontext():
            near(logits_of(fresh, token_ids()), logits_of(zeroed, token_ids()))
