"""What inspect and convert return, with their stable JSON names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.account import account, reduced_bytes
from anymla.architectures.model_spec import ALREADY
from anymla.io.device import versions
from anymla.layouts import verdicts
from anymla.methods.base import LayerMethod
from anymla.methods.mla.plan import MLAPlan
from anymla.methods.mla.settings import MLA
from anymla.modeling.attention_spec import CONFIG_FIELDS, AttentionSpec
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.evaluation.scores import Scores
    from anymla.io.computing import Computing
    from anymla.methods.mla.choose import LayerResult

REDUCTIONS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Facts of a model and of its cache's size; ``model_spec`` is None where ``supported`` is False.

    ``notes``: what a conversion does to its files first, where they are not plain.
    """

    model: str
    commit: str | None  # of the hub, where it came from there
    supported: bool
    reason: str | None
    model_spec: ModelSpec | None
    notes: tuple[str, ...] = ()

    @property
    def already_latent(self) -> bool:
        """Returns whether it is not converted because it has multi-head latent attention."""
        return self.reason is not None and self.reason.startswith(ALREADY)

    @property
    def targets(self) -> dict[str, tuple[str, str]]:
        """Returns which serving engines can have it, under which plan, and why not (layouts.py); none unsupported."""
        return {} if self.model_spec is None else verdicts(self.model_spec)

    def to_dict(self) -> dict[str, Any]:
        """The facts under their stable JSON names."""
        facts: dict[str, Any] = {"model": self.model, "commit": self.commit, "supported": self.supported}
        facts["reason"] = self.reason
        facts["notes"] = list(self.notes)
        facts |= {"cache_numbers_per_token_per_layer": None, "cache_bytes_per_token": None}
        if (model_spec := self.model_spec) is None:
            return facts
        facts["cache_numbers_per_token_per_layer"] = model_spec.cached_numbers
        cache = account(model_spec)
        facts["cache_bytes_per_token"] = cache.cache_bytes_per_token
        facts["cache_bytes_per_token_at"] = {f"{times}x": reduced_bytes(model_spec, times, 1) for times in REDUCTIONS}
        facts["cache_bytes_at"] = cache.cache_bytes_at
        first = asdict(next(iter(model_spec.attention_layers.values())))
        facts |= {"family": model_spec.model_type, "num_layers": len(model_spec.layers)}
        facts |= {name: first[name] for name in ("num_heads", "num_kv_heads", "head_dim")}
        shape = asdict(model_spec)
        return facts | {
            "layers": [_facts(layer.attention) for layer in model_spec.layers],
            "vision": model_spec.has_vision,
            "targets": {name: dict(zip(("export", "why"), found, strict=True)) for name, found in self.targets.items()},
            **{k: shape[k] for k in shape if k not in ("layers", "outside_bytes", "version")},
        }


def _facts(attention: AttentionSpec | None) -> dict[str, Any] | None:
    """What a config says of a layer's attention."""
    return None if attention is None else {name: getattr(attention, name) for name in CONFIG_FIELDS}


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The report of any conversion: the place of the model, and held-out scores before and after.

    ``spec``: what the model now is.
    ``cache_bytes_at``: bytes of the cache before and after, by the number of tokens in it.
    ``commit``: the source's, where it came from the hub. ``notes``: what was done to its files first, where they were
    not plain, and how they differ from its config.
    """

    output: Path
    spec: ModelSpec
    before: Scores
    after: Scores
    cache_bytes_at: dict[str, dict[str, int]]
    commit: str | None
    notes: tuple[str, ...]
    computing: Computing
    seconds: float
    peak_rss_bytes: int
    anymla_version: str

    def facts(self, model: str, recipe: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return {
            "output": str(self.output),
            "model": model,
            "commit": self.commit,
            "notes": list(self.notes),
            "recipe": recipe,
            "layers": layers,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "cache_bytes_at": self.cache_bytes_at,
            "computing": asdict(self.computing),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "anymla_version": self.anymla_version,
            "versions": versions(),
        }


@dataclass(frozen=True, kw_only=True)
class Conversion(ConversionReport):
    """The report of the step mla: its plan and its layers."""

    plan: MLAPlan
    layers: tuple[LayerResult, ...]

    @property
    def model(self) -> str:
        """Returns what was converted."""
        return self.plan.model

    @property
    def method(self) -> MLA:
        """The settings of the step."""
        return self.plan.recipe

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return self.facts(self.model, self.method.model_dump(), [asdict(layer) for layer in self.layers])


@dataclass(frozen=True, kw_only=True)
class CodedConversion(ConversionReport):
    """The report of a conversion to codes; ``layers``: the method's own report of each layer that it changed."""

    model: str
    method: LayerMethod
    layers: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return self.facts(self.model, {self.method.name: self.method.model_dump(mode="json")}, list(self.layers))
