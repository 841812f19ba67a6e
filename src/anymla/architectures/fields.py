"""The fields of a config.json that anymla reads, under every name that families give them, each of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from anymla.errors import UnsupportedModelError, shown
from anymla.io.config import MOST_LAYERS, MOST_SIZE

Size = Annotated[PositiveInt, Field(le=MOST_SIZE)]
Indices = Annotated[list[NonNegativeInt], Field(max_length=MOST_LAYERS)]
Types = Annotated[list[str], Field(max_length=MOST_LAYERS)]


def _names(*names: str) -> Any:
    """A config field that goes by several names; 'a.b' is field b of the object a."""
    return AliasChoices(*(AliasPath(*name.split(".")) if "." in name else name for name in names))


class Fields(BaseModel):
    """The fields of a config that anymla reads; a field that is missing here is one whose kind does not matter."""

    model_config = ConfigDict(extra="ignore", strict=True, loc_by_alias=True)

    model_type: str
    hidden_size: Size = Field(validation_alias=_names("hidden_size", "n_embd", "d_model", "n_embed"))
    num_layers: Annotated[PositiveInt, Field(le=MOST_LAYERS)] = Field(
        validation_alias=_names("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    )
    num_heads: Size = Field(
        validation_alias=_names("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    )
    num_kv_heads: Size | None = Field(
        None, validation_alias=_names("num_key_value_heads", "num_kv_heads", "n_head_kv", "attn_config.kv_n_heads")
    )
    head_dim: Size | None = Field(None, validation_alias=_names("head_dim", "attention_head_dim"))
    intermediate_size: Size | None = Field(
        None, validation_alias=_names("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    )
    vocab_size: Size
    max_position_embeddings: Size = Field(
        2048, validation_alias=_names("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
    )
    tie_word_embeddings: bool = False
    sliding_window: NonNegativeInt | None = Field(None, validation_alias=_names("sliding_window", "window_size"))
    multi_query: bool = False
    new_decoder_architecture: bool = False
    alibi: bool = False
    # what tells layers apart (layers.py)
    layer_types: Types | None = None
    layers_block_type: Types | None = None
    block_types: Types | None = None
    attention_layers: Types | None = None
    mlp_layer_types: Types | None = None
    first_k_dense_replace: NonNegativeInt | None = None
    sliding_window_pattern: NonNegativeInt | str | None = None
    prefix_dense_sliding_window_pattern: PositiveInt | None = None
    hybrid_override_pattern: Annotated[str, Field(max_length=MOST_LAYERS)] | None = None
    attn_layer_indices: Indices | None = None
    full_attn_idxs: Indices | None = None
    attn_layer_period: PositiveInt | None = None
    attn_layer_offset: NonNegativeInt | None = None
    full_attention_interval: PositiveInt | None = None
    full_attention_first_of: PositiveInt | None = None
    attention_chunk_size: PositiveInt | None = None
    no_rope_layers: Annotated[list[int | bool], Field(max_length=MOST_LAYERS)] | None = None
    no_rope_layer_interval: PositiveInt | None = None
    num_attention_heads_per_layer: Annotated[list[Size], Field(max_length=MOST_LAYERS)] | None = None
    use_sliding_window: bool | None = None
    max_window_layers: NonNegativeInt | None = None
    position_embedding_type: str | None = None


def read_fields(config: Mapping[str, Any]) -> Fields:
    """The fields of a parsed config.

    Raises:
        UnsupportedModelError: one is missing, of the wrong kind or out of range; the message names it.
    """
    try:
        return Fields.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        raise UnsupportedModelError(f"config.json: {name}: {first['msg']}{got}") from error
