"""What is counted from a spec is what is measured from tensors: weights and cache, of every family."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.account import account, in_dtype, latent_bytes, measure, reduced_bytes, told_lengths
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import converted_spec, read_config, read_model_spec
from anymla.io.checkpoint import check_weights
from anymla.modeling.arguments import cache_argument
from anymla.modeling.spec import DTYPE_BYTES, KEY, AttentionSpec, LatentSpec, LayerSpec, ModelSpec
from anymla.weight_files import sized, stored_bytes
from tests.families import make_model, save_model, token_ids
from tests.family_check import load
from tests.family_models import FULL_FIRST, SINCE, VARIANTS, tiny_config, tiny_model

FAST = {"calibration_tokens": 256, "calibration_length": 32, "reconstruction_steps": 0}
LENGTHS = (3, 11, 12, 13, 40, 300)  # below, at and beyond a window of 12 and a chunk of 16
CASES = [(name, name, {}) for name, family in FAMILIES.items() if not family.inside] + VARIANTS


def spec_in(folder):
    """The spec of a checkpoint, converted or not, with the bytes that its files hold."""
    config = read_config(folder)
    spec = converted_spec(config) if KEY in config else read_model_spec(config)
    return sized(spec, stored_bytes(spec, check_weights(folder)))


def bytes_in(folder):
    """Bytes of a checkpoint's weight files without their headers."""
    files = check_weights(folder)
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def held(cache):
    """Bytes of keys and values, or of latents and rope keys, with those of exact windows."""
    rooms = [room for layer in cache.layers for room in (layer, getattr(layer, "exact", None))]
    tensors = [getattr(room, name, None) for room in rooms for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def really_held(model, length):
    """Bytes that ``length`` tokens take in a cache, all but the last of them read at once."""
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache, "use_cache": True}
    ids = token_ids(1, length)
    model(input_ids=ids[:, :-1], **given)
    model(input_ids=ids[:, -1:], **given)
    return held(cache)


def check(folder, model=None):
    """The account of a folder is that of its files and of its model."""
    spec = spec_in(folder)
    counted = account(spec, LENGTHS)
    assert counted == measure(load(folder) if model is None else model, LENGTHS)
    assert counted.weight_bytes == bytes_in(folder)
    return counted


def check_written(folder):
    """account.json says the same twice, and what the folder holds."""
    told = json.loads((folder / "account.json").read_text())
    measured = told.pop("measured")
    assert told.pop("dtype") == read_config(folder)["dtype"]
    assert told == measured == account(spec_in(folder)).to_dict()
    assert told["weight_bytes"] == bytes_in(folder)


@pytest.mark.parametrize(("name", "model_type", "changes"), CASES, ids=[case[0] for case in CASES])
def test_every_family(tmp_path, name, model_type, changes):
    if model_type in SINCE or model_type not in CONFIG_MAPPING:
        pytest.importorskip("transformers", minversion=SINCE.get(model_type, "5.24"))
    source = save_model(tiny_model(model_type, torch.float32, **changes), tmp_path / "source")
    before = check(source)
    for share in (1.0, 0.5):
        folder = tmp_path / f"{share}"
        anymla.convert(source, folder, kv_cache=share, **FAST)
        after = check(folder)
        check_written(folder)
        assert share == 1.0 or after.cache_bytes_per_token < before.cache_bytes_per_token
