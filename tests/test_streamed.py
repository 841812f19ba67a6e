"""A model filled module by module from its files is the model that transformers loads whole."""

from contextlib import ExitStack

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anymla.architectures.families import FAMILIES, TEXT_ONLY_INSIDE
from anymla.errors import CheckpointError
from anymla.io.safetensors import read_header, scan, write_tensors
from anymla.io.streamed import StreamedModel
from anymla.model_run.stream import decoder_layers, layer_inputs, layers_give_tuples
from tests.families import token_ids
from tests.family_check import load
from tests.family_models import SINCE, tiny_model

LLAMA_NAMES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}
GQA = LLAMA_NAMES | {"num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "Llama": GQA,
    "Mixtral": GQA | {"num_local_experts": 4},  # experts merged while loading
    "Gemma3Text": GQA | {"head_dim": 8},  # a factor in a buffer, tied embeddings
    "Qwen2Moe": GQA | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1},
    "GPTNeoX": LLAMA_NAMES | {"intermediate_size": 48},
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_model_loaded_whole(tmp_path, family, dtype):
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto").eval()
    source = StreamedModel(tmp_path, dtype=dtype, device="cpu")
    decoder = source.model.get_decoder()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ExitStack() as everything:
        for layer in layers:
            everything.enter_context(source.layer(layer))
        everything.enter_context(source.on_demand(layers))
        assert torch.equal(source.model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TEXT_ONLY_INSIDE])
def test_layers_get_what_they_get_in_the_model_loaded_whole(tmp_path, family):
    """Embeddings, masks and rope tables: whatever a family's code looks at before weights are there."""
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"the installed transformers has no {family}")
    if Version(transformers.__version__) < Version(since := SINCE.get(family, "5")):
        pytest.skip(f"transformers runs {family} since {since}")
    tiny_model(family, torch.float32).save_pretrained(tmp_path)
    source = StreamedModel(tmp_path, dtype=None, device="cpu")
    assert source.notes == []  # every tensor has its place
    whole = load(tmp_path, attn_implementation=source.model.config._attn_implementation)  # older Gemma 2: eager
    ids = token_ids(1, 24)
    tuples = layers_give_tuples(whole, ids)
    freed = [torch.full((n, n), torch.nan) for n in (30, 100, 300) for _ in range(9)]  # what is read from it, shows
    del freed
    with source.on_demand(decoder_layers(source.model), embeddings=True):
        found = layer_inputs(source.model, ids, tuples=tuples)
    expected = layer_inputs(whole, ids, tuples=tuples)
    assert torch.equal(found.hidden, expected.hidden)
    for ours, theirs in zip(found.arguments, expected.arguments, strict=True):
        for name, value in theirs.items():
            pairs = zip(ours[name], value) if isinstance(value, tuple) else [(ours[name], value)]
            for one, other in pairs:
                assert one is None or not isinstance(other, torch.Tensor) or torch.equal(one, other)


def test_files_round_trip(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.arange(7),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
        "yes": torch.tensor([True, False, True]),
    }
    write_tensors(tmp_path / "first.safetensors", tensors)
    stored = read_header(tmp_path / "first.safetensors")
    assert list(stored) == list(tensors)
    write_tensors(tmp_path / "second.safetensors", stored)
    save_file(tensors, tmp_path / "third.safetensors")
    for name in ("first", "second", "third"):
        found = {key: tensor.read() for key, tensor in read_header(tmp_path / f"{name}.safetensors").items()}
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert scan(tmp_path / "first.safetensors", None) == scan(tmp_path / "second.safetensors", None)


def test_a_number_too_large_for_the_dtype(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"weight": torch.tensor([1e6])})
    scan(tmp_path / "model.safetensors", None)
    with pytest.raises(CheckpointError, match="tensor weight holds NaN or infinity"):
        scan(tmp_path / "model.safetensors", "float16")
