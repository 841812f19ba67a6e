"""Weights that are not plain: adapters, quantisers, offload. Decode sees what a full forward pass sees."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import anymla
from anymla.modeling.arguments import cache_argument, cache_of
from anymla.modeling.dense_weight import dense_weight, is_plain
from tests.families import FAST, make_model, save_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")  # what peft and quantisers say of transformers and torch
SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
BLOCK = {"rope_dims": 64, "kv_rank": 64}  # bitsandbytes' kernels for CPUs want in_features in multiples of 64
KV_B = ["kv_b_proj"]
ADAPTERS = {
    "lora-all-linear": peft.LoraConfig(target_modules="all-linear", init_lora_weights=False),
    "lora": peft.LoraConfig(target_modules=KV_B, init_lora_weights=False),
    "dora": peft.LoraConfig(target_modules=KV_B, init_lora_weights=False, use_dora=True),
    "lora-bias": peft.LoraConfig(target_modules=KV_B, init_lora_weights=False, lora_bias=True),
    "loha": peft.LoHaConfig(target_modules=KV_B, init_weights=False),
    "ia3": peft.IA3Config(target_modules=KV_B, feedforward_modules=[], init_ia3_weights=False),
    "oft": peft.OFTConfig(target_modules=KV_B, init_weights=False, oft_block_size=4),
}
QUANTISERS = {
    "bitsandbytes-8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "torchao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module", params=[0, 8], ids=["latent", "exact-window"])
def folders(request, tmp_path_factory):
    """A tiny model and its conversion, with and without an exact window."""
    folder = tmp_path_factory.mktemp("models")
    source = save_model(make_model("llama", torch.float32, **SIZES), folder / "source")
    budget = {"kv_cache": 1.0} | BLOCK
    anymla.convert(source, folder / "out", exact_window=request.param, **budget, **FAST)
    return SimpleNamespace(source=source, out=folder / "out", path=folder)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def gap(model):
    """Largest difference between a full forward pass and a decode token by token, over the logits' largest."""
    ids = token_ids()
    full = model(input_ids=ids, use_cache=False).logits
    output = model(input_ids=ids[:, :20], use_cache=True)
    steps, cache = [output.logits], cache_of(output)
    for place in range(20, ids.shape[1]):
        steps.append(model(input_ids=ids[:, place : place + 1], **{cache_argument(model): cache}).logits)
    return ((torch.cat(steps, 1) - full).abs().max() / full.abs().max()).item()


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_decode_sees_the_adapter(folders, name):
    base = load(folders.out)
    before = logits(base)
    model = peft.get_peft_model(base, ADAPTERS[name]).eval()
    assert (logits(model) - before).abs().max() > 0.1
    assert gap(model) < 1e-4


def test_the_matrix_follows_what_becomes_of_an_adapter(folders):
    """Another adapter, none, a merged one, a scaled one, a trained one: what was kept of the last is not used."""
    model = peft.get_peft_model(load(folders.out), ADAPTERS["lora"]).eval()
    model.add_adapter("other", ADAPTERS["lora"])
    assert gap(model) < 1e-4
    model.set_adapter("other")
    assert gap(model) < 1e-4
    with model.disable_adapter():
        assert gap(model) < 1e-4
    layer = next(part for part in model.modules() if isinstance(part, peft.tuners.lora.LoraLayer))
    layer.scale_layer(3.0)
    assert gap(model) < 1e-4
    with torch.no_grad():
        layer.lora_B["other"].weight.add_(0.5)  # as an optimizer does
    assert gap(model) < 1e-4
    model.merge_adapter()
    assert gap(model) < 1e-4
    model.unmerge_adapter()
    assert gap(model) < 1e-4
    assert gap(model.merge_and_unload()) < 1e-4


def test_gradients_reach_an_adapter_through_decode(folders):
    model = peft.get_peft_model(load(folders.out), ADAPTERS["lora"]).eval()
    ids = token_ids()
    output = model(input_ids=ids[:, :20], use_cache=True)
    step = model(input_ids=ids[:, 20:21], **{cache_argument(model): cache_of(output)}).logits
    step.square().sum().backward()
    trained = [parameter for name, parameter in model.named_parameters() if "kv_b_proj.lora_B" in name]
    assert trained
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


