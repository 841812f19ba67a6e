"""Every family of transformers' causal language models converts exactly, or is refused with a reason."""

from __future__ import annotations

import json

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import anymla
from anymla.architectures.families import FAMILIES, REFUSED, TEXT_ONLY_INSIDE
from tests.family_check import TOLERANCE, check_family
from tests.family_models import SINCE, VARIANTS
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
