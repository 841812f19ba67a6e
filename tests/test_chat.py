"""A talk keeps its cache, reads what is new alone, and tells the bytes that the account counts."""

import builtins
import io
import sys

import pytest
import torch

from anymla.account import account
from anymla.architectures.model_spec import spec_of
from anymla.errors import CheckpointError, TextError
from anymla.evaluation.generation import Talk, blaming
from anymla.io.checkpoint import load_tokenizer
from tests.coded_models import coded_model
from tests.damage import BUNDLED, run_main

GREEDY = {"do_sample": False}
LINES = ("Once upon a time", "Then the dog", "They went home")
TEMPLATE = (  # as SmolLM2's, a system prompt that is put by itself; as Llama 3's, lines without the spaces around them
    "{% if messages[0]['role'] != 'system' %}<system>Be kind.</system>{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</{{ message['role'] }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ALONE = "<user>{{ messages[-1]['content'] }}</user>"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


@pytest.fixture(params=["latent", "coded"])
def model(request, original):
    if request.param == "coded":
        return coded_model(original, bits=4, first_tokens=2)
    return request.getfixturevalue("converted")


def read_by(model):
    """How many tokens each of its passes reads, as they come."""
    counts = []
    model.register_forward_pre_hook(
        lambda module, given, named: counts.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


def with_template(tokenizer, template, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_going_on_gives_what_reading_all_at_once_gives(template, model, tokenizer, monkeypatch):
    tokenizer = with_template(tokenizer, template, monkeypatch)
    talk, before = Talk(model, tokenizer, options=GREEDY), None
    counts = read_by(model)
    for line in LINES:
        known = talk.cached_tokens
        counts.clear()
        answer = talk.answer(line, max_new_tokens=6)
        assert answer and counts == [talk.cached_tokens - 5 - known, *5 * [1]]
        afresh = Talk(model, tokenizer, options=GREEDY, ids=before)  # without a cache
        assert afresh.answer(line, max_new_tokens=6) == answer
        assert torch.equal(afresh.ids, talk.ids)
        before = talk.ids


def test_a_template_is_put_as_it_puts_the_whole_talk(original, tokenizer, monkeypatch):
    tokenizer = with_template(tokenizer, TEMPLATE, monkeypatch)
    talk, turns = Talk(original, tokenizer, options=GREEDY), []
    for line in LINES:
        turns.append({"role": "user", "content": line})
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        answer = talk.answer(line, max_new_tokens=6)
        turns.append({"role": "assistant", "content": answer})
        said = tokenizer.decode(talk.ids, skip_special_tokens=True)
        assert "".join(said.split()) == "".join((whole + answer).split())


def test_its_bytes_are_those_of_the_account(model, tokenizer):
    talk = Talk(model, tokenizer, options=GREEDY)
    spec = spec_of(model.config.to_dict())
    for line in LINES[:2]:
        talk.answer(line, max_new_tokens=5)
        counted = account(spec, [talk.cached_tokens]).cache_bytes_at
        assert talk.cache_bytes() == counted[str(talk.cached_tokens)]


def test_a_talk_ends_where_the_context_does(original, tokenizer):
    talk = Talk(original, tokenizer, 16, GREEDY)
    talk.answer(LINES[0], max_new_tokens=100)
    assert len(talk.ids) == 16
    with pytest.raises(TextError, match="context of 16 tokens"):
        talk.answer(LINES[1], max_new_tokens=100)


def test_templates_that_cannot_be_gone_on_with(original, tokenizer, monkeypatch):
    talk = Talk(original, with_template(tokenizer, LAST_ALONE, monkeypatch), options=GREEDY)
    talk.answer(LINES[0], max_new_tokens=2)
    with pytest.raises(CheckpointError, match="leaves earlier answers out"):
        talk.answer(LINES[1], max_new_tokens=2)
    broken = with_template(tokenizer, "{{ raise_exception('no') }}", monkeypatch)
    with pytest.raises(CheckpointError, match="chat template cannot be used: no"):
        Talk(original, broken).answer(LINES[0], max_new_tokens=2)


def test_what_an_answer_ends_with_is_the_templates_to_say(original, tokenizer, monkeypatch):
    first = Talk(original, tokenizer, options=GREEDY)
    first.answer(LINES[0], max_new_tokens=3)
    monkeypatch.setattr(original.generation_config, "eos_token_id", [int(first.ids[-1])])
    talk = Talk(original, tokenizer, options=GREEDY)
    talk.answer(LINES[0], max_new_tokens=20)
    assert len(talk.ids) == talk.cached_tokens == len(first.ids) - 1


def test_generates_own_failure_is_one_line():
    with pytest.raises(CheckpointError, match="OUT cannot continue the prompt: no such"), blaming("OUT"):
        raise ValueError("no such\nthing")


def test_chat_beside_the_original(converted_folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{LINES[0]}\n\n{LINES[1]}\n/exit\n{LINES[2]}\n"))
    arguments = ["chat", str(converted_folder), "--against", str(BUNDLED), "--max-new-tokens", "6"]
    run = run_main(arguments, monkeypatch, capfd)
    assert (run.code, run.err.count("\n")) == (0, 1) and "no chat template" in run.err
    lines = run.out.splitlines()
    assert [line for line in lines if line.startswith("> ")] == [f"> {line}" for line in LINES[:2]]
    assert lines.count(f"{converted_folder}:") == lines.count(f"{BUNDLED}:") == 2
    told = [line for line in lines if line.startswith("[")]
    assert len(told) == 4 and all("times as much" in line for line in told[1::2])
    assert " 4 times as much]" in told[1]
    tokens = [int(line[1:].split()[0]) for line in told]
    assert tokens[0] < tokens[2]


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_end_a_talk(key, monkeypatch, capfd):
    typed = iter([LINES[0]])

    def line(prompt):
        for each in typed:
            return each
        raise key

    monkeypatch.setattr(builtins, "input", line)
    run = run_main(["chat", str(BUNDLED), "--max-new-tokens", "2"], monkeypatch, capfd)
    assert run.code == 0 and "cache" in run.out and run.err.startswith("note: ")


def test_ctrl_c_ends_a_talk_in_the_middle_of_an_answer(monkeypatch, capfd):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Talk, "answer", stopped)
    monkeypatch.setattr(sys, "stdin", io.StringIO(LINES[0]))
    run = run_main(["chat", str(BUNDLED)], monkeypatch, capfd)
    assert run.code == 0 and run.out.startswith(f"> {LINES[0]}\n")
