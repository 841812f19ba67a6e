"""`anymla methods STEP`: every setting with what it may be, and an example that runs."""

import shlex

import pytest

from anymla.methods.base import all_methods
from anymla.recipe import given_recipe
from anymla.report.methods import settings_of
from tests.damage import run_main


@pytest.mark.parametrize("name", all_methods())
def test_a_step_is_shown_with_its_settings_and_an_example(name, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    done = run_main(["methods", name], monkeypatch, capfd)
    assert done.code == 0, done.err
    for setting in settings_of(all_methods()[name]):
        assert f"  {setting['name']}: {setting['allowed'].split()[0]}" in done.out
        assert setting["allowed"] != "a value"
    lines = done.out.splitlines()
    words = shlex.split(lines[-1])
    assert words[:3] == ["anymla", "run", "MODEL"]
    (step,) = given_recipe(words[2], [words[-1]], [], {}).steps
    assert step.name == name and step.model_dump(exclude_unset=True)
    assert all(len(line) <= 80 for line in lines[:-1])


def test_a_wrong_name_gets_the_nearest(monkeypatch, capfd):
    done = run_main(["methods", "kvqant"], monkeypatch, capfd)
    assert done.code == 1 and "'kvqant'" not in done.out and "did you mean kvquant?" in done.err