@pytest.mark.parametrize("name", QUANTISERS)
def test_decode_of_a_quantised_conversion(folders, name):
    quantised, exact = load(folders.out, quantization_config=QUANTISERS[name](), dtype=torch.float32), load(folders.out)
    lost = ((logits(quantised) - logits(exact)).abs().max() / logits(exact).abs().max()).item()
    assert lost > 1e-2
    assert gap(quantised) < max(1e-4, 0.3 * lost)  # bitsandbytes quantises activations, too, or rounds them to bfloat16
    kept = zip(kv_b_weights(quantised), kv_b_weights(exact), strict=True)
    for part, plain in kept:
        assert not is_plain(part)
        with torch.no_grad():
            found = dense_weight(part, BLOCK["kv_rank"], torch.empty(0))
        assert (found - plain.weight).norm() / plain.weight.norm() < 0.15  # four bits


def kv_b_weights(model):
    return [part for path, part in model.named_modules() if path.endswith("kv_b_proj")]


def test_decode_of_torch_dynamic_int8(folders):
    dynamic = [
        torch.ao.quantization.quantize_dynamic(load(folder), {torch.nn.Linear}, dtype=torch.qint8)
        for folder in (folders.source, folders.out)
    ]
    own, found = (gap(model) for model in dynamic)
    assert found < max(1e-4, 1.5 * own)


@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_decode_of_an_offloaded_conversion(folders, where, tmp_path):
    if where == "device_map":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= dict.fromkeys(("model.norm", "lm_head", "model.rotary_emb"), "cpu")
        model = load(folders.out, device_map=places, offload_folder=str(tmp_path))
    else:
        model, device = load(folders.out), torch.device("cpu")
        offload = {"cpu": lambda: cpu_offload(model, device), "disk": lambda: disk_offload(model, tmp_path, device)}
        offload[where]()
    hooked = [part for part in model.modules() if type(part) is torch.nn.Linear and part.weight.is_meta]
    assert hooked
    expected = logits(load(folders.out))
    assert (logits(model) - expected).abs().max() < 1e-4
    assert gap(model) < 1e-4
    text = model.generate(token_ids(1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        text, load(folders.out).generate(token_ids(1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    )


def test_a_plain_weight_is_read_as_it_is():
    linear = torch.nn.Linear(8, 6, bias=False)
    assert dense_weight(linear, 8, torch.empty(0)) is linear.weight
    hooked = copy.deepcopy(linear)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.allclose(dense_weight(hooked, 8, torch.empty(0)), 2 * linear.weight)
    assert dense_weight(torch.nn.Linear(8, 6), 8, torch.empty(0)) is None  # a bias: no matrix


def test_what_products_gave_is_kept_until_something_changes():
    base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        first = dense_weight(layer, 8, torch.empty(0))
        assert dense_weight(layer, 8, torch.empty(0)) is first
        layer.lora_A["default"].weight.mul_(2)
        assert dense_weight(layer, 8, torch.empty(0)) is not first
    assert dense_weight(layer, 8, torch.empty(0)).requires_grad  # gradients flow: nothing is kept


def test_an_adapter_of_the_original_is_not_lost_without_a_word(folders, tmp_path):
    """Its part on modules that both have is put on; of the rest peft says nothing, so the model does."""
    targets = ["q_proj", "v_proj", "up_proj"]
    trained = peft.get_peft_model(
        load(folders.source), peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    )
    trained.save_pretrained(tmp_path / "adapter")
    if any("v_proj" in name for name, _ in load(folders.out).named_modules()):
        pytest.skip("an exact window keeps v_proj")
    with pytest.warns(UserWarning, match=r"targets v_proj, which a converted model does not have.*--adapter"):
        model = peft.PeftModel.from_pretrained(load(folders.out), tmp_path / "adapter").eval()
    assert gap(model) < 1e-4
    with pytest.warns(UserWarning, match="targets v_proj"):
        load(folders.out).load_adapter(str(tmp_path / "adapter"))
    assert (logits(model) - logits(model.unload())).abs().max() > 0.1
