"""Shared attention maps: exact where layers agree, the same in every way of running, chosen by KL, healed by tuning."""

from __future__ import annotations

import json
from itertools import combinations
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StaticCache

import anymla
from anymla.data.text import bundled_text, calibration_windows
from anymla.demo import bundled_model
from anymla.errors import AnymlaError, InfeasibleError
from anymla.io.checkpoint import load_tokenizer
from anymla.methods.shared_attention import ShareAttention, spans
from anymla.methods.shared_attention.align import assigned
from anymla.model_run.stream import decoder_layers
from anymla.modeling.shared_attention import MAPS, AttentionMap, AttentionMaps, SharedAttention
from tests.damage import TRAIN, VALID
from tests.families import logits, make_model, save_model, token_ids
from tests.family_models import tiny_model
from tests.precision import Exact

FAST = {"calibration_tokens": 256, "calibration_length": 32, "device": "cpu"}
# what stands around heads and scores: norms, soft-caps, windows, partial rope, biases, fused projections, no rope
FAMILIES = ("gemma2", "gpt2", "olmo2", "phi", "qwen3")


def shared(source, folder, **settings):
    anymla.run(source, folder, steps=[{"shared_attention": FAST | settings}])
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model with its layers 2 and 3 by the map of layer 1."""
    return shared(bundled_model(), tmp_path_factory.mktemp("bundled") / "out", spans=[[2, 3]])


@pytest.fixture(scope="module")
def lost(original):
    """The KL on held-out text of a model that is the bundled one but for its shared layers."""
    ids = calibration_windows(bundled_text("valid"), load_tokenizer(bundled_model()), tokens=2048, length=256, seed=0)
    expected = logits(original, ids).log_softmax(-1)

    def kl(model):
        found = logits(model, ids).log_softmax(-1)
        return (expected.exp() * (expected - found)).sum(-1).mean().item()

    return kl


def test_an_empty_span_changes_no_bit(tmp_path):
    source = save_model(make_model("llama", torch.float32), tmp_path / "source")
    shared(source, tmp_path / "out", spans=[])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


@torch.no_grad()
def twin_layers(model):
    """``model`` with a first layer that writes nothing, and a second one that attends as it does."""
    first, second = decoder_layers(model)[:2]
    second.load_state_dict(first.state_dict())
    for name, parameter in first.named_parameters():
        if any(part in name for part in ("o_proj", "c_proj", "dense", "down_proj", "fc2")):
            parameter.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_where_two_layers_attend_alike_sharing_is_exact(family, tmp_path):
    changes = {"layer_types": ["full_attention"] * 2} if family == "gemma2" else {}
    source = save_model(twin_layers(tiny_model(family, torch.float64, **changes)), tmp_path / "source")
    eager = {"attn_implementation": "eager"}  # transformers 5.16's sdpa leaves the soft-cap out
    before = AutoModelForCausalLM.from_pretrained(source, **eager).eval()
    after = shared(source, tmp_path / "out", spans=[[1, 1]])
    with Exact():
        expected, found = logits(before, token_ids()), logits(after, token_ids())
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_shared_layers_cache_no_keys(bundled, original):
    cache = bundled(input_ids=token_ids(), use_cache=True).past_key_values
    widths = [layer.values.shape[-1] for layer in cache.layers]
    assert [bool(width) for width in widths] == [True, True, False, False, True]  # values stand in the first tensor
    whole = original(input_ids=token_ids(), use_cache=True).past_key_values
    held, before = (sum(layer.keys.nbytes + layer.values.nbytes for layer in each.layers) for each in (cache, whole))
    assert held == before * (1 - 2 / (2 * 5))
    names = {name.rpartition("self_attn.")[2] for name, _ in bundled.model.layers[2].named_parameters()}
    assert not {"q_proj.weight", "k_proj.weight"} & names


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_way_of_generating_agrees(bundled, implementation):
    bundled.set_attn_implementation(implementation)
    ids = token_ids(2, 12)
    options = {"max_new_tokens": 12, "do_sample": False}
    greedy = bundled.generate(ids, **options)
    static = StaticCache(config=bundled.config, max_cache_len=32)
    assert torch.equal(bundled.generate(ids, past_key_values=static, **options), greedy)
    assert torch.equal(bundled.generate(ids, use_cache=False, **options), greedy)
    pad, mask = ids.new_zeros(2, 3), torch.ones(2, 15, dtype=torch.long)
    mask[:, :3] = 0
    padded = bundled.generate(torch.cat([pad, ids], 1), attention_mask=mask, **options)
    assert torch.equal(padded[:, 3:], greedy)
    beams = [bundled.generate(ids, num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)


def test_drafts_that_are_refused_leave_the_cache(bundled, original):
    """Assisted decoding crops the cache: values of shared layers too."""
    ids = token_ids(1, 12)
    options = {"max_new_tokens": 8, "do_sample": False}
    for model, assistant in ((bundled, original), (original, bundled)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), model.generate(ids, **options))


def test_it_loads_on_several_devices_and_without_anymla(bundled, tmp_path):
    bundled.save_pretrained(tmp_path / "again")
    layers = {f"model.layers.{index}": "cpu" for index in range(5)} | {"model.layers.3": "disk"}
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", device_map=layers | outside, offload_folder=tmp_path / "offload"
    ).eval()
    assert torch.allclose(logits(spread, token_ids()), logits(bundled, token_ids()), atol=1e-5)
    travelled = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(logits(travelled, token_ids()), logits(bundled, token_ids()))
    assert (tmp_path / "again" / "shared_attention.py").is_file()


def checkpointing(model, *, use_reentrant):
    newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


def test_gradients_pass_through_the_map_and_through_checkpoints(bundled):
    weights = (bundled.model.layers[1].self_attn.q_proj.weight, bundled.model.layers[3].self_attn.v_proj.weight)

    def gradients():
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
        bundled(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        return [weight.grad.clone() for weight in weights]

    bundled.train()
    try:
        plain = gradients()
        assert all(gradient.abs().max() > 0 for gradient in plain)
        checkpointing(bundled, use_reentrant=False)
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(plain, gradients(), strict=True))
        checkpointing(bundled, use_reentrant=True)
        bundled.enable_input_require_grads()
        with pytest.raises(NotImplementedError, match="use_reentrant"):
            gradients()
    finally:
        getattr(bundled, "activation_checkpointing_disable", bundled.gradient_checkpointing_disable)()
        bundled.disable_input_require_grads()
        bundled.requires_grad_(False).eval()


def test_maps_belong_to_one_forward_pass(bundled):
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs[MAPS]), with_kwargs=True)
        for layer in bundled.model.layers
    ]
    for _ in range(2):
        logits(bundled, token_ids())
    for hook in hooks:
        hook.remove()
    assert len({id(maps) for maps in seen}) == 2
    held = [vars(layer.self_attn).values() for layer in bundled.model.layers]
    assert not [value for values in held for value in values if isinstance(value, AttentionMap | AttentionMaps)]
    with pytest.raises(ValueError, match="layer 1 passed on no attention map"):
        AttentionMaps().take(1)


def test_windows_are_matched_or_refused(tmp_path):
    """A layer takes the map of the nearest one before it with its own window."""
    types = ["sliding_attention", "full_attention"] * 2
    changes = {"num_hidden_layers": 4, "layer_types": types, "sliding_window": 12}
    source = save_model(tiny_model("gemma2", torch.float32, **changes), tmp_path / "source")
    model = shared(source, tmp_path / "out", spans=[[2, 3]])
    found = [part.source_layer for part in model.modules() if isinstance(part, SharedAttention)]
    assert found == [0, 1]
    ids = token_ids(1, 30)
    cache, parts = None, []
    for token in ids.T:
        with torch.no_grad():
            output = model(input_ids=token[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), logits(model, ids), atol=1e-4)
    with pytest.raises(AnymlaError, match="no layer before 1 has a map"):
        shared(source, tmp_path / "no", spans=[[1, 1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give spans, layers or kv_cache"),
        ({"spans": [[0, 0]]}, "no layer before 0"),
        ({"spans": [[2, 7]]}, "from 0 to 4"),
        ({"spans": [[1, 2], [2, 3]]}, "spans overlap"),
        ({"spans": [[2, 2]], "layers": 1}, "give one of"),
        ({"layers": 2}, "at most 1 layer"),
        ({"kv_cache": 0.5}, "smallest possible is kv_cache 0.9"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    with pytest.raises(AnymlaError, match=message):
        shared(bundled_model(), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_families_that_drop_the_map_are_refused(tmp_path):
    source = save_model(tiny_model("bloom", torch.float32), tmp_path / "source")
    with pytest.raises(AnymlaError, match="layers of its family"):
        shared(source, tmp_path / "out", spans=[[1, 1]])


def test_other_caches_are_refused_after_it_and_before(bundled, tmp_path):
    """Also where the folder comes from an earlier run."""
    bundled.save_pretrained(tmp_path / "shared")
    for step in ("transform_coding", "kvquant"):
        for steps in ([step, "shared_attention"], ["shared_attention", step]):
            given = [{name: {"spans": [[3, 3]]} if name == "shared_attention" else {}} for name in steps]
            with pytest.raises(AnymlaError, match="do not go together"):
                anymla.run(bundled_model(), tmp_path / "out", steps=given)
        with pytest.raises(AnymlaError, match="share attention maps"):
            anymla.run(tmp_path / "shared", tmp_path / "out", steps=[step])
    with pytest.raises(AnymlaError, match="share attention maps already"):
        anymla.run(tmp_path / "shared", tmp_path / "out", steps=[{"shared_attention": {"spans": [[3, 3]]}}])
    with pytest.raises(AnymlaError, match="share attention maps"):
        anymla.export(tmp_path / "shared", tmp_path / "out")


def test_the_search_beats_the_mean_span(lost, tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PROTECTED", (1, 0))
    settings = {"calibration_tokens": 2048, "calibration_length": 256}
    found = shared(bundled_model(), tmp_path / "found", layers=2, **settings)
    chosen = {part.layer_idx for part in found.modules() if isinstance(part, SharedAttention)}
    every = {
        pair: lost(shared(bundled_model(), tmp_path / f"{pair}", spans=[[layer, layer] for layer in pair]))
        for pair in combinations(range(1, 5), 2)
    }
    assert lost(found) == pytest.approx(every[tuple(sorted(chosen))], rel=1e-4)
    assert lost(found) < fmean(every.values())
    assert every[1, 2] > every[3, 4]  # early spans lose more than late ones


def test_aligned_heads(bundled, lost, tmp_path, record_property):
    """What the order of heads gains is recorded: nothing says that it must gain on other text."""
    for layer in (2, 3):
        pair = [
            lost(shared(bundled_model(), tmp_path / f"{layer}{align}", spans=[[layer, layer]], align_heads=align))
            for align in (False, True)
        ]
        record_property(f"kl of layer {layer}, as it is and aligned", pair)


def test_an_order_of_heads_is_undone_by_the_alignment(tmp_path):
    """Twin layers whose second one has its heads in another order: aligned, sharing is exact again."""
    model = twin_layers(make_model("llama", torch.float64))
    attention, order = model.model.layers[1].self_attn, torch.tensor([4, 5, 1, 0, 2, 3])
    with torch.no_grad():
        for name, heads in (("q_proj", order), ("k_proj", order[::2] // 2), ("v_proj", order[::2] // 2)):
            weight = getattr(attention, name).weight
            weight.copy_(weight.unflatten(0, (-1, 8))[heads].flatten(0, 1))
    source = save_model(model, tmp_path / "source")
    before = AutoModelForCausalLM.from_pretrained(source).eval()
    after = shared(source, tmp_path / "out", spans=[[1, 1]], align_heads=True)
    assert torch.allclose(logits(after, token_ids()), logits(before, token_ids()), atol=1e-9)


def test_assignments_are_the_cheapest():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 4, 7):
        costs = torch.rand(size, size, generator=generator).tolist()
        found = assigned(costs)
        assert sorted(found) == list(range(size))
    square = [[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]
    assert assigned(square) == [1, 0, 2]


@pytest.mark.slow
def test_tuning_closes_half_of_the_gap(lost, bundled, tmp_path):
    """200 steps."""
    step = {"data": [str(TRAIN)], "eval_data": str(VALID), "eval_tokens": 1024, "length": 128, "batch": 8}
    tune = step | {"tokens": 200 * 8 * 128, "device": "cpu", "train": "all"}
    steps = [{"shared_attention": FAST | {"spans": [[2, 3]]}}, {"tune": tune}]
    anymla.run(bundled_model(), tmp_path / "out", steps=steps)
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert lost(healed) <= lost(bundled) / 2


def test_plans_name_every_source():
    spec = anymla.inspect(bundled_model()).model_spec
    planned = [layer.shared for layer in ShareAttention(spans=[[2, 3]]).plan(spec).after.layers]
    assert [layer and layer.source_layer for layer in planned] == [None, None, 1, 1, None]
    assert [layer is None for layer in planned] == [True, False, False, False, True]
    with pytest.raises(InfeasibleError):
        ShareAttention(layers=9).plan(spec)
