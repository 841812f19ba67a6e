"""A cache of codes: every way of using it reads the same codes, and holds the bytes that the account counts."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from anymla import inspect
from anymla.account import account, measure
from anymla.architectures.model_spec import converted_spec
from anymla.errors import CheckpointError
from anymla.exports.converted import read_converted
from anymla.modeling import rows_attention
from anymla.modeling.arguments import cache_argument
from anymla.modeling.coded_attention import CodedAttention
from anymla.modeling.rows_attention import RowsAttention
from anymla.modeling.spec import LayerSpec, layers_of
from anymla.stored_bytes import sized, stored_bytes
from tests.coded_models import coded_latent, coded_model
from tests.families import token_ids
from tests.family_models import FULL_FIRST, tiny_model
from tests.precision import Exact

STOCK = 3e-4  # families round the angle of a position to float32, and a random model multiplies what that loses
BASES = [("own", "own"), ("channels", "axes"), ("axes", "axes")]
FAMILIES = {
    "llama": {},
    "llama mha": {"num_key_value_heads": 6},
    "llama mqa": {"num_key_value_heads": 1},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt_oss": {"layer_types": FULL_FIRST},
    "phi": {},  # a part of the head turns
    "gptj": {},  # pairs lie side by side, rope as sinusoids
    "hunyuan_v1_dense": {},  # a gain after rope
    "ministral3": {},  # yarn, a query temperature
    "olmo2": {},  # norms over the width
    "mpt": {},  # no rope, ALiBi, a clip
    "nanochat": {},  # rope turns backwards
}


def make(family, key_basis, value_basis, bits=3, **changes):
    name, dtype = family.split()[0], torch.float64
    return coded_model(tiny_model(name, dtype, **FAMILIES[family]), key_basis, value_basis, bits, **changes)


BY_HEAD = {"key_block": 1, "value_block": 1}
LATENT = (("latent", "rope key"), 0, {})


@pytest.fixture(
    scope="module",
    params=[*product(BASES, [0], [{}]), (BASES[1], 5, {}), (BASES[1], 5, BY_HEAD), LATENT],
    ids=lambda case: "-".join([case[0][0], str(case[1]), *case[2]]),
)
def model(request, tmp_path_factory):
    """Codes of 3 bits, one layer in two sliding, a soft-cap on scores; with and without a window, and of a latent."""
    bases, window, blocks = request.param
    if request.param == LATENT:
        return coded_latent(tiny_model("gemma2", torch.float64), tmp_path_factory.mktemp("latent"), bits=3)
    return make("gemma2", *bases, exact_window=window, **blocks)


@torch.no_grad()
def forward(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


def close(a, b, tolerance=1e-6):
    return (a - b).abs().max().item() < tolerance


def stepwise(model, ids, cache, prompt=20):
    steps = [forward(model, ids[:, :prompt], past_key_values=cache)]
    steps += [forward(model, ids[:, i : i + 1], past_key_values=cache) for i in range(prompt, ids.shape[1])]
    return torch.cat(steps, 1)


BLOCKS = [
    ("llama mha", {"key_block": 2, "value_block": 3}),
    ("qwen3", BY_HEAD),
    ("phi", {"key_block": 1, "value_block": 3}),
]


@pytest.mark.parametrize(
    ("family", "bases", "blocks"),
    [(*case, {}) for case in product(FAMILIES, BASES)] + [(a, c, b) for (a, b), c in product(BLOCKS, BASES[1:])],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_without_loss_it_is_the_original(family, bases, blocks):
    original = tiny_model(family.split()[0], torch.float64, **FAMILIES[family])
    coded, ids = make(family, *bases, 16, kind="plain", **blocks), token_ids(2, 30)
    original.set_attn_implementation("eager")  # sdpa of older transformers has no soft-cap
    with Exact():
        expected = forward(original, ids, use_cache=False)
        assert expected.std() > 0.05
        assert close(forward(coded, ids, use_cache=False), expected, STOCK)
        given = {cache_argument(coded): DynamicCache(config=coded.config), "use_cache": True}
        steps = [forward(coded, part, **given) for part in ids.split([24, 1, 1, 4], dim=1)]
        assert close(torch.cat(steps, 1), expected, STOCK)


@pytest.mark.parametrize("bases", BASES, ids=[key for key, _ in BASES])
def test_a_window_over_all_tokens_is_the_original(bases):
    original = tiny_model("gemma2", torch.float64)
    original.set_attn_implementation("eager")
    coded, narrow = (make("gemma2", *bases, 1, exact_window=window) for window in (30, 5))
    ids, cache = token_ids(2, 30), DynamicCache()
    with Exact():
        expected = forward(original, ids, use_cache=False)
        assert close(forward(coded, ids, use_cache=False), expected, STOCK)
        steps = [forward(coded, part, past_key_values=cache) for part in ids.split([24, 1, 1, 4], dim=1)]
        assert close(torch.cat(steps, 1), expected, STOCK)
        assert not close(forward(narrow, ids, use_cache=False), expected, 100 * STOCK)


@pytest.mark.parametrize("static", [False, True])
def test_decode_equals_full_recompute(model, static, monkeypatch):
    monkeypatch.setattr(rows_attention, "CHUNK", 7 * 24)
    ids, config = token_ids(), model.config
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    assert close(stepwise(model, ids, cache), forward(model, ids, use_cache=False))
    sizes = [part.key_codec.row_bytes for part in model.modules() if isinstance(part, RowsAttention)]
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)
    assert [layer.keys.shape[-1] for layer in cache.layers] == sizes


def test_chunked_prefill(model):
    ids, cache = token_ids(), DynamicCache(config=model.config)
    parts = [forward(model, part, past_key_values=cache) for part in ids.split([2, 1, 3, 20, 14], dim=1)]
    assert close(torch.cat(parts, 1), forward(model, ids, use_cache=False))


@pytest.mark.parametrize("padding", [3, 21])  # more than the window holds: the first tokens are far from the padding
def test_left_padded_batch(model, padding):
    ids = token_ids(1, 30)
    batch, mask = torch.cat([ids, ids]), torch.ones(2, 30, dtype=torch.long)
    batch[1] = torch.cat([ids.new_zeros(padding), ids[0, : 30 - padding]])
    mask[1, :padding] = 0
    positions, cache = (mask.cumsum(-1) - 1).clamp_min(0), DynamicCache(config=model.config)
    steps = [
        forward(
            model,
            batch[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
        )
        for part in (slice(0, 2), slice(2, 26), slice(26, 27), slice(27, 30))
    ]
    full = forward(model, ids, use_cache=False)
    assert close(torch.cat(steps, 1)[0], full[0]) and close(torch.cat(steps, 1)[1, padding:], full[0, : 30 - padding])


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}, {"do_sample": True}, "assisted"],
    ids=str,
)
def test_generate_with_and_without_cache(model, options):
    if options == "assisted":
        options = {"assistant_model": copy.deepcopy(model)}
    ids, mask = token_ids(1 if "assistant_model" in options else 2, 20), None
    if "assistant_model" not in options:
        ids[1, :6], mask = 0, (torch.arange(20) >= torch.tensor([[0], [6]])).long()
    common = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 511, "attention_mask": mask}
    common |= {"do_sample": "do_sample" in options, "num_beams": options.get("num_beams", 1)}
    torch.manual_seed(0)
    expected = model.generate(ids, use_cache=False, **common)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **common | options), expected)


@pytest.mark.parametrize("cut", [3, 18])  # the second leaves some of the first tokens only
def test_crop(model, cut):
    ids, cache = token_ids(2, 20), DynamicCache(config=model.config)
    cache.layers = [type(layer)() if not layer.is_sliding else layer for layer in cache.layers]
    for part in model.modules():
        if isinstance(part, RowsAttention):
            part.make_room(cache)
    cache.activate_past_recording()
    forward(model, ids, past_key_values=cache)
    cache.crop(-cut)
    rest = forward(model, ids[:, -cut:], past_key_values=cache)
    assert close(rest, forward(model, ids, use_cache=False)[:, -cut:])


def test_appending_copies_nothing(model):
    cache, ids = DynamicCache(config=model.config), token_ids()
    forward(model, ids[:, :20], past_key_values=cache)
    rows = next(layer for layer in cache.layers if not layer.is_sliding)
    before, first = rows.keys.data_ptr(), rows.first
    forward(model, ids[:, 20:21], past_key_values=cache)
    assert rows.keys.data_ptr() == before and rows.keys.shape[2] == 21 and rows.first is first
    other = copy.deepcopy(cache)
    one, two = (forward(model, ids[:, at : at + 1], past_key_values=cache) for at in (21, 22))
    assert close(one, forward(model, ids[:, 21:22], past_key_values=other))
    assert not close(two, one)


def test_decode_never_holds_the_cache_as_numbers(model, monkeypatch):
    monkeypatch.setattr(rows_attention, "CHUNK", 8 * 24)  # tokens, numbers of each
    ids, cache = token_ids(1, 120), DynamicCache(config=model.config)
    forward(model, ids[:, :119], past_key_values=cache)
    with Whole(120) as whole:
        forward(model, ids[:, 119:], past_key_values=cache)
    assert whole.largest <= 6 * 120  # the scores of 6 heads
    with Whole(120) as whole:
        forward(model, ids, use_cache=False)
    assert whole.largest >= 24 * 120


class Whole(TorchDispatchMode):
    """Notes the numbers of the largest tensor of floats that is made with a dimension of ``length``."""

    def __init__(self, length):
        super().__init__()
        self.length, self.largest = length, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        if isinstance(output, torch.Tensor) and output.is_floating_point() and self.length in output.shape:
            self.largest = max(self.largest, output.numel())
        return output


LENGTHS = (2, 4, 11, 12, 14, 15, 16, 40)  # around the first tokens and a window of 12


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "phi"])
@pytest.mark.parametrize("bases", BASES, ids=[key for key, _ in BASES])
def test_account_is_what_is_measured(family, bases, tmp_path):
    window, blocks = 6 if family == "gemma2" else 0, BY_HEAD if family == "qwen3" else {}
    make(family, *bases, exact_window=window, **blocks).to(torch.float32).save_pretrained(tmp_path)
    coded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    config = json.loads((tmp_path / "config.json").read_text())
    spec = sized(converted_spec(config), stored_bytes(converted_spec(config), tmp_path.glob("*.safetensors")))
    counted, found = account(spec, LENGTHS), measure(coded, LENGTHS)
    assert counted == found
    for length in LENGTHS:
        cache = DynamicCache(config=coded.config)
        forward(coded, token_ids(1, length), past_key_values=cache)
        assert sum(held_bytes(layer) for layer in cache.layers) == counted.cache_bytes_at[str(length)]


def held_bytes(layer):
    latest = () if layer.latest is None else (layer.latest.keys, layer.latest.values)
    return sum(tensor.nbytes for tensor in (layer.keys, layer.values, *(layer.first or ()), *latest))


def test_saved_and_loaded(tmp_path):
    coded, ids = make("qwen3", "channels", "axes"), token_ids(1, 20)
    coded.save_pretrained(tmp_path)
    expected = forward(coded, ids)
    assert "its cache is coded already" in inspect(tmp_path).reason
    with pytest.raises(CheckpointError, match="holds codes, which transformers alone reads"):
        read_converted(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.float64 and torch.equal(forward(loaded, ids), expected)
    names = {file.name for file in tmp_path.glob("*.py")}  # test_checkpoint.py loads a folder without anymla
    assert {
        "coded_attention.py",
        "coded_cache.py",
        "coded_window.py",
        "codecs.py",
        "coding_spec.py",
        "latent_attention.py",
    } <= names
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pairs = zip(narrow.modules(), coded.modules(), strict=True)
    turns = [(one.inv_freq, other.inv_freq) for one, other in pairs if isinstance(one, CodedAttention)]
    assert turns and all(torch.equal(*each) for each in turns)  # a cast of the model rounds no frequency


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("keys", "bits"), [[3]], "bits must be a list of pairs"),
        (("keys", "bits"), [[7, 24]], "bits must be among"),
        (("keys", "bits"), [[3, 23]], "keys: 23 coefficients, the layer has 24"),
        (("keys", "kind"), "float", "kind must be one of"),
        (("keys", "more"), 1, "Coding has no field more"),
        (("key_basis",), "cosine", "key_basis must be one of own, channels, axes"),
        (("value_basis",), "channels", "value_basis must be one of own, axes"),
        (("key_block",), 2, "key_block must divide the 3 key/value heads"),
        (("first_tokens",), -1, "first_tokens must be"),
        (("exact_window",), 1, "exact_window must be"),
        (("rope_scale",), "1", "rope_scale must be"),
    ],
)
def test_a_broken_description_is_refused_in_one_line(where, value, message):
    described = layers_of(make("llama", "own", "own").config.to_dict())[0].to_dict()
    assert LayerSpec.of(json.loads(json.dumps(described))).to_dict() == described
    *path, last = where
    place = described["coded"]
    for name in path:
        place = place[name]
    place[last] = value
    with pytest.raises(ValueError, match=message) as caught:
        LayerSpec.of(described)
    assert "\n" not in str(caught.value)


def test_gradients_pass_the_codes(model):
    ids = token_ids(1, 12)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {name.rpartition(".")[0].rpartition(".")[2]: weight.grad for name, weight in model.named_parameters()}
    makes = {"k_proj", "v_proj", "kv_a_proj_with_mqa"} & found.keys()
    assert makes and all(found[name].abs().sum() > 0 for name in (*makes, "q_proj"))
    model.zero_grad()


def test_caches_that_hold_no_rows_are_refused():
    coded, original = make("llama", "own", "own"), tiny_model("llama")
    cache = original(input_ids=token_ids(), use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="needs a DynamicCache or a StaticCache"):
        forward(coded, token_ids(), past_key_values=cache)
