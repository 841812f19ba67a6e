"""Options of the command line: every setting is one, help tells all, and a recipe's file gives way to them."""

import json

import pytest

from anymla import cli, pipeline
from anymla.errors import AnymlaError
from anymla.methods.mla.settings import MLA
from tests.damage import BUNDLED, run_main

COMMANDS = (
    "demo",
    "inspect",
    "plan",
    "convert",
    "compare",
    "tune",
    "eval",
    "generate",
    "chat",
    "doctor",
    "export",
    "push",
    "refresh",
    "run",
    "methods",
)
OTHER_THAN_DEFAULT = {
    "kv_cache": 0.5,
    "target": "vllm",
    "cache_type": "fp8",
    "rope": "uniform",
    "rope_dims": 4,
    "kv_rank": 9,
    "ranks": "energy",
    "effort": "quick",
    "exact_window": 16,
    "static_qk_norm": True,
    "factorization": "joint-svd",
    "expected_rotation": False,
    "reconstruction_steps": 11,
    "calibration": "stories.txt",
    "calibration_tokens": 999,
    "calibration_length": 77,
    "adapter": "none",
    "device": "cuda:3",
    "dtype": "bfloat16",
    "seed": 5,
}


def option(name, value):
    """A setting as a command line gives it."""
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name.replace('_', '-')}"]
    return [f"--{name.replace('_', '-')}", str(value)]


def test_options_override_the_recipe_file(anymla, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kv_cache: 0.5\nrope: high\nseed: 3\n")
    chosen = json.loads(anymla("plan", BUNDLED, "--recipe", recipe, "--kv-cache", "0.25", "--json"))["recipe"]
    assert (chosen["kv_cache"], chosen["rope"], chosen["seed"]) == (0.25, "high", 3)
    assert chosen["factorization"] == MLA().factorization


def test_every_setting_of_a_recipe_is_tried():
    assert set(OTHER_THAN_DEFAULT) == set(MLA.model_fields)
    default = MLA().model_dump()
    assert [name for name, value in OTHER_THAN_DEFAULT.items() if value == default[name]] == []


@pytest.mark.parametrize("name", OTHER_THAN_DEFAULT)
def test_every_setting_is_an_option_of_convert(name, monkeypatch, capfd, tmp_path):
    taken = []

    def convert(model, output, recipe, **given):
        taken.append({key: value for key, value in given.items() if key in MLA.model_fields})
        raise AnymlaError("far enough")

    monkeypatch.setattr(pipeline, "convert", convert)
    arguments = [*option(name, OTHER_THAN_DEFAULT[name]), "-o", str(tmp_path / "out")]
    run = run_main(["convert", str(BUNDLED), *arguments], monkeypatch, capfd)
    assert run.err.endswith("error: far enough\n")
    assert taken == [{name: OTHER_THAN_DEFAULT[name]}]


def test_every_setting_is_an_option_of_plan(anymla):
    settings = OTHER_THAN_DEFAULT | {
        "static_qk_norm": False,
        "exact_window": 0,
        "ranks": "uniform",
    }  # which do not go with all
    given = [part for name, value in settings.items() for part in option(name, value)]
    chosen = json.loads(anymla("plan", BUNDLED, "--json", *given))["recipe"]
    assert chosen == settings


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, anymla):
    text = anymla(*command.split(), "--help")
    assert f"Usage: anymla {command}".strip() in text
    assert all(name in text for name in (COMMANDS if not command else ["--help"]))


def test_help_of_convert_tells_every_setting(anymla, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = "".join(anymla("convert", "--help").split())  # lines also break at hyphens
    for name, field in MLA.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(field.description.split()) in text


def test_the_commands_are_known():
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kv-cache", "12.5%"], "'--kv-cache': Input should be a valid number, got '12.5%': write 0.125"),
        (["--kv-cache=8 %"], "'--kv-cache': Input should be a valid number, got '8 %': write 0.08"),
        (["--kv-cache", "half"], "'--kv-cache': Input should be a valid number, got 'half'"),
        (["--calibration-tokens", "50%"], "'--calibration-tokens': Input should be a valid integer, got '50%'"),
        (["--calibration-tokens", "1e3"], "'--calibration-tokens': Input should be a valid integer, got '1e3'"),
        (["--kv-cache", "12.5"], "kv_cache: must be less than or equal to 1, got 12.5; it is a share: 0.125 is 12.5 %"),
    ],
)
def test_a_value_that_is_no_number_is_named(arguments, said, monkeypatch, capfd, tmp_path):
    done = run_main(["convert", str(BUNDLED), "-o", str(tmp_path / "out"), *arguments], monkeypatch, capfd)
    assert (done.code, done.out) == (1, "")
    assert done.err.strip().endswith(said)
