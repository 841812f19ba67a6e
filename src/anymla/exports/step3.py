"""A model that was trained with MFA as a checkpoint in the layout of Step-3's text model, which vLLM runs.

Step-3 has one attention for all layers: RMSNorm on the shared queries, rope on all C numbers of a key, values of C
numbers, scores over sqrt(C), no biases. A fresh MFA (anymla.fresh_config) of a family with Llama's block is that. What
the step `mfa` makes of a trained model is not: it keeps some numbers from rope, and the original's scale.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymla.architectures.model_spec import read_config, spec_of
from anymla.errors import UnsupportedModelError
from anymla.exports.weight_files import write_weights
from anymla.io.checkpoint import check_output, check_weights, copy_companions, new_folder
from anymla.io.find import find_model
from anymla.io.safetensors import Stored, read_header
from anymla.io.work import write_json
from anymla.modeling.attention_spec import AttentionSpec
from anymla.modeling.mfa_spec import MfaSpec
from anymla.modeling.spec import ModelSpec

ROPES = ("default", "linear", "llama3")  # that vLLM makes of the same settings
NO_EXPERTS = "-1"  # a layer that there is none of: vLLM reads a list of layers with experts, and it cannot be empty
BLOCK = (
    *("input_layernorm", "post_attention_layernorm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def write_step3(trained: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model that was trained with MFA for vLLM's ``Step3TextForCausalLM``, exactly, in its own dtype.

    Tests check it against the arithmetic of vLLM's model, and in vLLM 0.32.0 on a CPU.

    Args:
        trained: a folder; its model was made by ``anymla.fresh_config`` without key reuse.
        output: the folder to write.
        overwrite: replace ``output`` if it exists.

    Raises:
        UnsupportedModelError: Step-3's attention or block is another one; the message says what stops it.
        CheckpointError: the folder is broken.
        OutputError: ``output`` exists.
    """
    source, place = find_model(trained), Path(os.path.expanduser(output))
    config = read_config(source)
    spec = spec_of(config)
    mfa = _mfa_of(spec)
    check_output(place, source, overwrite=overwrite)
    stored: dict[str, Stored] = {}
    for file in check_weights(source):
        stored |= read_header(file)
    with new_folder(place) as folder:
        write_weights(folder, _parts(spec, mfa, stored))
        write_json(folder / "config.json", _config(spec, mfa, config))
        copy_companions(source, folder)


def _mfa_of(spec: ModelSpec) -> MfaSpec:
    """The attention that all layers have.

    Raises:
        UnsupportedModelError: it is none of Step-3's.
    """
    found = {(layer.attention, layer.mfa) for layer in spec.layers}
    attention, mfa = found.pop()
    if found or attention is None or mfa is None:
        raise UnsupportedModelError("Step-3 has one MFA in all layers, and this model has not: see anymla.fresh_config")
    if not mfa.value_rank:
        raise UnsupportedModelError(
            "it reuses keys as values, which Step-3 does not: export what mla made, before the step mfa, with "
            "anymla export"
        )
    if (reason := spec.other_block or _other_attention(attention, mfa, spec)) is not None:
        raise UnsupportedModelError(f"Step-3's layout cannot hold it: {reason}")
    return mfa


def _other_attention(attention: AttentionSpec, mfa: MfaSpec, spec: ModelSpec) -> str | None:
    """What its attention does that Step-3's does not, or the other way round."""
    width = mfa.query_width
    plain = AttentionSpec(
        num_heads=attention.num_heads,
        num_kv_heads=1,
        head_dim=width,
        rope_pairs=width // 2,
        cached_heads=attention.cached_heads,
        scaling=width**-0.5,
    )
    if (mfa.qk_rope_head_dim, mfa.value_rank, mfa.kv_lora_rank) != (width, width, width):
        return f"rope turns {mfa.qk_rope_head_dim} of {width} numbers of a key, Step-3's all"
    if not mfa.query_norm or mfa.biases:
        return "its queries have no norm, or biases"
    if attention != plain:
        return "its attention has a scale, a window or parts that are not Step-3's"
    if spec.rope is None or spec.rope.rope_type not in ROPES:
        return f"its rope is none of {', '.join(ROPES)}"
    return None


def _config(spec: ModelSpec, mfa: MfaSpec, config: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's Step3TextConfig reads."""
    attention, rope = spec.attention_layers[0], spec.rope
    if rope is None:
        raise ValueError("no rope")
    kept = ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in kept if name in config} | {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.num_heads,
        "num_attention_groups": 1,
        "head_dim": mfa.query_width,
        "share_q_dim": mfa.q_lora_rank,
        "vocab_size": spec.vocab_size,
        "max_seq_len": spec.max_position_embeddings,
        "max_position_embedding": spec.max_position_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": {**rope.settings, "rope_type": rope.rope_type, "rope_theta": rope.theta},
        "moe_layers_enum": NO_EXPERTS,
        "tie_word_embeddings": False,  # vLLM's model has a head of its own
        "dtype": spec.dtype,
    }


def _parts(spec: ModelSpec, mfa: MfaSpec, stored: dict[str, Stored]) -> Iterator[dict[str, Tensor]]:
    """The tensors under their new names, a layer at a time."""
    embedding = stored["model.embed_tokens.weight"].read()
    head = stored["lm_head.weight"].read() if "lm_head.weight" in stored else embedding.clone()
    yield {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    yield {"model.norm.weight": stored["model.norm.weight"].read()}
    for index, layer in enumerate(spec.layers):
        prefix, own = f"model.layers.{index}.", f"{layer.module}."
        names = ("q_proj", "kv_a_proj_with_mqa", "q_a_layernorm", "q_b_proj", "o_proj")
        query, cached, norm, heads, out = (stored[f"{own}{name}.weight"].read() for name in names)
        value, key = cached.split([mfa.value_rank, mfa.qk_rope_head_dim])
        yield {f"{prefix}{name}.weight": stored[f"{prefix}{name}.weight"].read() for name in BLOCK} | {
            f"{prefix}self_attn.qkv_proj.weight": torch.cat([query, key, value]),
            f"{prefix}self_attn.inter_norm.weight": norm,
            f"{prefix}self_attn.wq.weight": heads,
            f"{prefix}self_attn.o_proj.weight": out,
        }
