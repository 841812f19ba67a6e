"""Every family of transformers' causal language models converts exactly, or is refused with a reason."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import anymla
from anymla.architectures.families import FAMILIES, REFUSED, TEXT_ONLY_INSIDE, Family
from anymla.errors import UnsupportedModelError
from tests.families import save_model
from tests.family_check import FAST, TOLERANCE, check_family, decode, full_budget_error, load
from tests.family_models import SINCE, VARIANTS, tiny_model
from tests.precision import Exact
from tests.support_table import documented, line, silent

CASES = [(name, name, {}) for name in FAMILIES if name not in TEXT_ONLY_INSIDE] + VARIANTS


@pytest.mark.parametrize(("name", "model_type", "changes"), CASES, ids=[case[0] for case in CASES])
def test_family_converts_exactly_as_the_table_says(tmp_path, name, model_type, changes):
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"the installed transformers has no {model_type}")
    if Version(transformers.__version__) < Version(since := SINCE.get(model_type, "5")):
        pytest.skip(f"transformers runs {model_type} since {since}")
    row = check_family(name, model_type, changes, tmp_path)
    for dtype, tolerance in TOLERANCE.items():
        assert row.errors[dtype] < tolerance
    assert line(row) in documented()


def test_no_family_is_passed_over():
    """Each model type of transformers' own list is converted, refused by name, or another name for one of these."""
    assert not silent()
    assert not {*FAMILIES} & {*REFUSED}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refusal_says_why(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    inspection = anymla.inspect(tmp_path)
    assert not inspection.supported
    assert REFUSED[model_type] in inspection.reason
    assert any(f"| {model_type} | {REFUSED[model_type]} |" in each for each in documented())


@pytest.mark.parametrize(
    ("model_type", "left_out", "added"),
    [
        ("bamba", ("rope_parameters", "partial_rotary_factor"), {}),
        ("nemotron", ("rope_parameters", "partial_rotary_factor"), {}),
        ("llama", (), {"clip_qkv": 0.1, "alibi": True, "position_embedding_type": "alibi"}),
        ("gemma3_text", (), {"attn_logit_softcapping": 1.0}),
    ],
)
def test_config_as_a_hub_may_have_it(tmp_path, model_type, left_out, added):
    """Fields that the family's class fills in, and fields that it does not look at."""
    source = save_model(tiny_model(model_type, torch.float32), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in left_out}
    (source / "config.json").write_text(json.dumps(kept | added))
    assert full_budget_error(source, tmp_path / "out") < TOLERANCE[torch.float32]


def test_masks_in_old_checkpoints_are_no_weights(tmp_path):
    source = save_model(tiny_model("gpt_neo", torch.float32), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()
    weights["transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert full_budget_error(source, tmp_path / "out") < TOLERANCE[torch.float32]


def test_alibi_under_eager_attention(tmp_path):
    source = save_model(tiny_model("falcon", alibi=True, multi_query=False, num_kv_heads=6), tmp_path / "source")
    anymla.convert(source, tmp_path / "out", kv_cache=1.0, **FAST)
    eager = {"attn_implementation": "eager"}
    with Exact():
        original, converted = load(source, **eager), load(tmp_path / "out", **eager)
        assert (decode(original) - decode(converted)).abs().max() < TOLERANCE[torch.float64]


def test_what_is_read_wrongly_is_refused(tmp_path, monkeypatch):
    """Interleaved rope taken for half-split, say: found on the first window of the first layer."""
    source = save_model(tiny_model("cohere", torch.float32), tmp_path / "source")
    monkeypatch.setitem(FAMILIES, "cohere", Family())
    with pytest.raises(UnsupportedModelError, match="layer 0: at full budget its attention is off by"):
        anymla.convert(source, tmp_path / "out", kv_cache=0.5, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
