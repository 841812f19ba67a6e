"""The cache is real: it holds r + 2K numbers, and every way of using it gives the logits of a full recompute."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import anymla
from anymla.modeling.latent_attention import LatentAttention
from tests.families import FAST, make_model, save_model, token_ids

CASES = [
    ("llama", {"num_key_value_heads": 6}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 12}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 16}),
]
IDS = ["mha", "mqa", "mistral-window", "qwen2-window", "qwen3"]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def model(request, tmp_path_factory):
    """A converted tiny model of each kind, float64, at half its cache."""
    family, changes = request.param
    folder = tmp_path_factory.mktemp(family)
    source = save_model(make_model(family, torch.float64, **changes), folder / "source")
    anymla.convert(source, folder / "out", kv_cache=0.5, **FAST)
    return AutoModelForCausalLM.from_pretrained(folder / "out").eval()


@torch.no_grad()
def forward(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


def close(a, b, tolerance=1e-9):
    return (a - b).abs().max().item() < tolerance


def test_cache_holds_exactly_latent_and_rope_key(model):
    output = model.generate(
        token_ids(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    for cached, attention in zip(output.past_key_values.layers, attention_layers(model), strict=True):
        assert cached.keys.shape[:2] == cached.values.shape[:2] == (2, 1)
        assert cached.keys.shape[-1] == attention.kv_lora_rank
        assert cached.values.shape[-1] == attention.qk_rope_head_dim
        original = 2 * attention.kv_b_proj.out_features // 2
        assert cached.keys.shape[-1] + cached.values.shape[-1] == original // 2


@pytest.mark.parametrize(
    "make_cache", [lambda c: DynamicCache(config=c), lambda c: StaticCache(config=c, max_cache_len=64)]
)
def test_decode_equals_full_recompute(model, make_cache):
    ids, cache = token_ids(), make_cache(model.config)
    full = forward(model, ids, use_cache=False)
    steps = [forward(model, ids[:, :20], past_key_values=cache)]
    steps += [forward(model, ids[:, i : i + 1], past_key_values=cache) for i in range(20, ids.shape[1])]
    assert close(torch.cat(steps, 1), full)


def test_chunked_prefill(model):
    ids, cache = token_ids(), DynamicCache(config=model.config)
    chunks = [forward(model, part, past_key_values=cache) for part in ids.split(13, dim=1)]
    assert close(torch.cat(chunks, 1), forward(model, ids, use_cache=False))


def test_left_padded_batch(model):
    ids = token_ids(1, 30)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids[:, :23]], 1)
    batch, mask = torch.cat([ids, padded]), torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    together = model.generate(batch, attention_mask=mask, **options)
    alone = model.generate(ids[:, :23], **options)
    assert torch.equal(together[1, 30:], alone[0, 23:])
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    forward(model, batch[:, :29], attention_mask=mask[:, :29], position_ids=position_ids[:, :29], past_key_values=cache)
    step = forward(model, batch[:, 29:], attention_mask=mask, position_ids=position_ids[:, 29:], past_key_values=cache)
    assert close(step[1, 0], forward(model, ids[:, :23], use_cache=False)[0, -1])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}])
def test_generate_with_and_without_cache(model, options):
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    beams = {"num_beams": options.get("num_beams", 1)}
    expected = model.generate(token_ids(), use_cache=False, **common, **beams)
    assert torch.equal(model.generate(token_ids(), **common, **options), expected)


def test_crop(model):
    if any(attention.sliding_window for attention in attention_layers(model)):
        pytest.skip("transformers does not crop sliding-window caches")
    ids, cache = token_ids(), DynamicCache(config=model.config)
    forward(model, ids[:, :25], past_key_values=cache)
    cache.crop(-10)
    assert close(forward(model, ids[:, 15:], past_key_values=cache), forward(model, ids, use_cache=False)[:, 15:])


def test_decode_never_expands_the_cache(model, monkeypatch):
    ids, cache = token_ids(), DynamicCache(config=model.config)
    forward(model, ids[:, :30], past_key_values=cache)

    def refuse(*args):
        raise AssertionError("the latent was expanded in a decode step")

    monkeypatch.setattr(LatentAttention, "expand_kv", refuse)
    forward(model, ids[:, 30:31], past_key_values=cache)
    with pytest.raises(AssertionError, match="expanded"):
        forward(model, ids, use_cache=False)  # prefill does expand


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_implementations_agree(model, implementation):
    ids, before = token_ids(), model.config._attn_implementation
    expected = forward(model, ids, use_cache=False)
    model.set_attn_implementation(implementation)
    cache = DynamicCache(config=model.config)
    forward(model, ids[:, :-1], past_key_values=cache)
    step = forward(model, ids[:, -1:], past_key_values=cache)
    full = forward(model, ids, use_cache=False)
    model.set_attn_implementation(before)
    assert close(full, expected, 1e-4)  # eager computes its softmax in float32
    assert close(step[:, 0], expected[:, -1], 1e-4)


def test_asking_for_attention_weights_is_refused(model):
    with pytest.raises(NotImplementedError, match="attention weights"):
        model(input_ids=token_ids(), output_attentions=True)
