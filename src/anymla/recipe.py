"""The recipe: every setting of a conversion, in one frozen object that is read from and written to YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from anymla.errors import RecipeError, shown

MOST_BYTES = 1 << 20  # of a recipe or plan: a plan of a thousand layers has a fifth of it
MOST = 1 << 40  # of any number of tokens or dims

Rope = Literal[
    "channel-pca",
    "high",
    "low",
    "uniform",
    "two-norm",
    "elite",
    "rorope",
    "freqfold-2",
    "freqfold-4",
    "freqfold-8",
    "freqfold-16",
]
SHARED_ROPES = ("channel-pca", "rorope", "freqfold-2", "freqfold-4", "freqfold-8", "freqfold-16")  # by all KV heads
FactorizationName = Literal["output-aware", "joint-svd", "split-svd", "whitened", "balanced-pca"]
Target = Literal["deepseek", "vllm", "gguf"]
TARGETS: tuple[Target, ...] = get_args(Target)
DtypeName = Literal["float64", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Settings in one frozen object; a wrong one is named with its place and value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def of(cls, settings: dict[str, Any], source: str = "recipe") -> Self:
        """Checks ``settings``; the error names the field, its value and where it stood.

        Raises:
            RecipeError: an unknown field, or a value of the wrong kind or out of range.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            bare = first["type"] in ("extra_forbidden", "value_error")
            value = "" if bare else f", got {shown(first['input'])}"
            place = f"{where(first['loc'])}: " if first["loc"] else ""
            raise RecipeError(f"{source}: {place}{first['msg'].removeprefix('Value error, ')}{value}") from error

    def to_yaml(self) -> str:
        """The settings as YAML, every field spelled out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


class Recipe(Settings):
    """Settings of one conversion. Only ``kv_cache`` matters to most users; all else is derived from it."""

    kv_cache: float = Field(0.25, gt=0, le=1, description="Share of the original KV cache to keep, 0 < x <= 1.")
    target: Target | None = Field(
        None,
        description="Plan under the limits of this layout, so that `anymla export --to` it is exact: deepseek, vllm or "
        "gguf. Default: no limits, for transformers.",
    )
    rope: Rope = Field(
        "channel-pca",
        description="Which rope channels stay rotated: anymla's channel-pca; high, low, uniform, two-norm of MHA2MLA; "
        "elite of EliteKV; rorope and freqfold-N (N frequencies taken for equal) of TransMLA.",
    )
    rope_dims: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Rotated dims: per KV head for high/low/uniform/two-norm/elite, in total (2K) for the others. "
        "Default: chosen per layer on calibration text.",
    )
    kv_rank: int | None = Field(
        None, ge=1, le=MOST, description="Latent rank per layer. Default: what the budget leaves beside the rope dims."
    )
    exact_window: int = Field(
        0,
        ge=0,
        le=MOST,
        description="Keep full keys and values of the last N tokens beside the latent, 2 or more: better by far, for a "
        "constant size. For transformers only: no engine's cache has room for them. 0: none.",
    )
    static_qk_norm: bool = Field(
        False,
        description="Let --target deepseek and gguf take models with norms on queries and keys: a fixed scale per "
        "head, measured on calibration text, stands in for each. This changes the model; the loss is shown.",
    )
    factorization: FactorizationName = Field("output-aware", description="How the latent is found.")
    expected_rotation: bool = Field(
        True, description="Replace dropped rotations by their expectation on calibration text (the paper: by 1)."
    )
    reconstruction_steps: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Gradient steps per layer against the original layer's output, after output-aware; 0 for none. "
        "Default: 300, fewer for a model with more than 16 million attention weights, and at least 99.",
    )
    calibration: str | None = Field(
        None,
        min_length=1,
        description="Text file, .jsonl (field 'text') or hub data set name[:config[:split]]. Default: bundled stories.",
    )
    calibration_tokens: int = Field(32768, ge=256, le=MOST, description="Tokens of calibration text to use.")
    calibration_length: int = Field(
        1024, ge=8, le=MOST, description="Tokens per calibration window (at most the model's context)."
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="A peft adapter (a folder or a hub id) to merge into the original's weights first; none leaves out "
        "one that lies beside them. Default: that one, where there is one.",
    )
    device: str = Field(
        "auto", max_length=60, description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."
    )
    dtype: DtypeName | None = Field(
        None,
        description="Dtype to load, compute and save in. Default: the checkpoint's, computed in float32 where this CPU "
        "is faster in that.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Which pieces of the calibration text are drawn.")

    @field_validator("calibration", "adapter", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value


def where(place: tuple[int | str, ...]) -> str:
    """The place of a value in nested settings, as a.b.c, in printable characters."""
    name = ".".join(str(part) for part in place)
    return f"{name:.80}" if name.isprintable() else shown(name)


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which can make a small file grow without end, and no name twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                problem = f"{shown(key.value)} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RecipeError: missing, unreadable, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise RecipeError(f"{path} has more than {MOST_BYTES >> 20} MiB: too large for a recipe or a plan")
        content = yaml.load(text.decode("utf-8-sig"), _Loader)
    except RecipeError:
        raise
    except Exception as error:  # beside its own errors, PyYAML lets through what dates and numbers of no sense raise
        raise RecipeError(f"{path} cannot be read: {' '.join(str(error).split()):.200}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold names and values, as 'kv_cache: 0.25'")
    if odd := [name for name in content if not isinstance(name, str)]:
        raise RecipeError(f"{path}: {shown(odd[0])} is no name of a setting")
    return content
