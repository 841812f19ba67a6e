"""Exports: stock DeepSeek checkpoints that compute what the converted model does, or one clear line and nothing."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

import anymla
from anymla.architectures.attention import read_attention
from anymla.architectures.blueprint import read_blueprint
from anymla.architectures.families import FAMILIES
from anymla.architectures.static_norm import with_static_norms
from anymla.errors import (
    AnymlaError,
    CheckpointError,
    InfeasibleError,
    OutputError,
    ParityError,
    RecipeError,
    UnsupportedModelError,
)
from anymla.exports import parity
from anymla.exports.deepseek import write_deepseek
from anymla.exports.fold import channel_slots
from tests.damage import run_main
from tests.families import ROPES, logits, make_model, save_model, token_ids
from tests.family_models import tiny_model

FAST = {"calibration_tokens": 512, "calibration_length": 32, "reconstruction_steps": 2}
# shapes of Llama, and families whose layers fold into DeepSeek's: (id, family, changes)
LLAMAS = [
    ("mha", {"num_key_value_heads": 6}),
    ("gqa", {}),
    ("mqa", {"num_key_value_heads": 1}),
    ("tied", {"tie_word_embeddings": True}),
    ("head-dim-14", {"head_dim": 14}),
    ("head-dim-16", {"head_dim": 16}),
    ("eps-of-deepseek", {"rms_norm_eps": 1e-6}),
    ("eps-that-matters", {"rms_norm_eps": 1e-2}),
    ("theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("llama3", {"head_dim": 16, "rope_parameters": ROPES["llama3"] | {"rope_theta": 100.0}}),
]
OTHERS = [
    ("mistral", {"sliding_window": None}),
    (
        "granite",
        {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    ),
    ("granite", {"tie_word_embeddings": True, "logits_scaling": 3.0}),
    ("phi3", {"rope_parameters": ROPES["default"] | {"rope_theta": 10000.0}}),
    ("ernie4_5", {"use_bias": False}),
    ("helium", {}),
    ("glm", {"attention_bias": False}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": False}),
    ("smollm3", {"no_rope_layers": [1, 1], "use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    ("ministral", {"sliding_window": 256, "layer_types": ["full_attention"] * 2}),
]
TARGET = {"kv_cache": 0.5, "target": "deepseek"}


@pytest.fixture(scope="module", params=[0.5, 0.3125])
def stories(request, tmp_path_factory):
    """The bundled model converted for DeepSeek's layout, and its export."""
    folder, share = tmp_path_factory.mktemp("stories"), request.param
    settings = {"calibration_tokens": 8192, "calibration_length": 128, "reconstruction_steps": 10}
    report = anymla.convert(bundled(), folder / "converted", kv_cache=share, target="deepseek", **settings)
    done = anymla.export(folder / "converted", folder / "export")
    return SimpleNamespace(
        share=share, report=report, done=done, converted=folder / "converted", export=folder / "export"
    )


def bundled():
    from anymla.report.demo import bundled_model

    return bundled_model()


def converted(folder, model, **settings):
    source = save_model(model, folder / "source")
    anymla.convert(source, folder / "converted", **FAST | TARGET | settings)
    return folder / "converted"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def difference(before, after, length=40):
    """Largest difference of logits over their standard deviation."""
    expected = logits(before, token_ids(length=length))
    assert expected.std() > 0.05
    return ((logits(after, token_ids(length=length)) - expected).abs().max() / expected.std()).item()


@torch.no_grad()
def cached_logits(model, ids):
    """All but four tokens at once, the rest one by one."""
    output = model(input_ids=ids[:, :-4], use_cache=True)
    found = [output.logits]
    for index in range(ids.shape[1] - 4, ids.shape[1]):
        output = model(input_ids=ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-5)])
@pytest.mark.parametrize("changes", [case[1] for case in LLAMAS], ids=[case[0] for case in LLAMAS])
def test_llama_as_deepseek(tmp_path, changes, dtype, tolerance):
    """In float64 what is left is the norms and rope tables that transformers computes in float32."""
    source = converted(tmp_path, make_model("llama", getattr(torch, dtype), **changes))
    (tmp_path / "export").mkdir()
    write_deepseek(source, tmp_path / "export")  # anymla.export writes no float64
    before, after = load(source, dtype=dtype), load(tmp_path / "export", dtype=dtype)
    assert type(after) is DeepseekV3ForCausalLM
    assert difference(before, after) < tolerance
    ids = token_ids()
    assert (cached_logits(after, ids) - logits(after, ids)).abs().max() < tolerance * logits(after, ids).std()
    planned = {layer.cached_numbers for layer in anymla.Plan.read(source / "plan.yaml").layers}
    found = parity.check_parity(source, tmp_path / "export")
    assert {found.cached_numbers} == planned
    assert found.tokens == found.of == 96


