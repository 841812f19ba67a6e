"""Random damage to configs, recipes, plans and weight files: only anymla's own errors, each one short line, in time."""

import functools
import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import anymla
from anymla.architectures.families import FAMILIES
from anymla.architectures.model_spec import context_of, read_model_spec
from anymla.errors import AnymlaError
from anymla.io.shards import held_tensors
from anymla.methods.mla.plan import MLAPlan, check_plan, explain, make_plan
from anymla.methods.mla.settings import MLA
from anymla.settings import read_yaml
from tests.damage import BUNDLED
from tests.family_models import tiny_config

LONGEST = 400
fuzz = functools.partial(
    settings,
    deadline=2000,  # ms: a config of a billion layers must not be walked through
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 6, 7, 8, 2**31, 10**9, 10**18, -(10**18), 10**400, 0.5, -0.5, 1e308])
ODD = st.sampled_from([float("nan"), float("inf"), "8", "", "full_attention", "yarn", 5000 * "a", "\ud800\x1b[2J\n"])
SCALARS = st.none() | st.booleans() | NUMBERS | ODD | st.integers() | st.floats() | st.text(max_size=5)
NAMES = st.sampled_from(["rope_type", "factor", "full_attention", "rope_theta", "partial_rotary_factor"]) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@functools.cache
def family_configs() -> dict[str, str]:
    """Of the families that the installed transformers has."""
    present = [family for family in FAMILIES if family in CONFIG_MAPPING]
    return {family: json.dumps(tiny_config(family).to_dict(), default=str) for family in present}


@functools.cache
def fields_of_all() -> list[str]:
    seldom = {
        "rope_scaling",
        "rope_theta",
        "text_config",
        "quantization_config",
        "attn_layer_indices",
        "full_attn_idxs",
    }
    seldom |= {"attn_layer_period", "full_attention_interval", "hybrid_override_pattern", "block_types", "rotary_dim"}
    return sorted(seldom.union(*(json.loads(text) for text in family_configs().values())))


@st.composite
def configs(draw) -> dict[str, Any]:
    """The config of a random family with up to four fields taken out, put in, or given another value."""
    config = json.loads(family_configs()[draw(st.sampled_from(list(family_configs())))])
    for _ in range(draw(st.integers(1, 4))):
        place = config
        name = draw(st.sampled_from(sorted(config) or ["model_type"]) | st.sampled_from(fields_of_all()))
        if isinstance(place.get(name), dict) and place[name] and draw(st.booleans()):
            place, name = place[name], draw(st.sampled_from(sorted(place[name])))
        elif isinstance(place.get(name), list) and place[name] and draw(st.booleans()):
            place, name = place[name], draw(st.integers(0, len(place[name]) - 1))
        if isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
            place.pop(name, None)
        else:
            place[name] = draw(VALUES)
    return config


def is_a_good_message(error: AnymlaError) -> bool:
    return 0 < len(str(error)) < LONGEST and str(error).isprintable()


@fuzz(max_examples=600)
@given(configs(), st.sampled_from([0.05, 0.25, 1.0]))
def test_a_config_is_understood_or_refused(config, kv_cache):
    try:
        model_spec = read_model_spec(config)
        plan = make_plan("model", model_spec, MLA(kv_cache=kv_cache))
    except AnymlaError as error:
        assert is_a_good_message(error), str(error)
        return
    check_plan(plan, "model", model_spec)
    json.dumps(explain(plan, model_spec))


@fuzz(max_examples=100)
@given(configs())
def test_a_config_on_disk_is_understood_or_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (lambda: anymla.plan(tmp_path), lambda: context_of(tmp_path)):
        try:
            read()
        except AnymlaError as error:
            assert len(str(error)) < LONGEST + len(str(tmp_path))


@fuzz(max_examples=100)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-. truefalsn\\u', max_size=60).map(str.encode))
@example(b"\xef\xbb\xbf{}")
@example(b'{"model_type": "llama", "model_type": "x"}')
def test_a_config_of_any_bytes_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(AnymlaError):
        anymla.plan(tmp_path)


RECIPE_NAMES = st.sampled_from(sorted(MLA.model_fields))


@fuzz(max_examples=300)
@given(st.dictionaries(RECIPE_NAMES | st.text(max_size=5) | SCALARS, VALUES | st.just(0.5) | st.just(64), max_size=4))
def test_settings_make_a_recipe_or_are_refused(values):
    try:
        recipe = MLA.of({name: value for name, value in values.items() if isinstance(name, str)}, "here")
    except AnymlaError as error:
        assert is_a_good_message(error), str(error)
        return
    assert MLA.of(yaml.safe_load(recipe.to_yaml())) == recipe


YAML_WORDS = [
    "seed",
    "rope",
    "layers",
    ": ",
    "\n",
    "- ",
    "  ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!int ",
    "!!python/name:os ",
    "<<",
    "? ",
]
YAML_WORDS += [
    "2001-99-99",
    "1e400",
    "~",
    "'",
    '"',
    "#",
    "|",
    ">",
    "%",
    "@",
    "---",
    "...",
    "\t",
    "\0",
    "0x",
    "1:60",
    "!!timestamp ",
    "!!set ",
    "!!omap ",
]
YAML_TEXT = st.lists(st.sampled_from(YAML_WORDS) | st.text(max_size=3), max_size=12).map("".join)


@fuzz(max_examples=300)
@given(YAML_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40))
def test_a_yaml_file_of_any_text_is_read_or_refused(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    for read in (lambda: MLA.of(read_yaml(path), "x.yaml"), lambda: MLAPlan.read(path)):
        try:
            read()
        except AnymlaError as error:
            assert len(str(error)) < LONGEST + len(str(tmp_path))


@st.composite
def plans(draw) -> dict[str, Any]:
    plan = make_plan("model", read_model_spec(json.loads((BUNDLED / "config.json").read_text())), MLA())
    content = plan.model_dump(mode="json")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([content, content["recipe"], *content["layers"]]))
        place[draw(st.sampled_from(sorted(place)) | st.text(max_size=3))] = draw(VALUES | st.just(16) | st.just([2, 4]))
        layers = content.get("layers")
        if not isinstance(layers, list) or not all(isinstance(each, dict) for each in [content.get("recipe"), *layers]):
            break
    return content


@fuzz(max_examples=150)
@given(plans())
def test_a_plan_fits_or_is_refused(tmp_path, content):
    model_spec = read_model_spec(json.loads((BUNDLED / "config.json").read_text()))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        plan = MLAPlan.read(path)
        check_plan(plan, "model", model_spec)
    except AnymlaError as error:
        assert len(str(error)) < LONGEST + len(str(tmp_path))
        return
    json.dumps(explain(plan, model_spec))


@fuzz(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 4863), st.integers(0, 7)), min_size=1, max_size=4))
@example([(7, 7)])
@example([(0, 0)])
def test_bits_flipped_in_the_header_of_weights(tmp_path, flips):
    content = bytearray((BUNDLED / "model.safetensors").read_bytes())
    for byte, bit in flips:
        content[byte] ^= 1 << bit
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        held_tensors([path])
    except AnymlaError as error:
        assert not isinstance(error, SafetensorError)
        assert len(str(error)) < LONGEST + len(str(tmp_path))