@pytest.mark.parametrize(("family", "changes"), OTHERS)
def test_other_families_as_deepseek(tmp_path, family, changes):
    source = converted(tmp_path, tiny_model(family, torch.float32, **changes))
    anymla.export(source, tmp_path / "export")
    assert difference(load(source), load(tmp_path / "export")) < 1e-4


@pytest.mark.parametrize(
    ("pad", "sizes"), [("cpu", (512, 64, 8, 8)), ("cuda", (None, 64, 64, 128)), ("full", (512, 64, 64, 128))]
)
def test_padding_is_exact(stories, tmp_path, pad, sizes):
    anymla.export(stories.converted, tmp_path / "export", pad=pad)
    after = load(tmp_path / "export")
    config = after.config
    found = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    assert found == (sizes[0] or load(stories.converted).config.kv_lora_rank, *sizes[1:])
    assert difference(load(stories.converted), after, length=200) < 1e-4


def test_stories_give_the_same_tokens(stories):
    """The bar: 3 x 32 greedy tokens, and the cache that was planned."""
    assert (stories.done.parity.tokens, stories.done.parity.of) == (96, 96)
    assert stories.done.parity.difference < 1e-4
    assert stories.done.parity.cached_numbers == 64 * stories.share
    sizes = {file.name: file.stat().st_size for file in stories.export.iterdir()}
    assert stories.done.bytes == sum(sizes.values()) - sizes["README.md"] - sizes["export.json"]
    assert difference(load(stories.converted), load(stories.export), length=400) < 1e-4


def test_loads_where_there_is_no_anymla(stories):
    """An isolated interpreter in which importing anymla fails; stock transformers, no remote code."""
    code = (
        "import sys\n"
        "sys.modules['anymla'] = None\n"
        "import json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()\n"
        "ids = AutoTokenizer.from_pretrained(folder)('Once upon a time', return_tensors='pt').input_ids\n"
        "out = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)\n"
        "print(json.dumps(out[0].tolist()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(stories.export)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(stories.converted)("Once upon a time", return_tensors="pt").input_ids
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    assert json.loads(run.stdout) == load(stories.converted).generate(ids, **options)[0].tolist()


def test_a_plan_for_deepseek_costs_little(stories):
    """Against a free plan with the same settings: KL at 50 % 0.07 and 0.08, at 31.25 % 0.29 and 0.32 (40 steps)."""
    assert stories.report.after.kl < (0.2 if stories.share == 0.5 else 0.6)
    layers = stories.report.plan.layers
    assert all(layer == layers[0] for layer in layers)
    assert layers[0].rope_step is not None


def test_bfloat16(stories, tmp_path):
    done = anymla.export(stories.converted, tmp_path / "export", dtype="bfloat16")
    assert load(tmp_path / "export").dtype == torch.bfloat16
    assert done.parity.difference < done.parity.tolerance == 0.1


def test_float32_export_of_bfloat16_weights_rounds_nothing(tmp_path):
    source = converted(tmp_path, make_model("llama", torch.bfloat16))
    assert anymla.export(source, tmp_path / "export", dtype="float32").parity.difference < 1e-4
    assert anymla.export(source, tmp_path / "same").parity.tolerance == 0.1


def test_latent_norm_is_neutral_for_any_token(stories):
    """For inputs of the largest size a norm can give, the latent behind kv_a_layernorm is linear in them."""
    attention = load(stories.export, dtype="float64").model.layers[0].self_attn
    norm = load(stories.export).model.layers[0].input_layernorm.weight.double()
    x = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = norm * x / x.square().mean(-1, keepdim=True).sqrt()
    rank = attention.kv_lora_rank
    latent = attention.kv_a_proj_with_mqa(x)[:, :rank]
    linear = latent * attention.kv_a_layernorm.weight.double() / math.sqrt(1e-6)
    assert linear.abs().max() > 0.1
    torch.testing.assert_close(attention.kv_a_layernorm(latent).double(), linear, rtol=2**-22, atol=0)


@pytest.mark.parametrize(("channels", "rope"), [(4, 8), (3, 64), (4, 64), (32, 64), (20, 64), (1, 2)])
def test_padded_places_hold_all_channels(channels, rope):
    slots = channel_slots(channels, rope)
    assert len(slots.unique()) == channels
    assert slots[-1] < rope // 2


def test_strided_channels(tmp_path):
    """Every third frequency of sixteen, told by the plan; the export's base has them in a row."""
    plan = anymla.plan(
        save_model(make_model("llama", torch.float32, head_dim=32), tmp_path / "source"), **FAST | TARGET
    )
    given = {"rope_dims": 12, "kv_rank": plan.layers[0].cached_numbers - 12, "rope_choices": (), "rope_step": 3}
    plan = plan.model_copy(update={"layers": tuple(layer.model_copy(update=given) for layer in plan.layers)})
    anymla.convert(tmp_path / "source", tmp_path / "converted", plan)
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert stored["model.layers.1.self_attn.channel_index"].tolist() == [0, 3, 6, 9, 12, 15]
    for pad in ("none", "cpu"):
        anymla.export(tmp_path / "converted", tmp_path / pad, pad=pad)
        assert difference(load(tmp_path / "converted"), load(tmp_path / pad), length=200) < 1e-4


def test_static_norms_are_another_model_and_say_so(tmp_path, monkeypatch, capfd):
    source = save_model(make_model("qwen3", torch.float32, head_dim=16), tmp_path / "source")
    options = "--kv-cache 0.5 --target deepseek --static-qk-norm --calibration-tokens 512 --calibration-length 32"
    arguments = ["convert", str(source), "-o", str(tmp_path / "converted"), *options.split()]
    done = run_main([*arguments, "--reconstruction-steps", "2"], monkeypatch, capfd)
    assert done.code == 0
    assert "fixed scales stand in for norms" in done.err
    lost = [layer["norms_lost"] for layer in json.loads((tmp_path / "converted/conversion.json").read_text())["layers"]]
    assert all(0.001 < each < 0.5 for each in lost)
    assert anymla.export(tmp_path / "converted", tmp_path / "export").parity.difference < 1e-4
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"lose {sum(lost) / len(lost):.2%}" in card and f"{max(lost):.2%} in the worst layer" in card


def test_static_norms_lose_nothing_where_norms_do_nothing():
    """Inputs whose queries and keys all have one size per head: the fixed scales are the norms."""
    model = make_model("qwen3", head_dim=8, num_attention_heads=6)
    attention, config = model.model.layers[0].self_attn, model.config
    spec = read_blueprint(config.to_dict()).layers[0]
    source = read_attention(attention, spec, FAMILIES["qwen3"], config)
    inputs = torch.randn(1, 1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(2, 5, 1)
    inputs[1] *= -1
    static = with_static_norms(source, [inputs])
    assert not static.norms
    for found, expected in zip(static.project(inputs), source.project(inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_goes_on_with_the_split_that_was_chosen(tmp_path):
    """A conversion stopped behind its first layer looks at no split again, and ends in the same weights."""

    def stop(done, *_):
        if done == 1:
            raise KeyboardInterrupt

    source = save_model(make_model("llama", torch.float32, head_dim=16), tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        anymla.convert(source, tmp_path / "out", **FAST | TARGET, progress=stop)
    kept = json.loads((tmp_path / ".out.partial/.work/progress.json").read_text())
    assert len(kept["split"]) == 2
    anymla.convert(source, tmp_path / "out", **FAST | TARGET)
    anymla.convert(source, tmp_path / "whole", **FAST | TARGET)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards(stories, tmp_path, monkeypatch):
    from anymla.exports import weights

    monkeypatch.setattr(weights.write_weights, "__kwdefaults__", {"size": 200_000})
    anymla.export(stories.converted, tmp_path / "export")
    assert len(list(tmp_path.glob("export/model-*-of-*.safetensors"))) > 2
    assert difference(load(stories.export), load(tmp_path / "export")) == 0


def refused(kind, tmp_path, call, *words):
    """One line that names what is wrong; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as error:
        call()
    assert isinstance(error.value, AnymlaError)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("qwen2", {}, "biases"),
        ("qwen3", {"head_dim": 8}, "norms on queries and keys"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("mistral", {"sliding_window": 24}, "window of 24"),
        ("llama", {"head_dim": 8, "rope_parameters": ROPES["yarn"] | {"rope_theta": 10000.0}}, "yarn"),
    ],
)
def test_planning_refuses_what_deepseek_cannot_hold(tmp_path, family, changes, word):
    source = save_model(make_model(family, torch.float32, **changes), tmp_path / "source")
    left = "it serves in transformers" if word.startswith("window") else "--target vllm can hold it"
    refused(
        UnsupportedModelError,
        tmp_path,
        lambda: anymla.convert(source, tmp_path / "out", **FAST, target="deepseek"),
        word,
        left,
    )


def test_static_norms_are_for_layouts_without_norms():
    with pytest.raises(RecipeError, match="--static-qk-norm"):
        anymla.plan(bundled(), static_qk_norm=True)


@pytest.mark.parametrize("settings", [{"rope": "uniform"}, {"rope": "rorope"}, {"rope_dims": 10}])
def test_planning_refuses_channels_off_the_grid(settings):
    with pytest.raises(InfeasibleError, match="--target deepseek"):
        anymla.plan(bundled(), **TARGET | settings)


def test_a_plan_from_elsewhere_keeps_to_the_grid(tmp_path):
    plan = anymla.plan(bundled(), **TARGET)
    wide = {"rope_dims": 8, "kv_rank": 24, "rope_choices": (), "rope_step": 2}
    changed = plan.model_copy(update={"layers": tuple(layer.model_copy(update=wide) for layer in plan.layers)})
    refused(InfeasibleError, tmp_path, lambda: anymla.convert(bundled(), tmp_path / "out", changed), "rope_step 2")
    mixed = plan.model_copy(update={"layers": (plan.layers[0].model_copy(update=wide), *plan.layers[1:])})
    refused(InfeasibleError, tmp_path, lambda: anymla.convert(bundled(), tmp_path / "out", mixed), "one split for all")


def test_refuses_a_free_plan(converted_folder, tmp_path):
    words = ("bias", "--target deepseek", "--to vllm")
    refused(UnsupportedModelError, tmp_path, lambda: anymla.export(converted_folder, tmp_path / "out"), *words)


def test_refuses_what_is_not_converted(tmp_path):
    refused(CheckpointError, tmp_path, lambda: anymla.export(bundled(), tmp_path / "out"), "anymla convert")
    refused(AnymlaError, tmp_path, lambda: anymla.export(bundled(), tmp_path / "out", "onnx"), "--to onnx")
    refused(AnymlaError, tmp_path, lambda: anymla.export(bundled(), tmp_path / "out", pad="x"), "--pad x")


def test_refuses_float16_and_an_output_that_exists(stories, tmp_path):
    anymla.convert(bundled(), tmp_path / "half", **FAST | TARGET, dtype="float16")
    refused(UnsupportedModelError, tmp_path, lambda: anymla.export(tmp_path / "half", tmp_path / "out"), "bfloat16")
    refused(OutputError, tmp_path, lambda: anymla.export(stories.converted, tmp_path / "half"), "--overwrite")


def test_refuses_to_call_a_wrong_export_done(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", {"float32": 1e-9})
    call = lambda: anymla.export(stories.converted, tmp_path / "out")  # noqa: E731
    refused(ParityError, tmp_path, call, "not the converted model", "96 of 96")


def test_refuses_a_cache_that_was_not_planned(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_cached_numbers", lambda model, ids: 99.0)
    call = lambda: anymla.export(stories.converted, tmp_path / "out")  # noqa: E731
    refused(ParityError, tmp_path, call, "caches 99 numbers per token and layer", "nothing was written")


def test_refuses_nan(stories, tmp_path):
    """In any place of the scores, and where vLLM's head would be."""
    from anymla.exports.vllm import _check_head

    real = parity._logits
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParityError, match="differ by nan"):
        calls = []

        def spoiled(model, ids):
            calls.append(logits := real(model, ids))
            if len(calls) == 5:  # the export's second
                logits[3, 7] = float("nan")
            return logits

        patch.setattr(parity, "_logits", spoiled)
        parity.check_parity(stories.converted, stories.export)
    model = load(stories.converted)
    _check_head(model)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UnsupportedModelError, match="does more to its logits"):
        _check_head(model)


def test_a_short_context(tmp_path):
    """GPT-2's positions are a table: prompts and new tokens are cut to it."""
    source = save_model(tiny_model("gpt2", torch.float32, n_positions=48), tmp_path / "source")
    anymla.convert(source, tmp_path / "converted", kv_cache=0.5, **FAST | {"calibration_length": 16})
    done = anymla.export(tmp_path / "converted", tmp_path / "out", "vllm")
    assert done.parity.tokens == done.parity.of == 3 * 24


def with_config(folder, change):
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def with_tensor(folder, end, change):
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.self_attn.{end}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "no-dtype": (lambda at: with_config(at, lambda fields: fields.pop("dtype")), "dtype is None"),
    "strange-dtype": (lambda at: with_config(at, lambda fields: fields.update(dtype="int8")), "dtype"),
    "no-layers": (lambda at: with_config(at, lambda fields: fields.update(mla_layers=[])), "mla_layers"),
    **{
        f"{name}-{value}": (
            lambda at, name=name, value=value: with_config(
                at, lambda fields: fields["mla_layers"][1].update({name: value})
            ),
            "mla_layers" if value in ("x", 0, None) or isinstance(value, float) or name == "module" else "1.self_attn.",
        )
        for name, value in (
            ("head_dim", "x"),
            ("head_dim", 0),
            ("num_kv_heads", 4.0),
            ("module", 3),
            ("scaling", None),
            ("kv_lora_rank", 27),
            ("num_heads", 4),
            ("rope_pairs", 3),
            ("qk_rope_head_dim", 2),
        )
    },
    "row-short": (lambda at: with_tensor(at, "kv_b_proj.weight", lambda weight: weight[:-1]), "kv_b_proj.weight is"),
    "flat": (lambda at: with_tensor(at, "q_proj.weight", lambda weight: weight.flatten()), "q_proj.weight is"),
    "pair": (lambda at: with_tensor(at, "channel_index", lambda index: index + 9), "channel_index"),
}


@pytest.mark.parametrize("target", ["deepseek", "vllm", "gguf"])
@pytest.mark.parametrize(("damage", "word"), DAMAGES.values(), ids=DAMAGES)
def test_refuses_broken_conversions(stories, tmp_path, damage, word, target):
    import shutil

    shutil.copytree(stories.converted, tmp_path / "model")
    damage(tmp_path / "model")
    call = lambda: anymla.export(tmp_path / "model", tmp_path / "out", target)  # noqa: E731
    refused(CheckpointError, tmp_path, call, word)


def test_clears_what_killed_runs_left(stories, tmp_path):
    """Not what a run that is still at work holds, nor what belongs to another output."""
    from anymla.io.work import hold

    left = [tmp_path / f".{name}-123456789/deepseek" for name in ("out.partial", "other.partial")]
    for folder in (*left, held := tmp_path / ".out.partial-1"):
        folder.mkdir(parents=True)
    handle = hold(held)
    anymla.export(stories.converted, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", left[1].parent.name, held.name}
    os.close(handle)
    anymla.export(stories.converted, tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", left[1].parent.name}


def test_parity_sees_a_changed_weight(stories, tmp_path):
    """One projection of one layer, a tenth larger."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(stories.export, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"] *= 1.1
    save_file(tensors, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError):
        parity.check_parity(stories.converted, tmp_path / "export")


def test_command_line(stories, tmp_path, monkeypatch, capfd):
    arguments = ["export", str(stories.converted), "--to", "deepseek", "-o", str(tmp_path / "out")]
    done = run_main(arguments, monkeypatch, capfd)
    assert (done.code, done.err) == (0, "")
    assert "96 of 96 greedy tokens equal" in done.out
    served = f"python -m vllm.entrypoints.openai.api_server --model {tmp_path / 'out'} --dtype float32\n"
    assert f"vLLM (GPU):   {served}" in done.out
    assert "sglang" not in done.out
    done = run_main([*arguments, "--overwrite", "--json"], monkeypatch, capfd)
    report = json.loads(done.out)
    assert (report["target"], report["parity"]["tokens"]) == ("deepseek", 96)
    done = run_main(arguments, monkeypatch, capfd)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("to", "options", "cuda", "engine", "ends"),
    [
        ("deepseek", {}, False, "vLLM (GPU)", "--dtype float32"),
        ("deepseek", {"pad": "cuda", "dtype": "bfloat16"}, True, "vLLM (GPU)", "--dtype bfloat16"),
        (
            "deepseek",
            {"pad": "cpu"},
            False,
            "vLLM (CPU)",
            """--attention-backend CPU_MLA --compilation-config '{"custom_ops": ["-rotary_embedding"]}'""",
        ),
        ("deepseek", {"pad": "full"}, True, "vLLM", "--dtype float32"),
        ("vllm", {}, False, "vLLM (CPU)", "--trust-remote-code --dtype float32 --attention-backend CPU_MLA"),
        ("vllm", {"pad": "none"}, False, "vLLM (GPU)", "--trust-remote-code --dtype float32"),
    ],
)
def test_commands_serve_what_was_written(stories, tmp_path, monkeypatch, to, options, cuda, engine, ends):
    """By a shell, from a folder whose name a shell would take apart."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    done = anymla.export(stories.converted, tmp_path / "my $export's", to, **options)
    assert [name for name in done.commands if name.startswith("vLLM")] == [engine]
    assert done.commands[engine].endswith(ends)
    assert ("SGLang" in done.commands) == (options.get("pad") == "full")
    assert all(str(tmp_path / "my $export's") in shlex.split(command) for command in done.commands.values())
    card = (tmp_path / "my $export's" / "README.md").read_text()
    assert f"api_server --model THIS_FOLDER{' --trust-remote-code' if to == 'vllm' else ''} --dtype" in card


def test_says_where_the_cache_is_no_smaller(stories, tmp_path, monkeypatch, capfd):
    arguments = ["export", str(stories.converted), "--to", "vllm", "-o", str(tmp_path / "out"), "--json"]
    done = run_main(arguments, monkeypatch, capfd)
    report = json.loads(done.out)
    assert (report["cached_numbers"], report["original_numbers"], report["pad"]) == (576, 64, "cpu")
    assert done.err.startswith("warning: the export caches 576 numbers per token and layer, the original 64")
    assert "--pad none" in done.err
    done = run_main([*arguments, "--pad", "none", "--overwrite"], monkeypatch, capfd)
    assert (json.loads(done.out)["cached_numbers"], done.err) == (64 * stories.share, "")


@pytest.mark.parametrize(("to", "known"), [("deepseek", "float32 or bfloat16"), ("vllm", "bfloat16 or float16")])
def test_refuses_a_dtype_that_nobody_asked_for(tmp_path, to, known):
    anymla.convert(bundled(), tmp_path / "wide", **FAST | TARGET, dtype="float64")
    call = lambda: anymla.export(tmp_path / "wide", tmp_path / "out", to)  # noqa: E731
    refused(UnsupportedModelError, tmp_path, call, "is in float64", known)
    assert anymla.export(tmp_path / "wide", tmp_path / "out", to, dtype="float32").parity.tokens == 96


def test_inspect_targets(tmp_path, monkeypatch, capfd):
    done = run_main(["inspect", str(bundled()), "--targets", "--json"], monkeypatch, capfd)
    targets = json.loads(done.out)["targets"]
    assert [targets[name]["export"] for name in ("transformers", "deepseek", "vllm", "gguf")] == [
        "exact",
        "constrained",
        "exact",
        "constrained",
    ]
    assert "at most 4 rope channels" in targets["deepseek"]["why"]
    save_model(make_model("qwen3", torch.float32, head_dim=8), tmp_path)
    done = run_main(["inspect", str(tmp_path), "--targets"], monkeypatch, capfd)
    assert (done.code, done.out.count("lossy"), done.out.count("--static-qk-norm")) == (0, 2, 2)


def test_inspect_targets_of_latent_attention(stories, monkeypatch, capfd):
    for folder, words in ((stories.export, "kv_lora_rank"), (stories.converted, "written by anymla")):
        done = run_main(["inspect", str(folder), "--targets"], monkeypatch, capfd)
        assert done.code == 0
        assert "already multi-head latent attention" in done.out and words in done.out
        assert "serve it as it is" in done.out and "anymla export" in done.out


def test_inspect_targets_of_experts(tmp_path):
    """They convert and export; vLLM on a CPU does not run them."""
    found = anymla.inspect(save_model(tiny_model("mixtral", torch.float32, sliding_window=None), tmp_path)).targets
    assert found["vllm"][0] == "exact" and "on GPUs only" in found["vllm"][1]
    assert "GPUs" not in anymla.inspect(bundled()).targets["vllm"][1]
