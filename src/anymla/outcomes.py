"""What inspect and convert return, with their stable JSON names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymla.architectures.blueprint import ALREADY, Blueprint
from anymla.io.versions import versions
from anymla.planning.cache import original_bytes, reduced_bytes, told_lengths
from anymla.planning.plan import Plan
from anymla.planning.targets import verdicts

if TYPE_CHECKING:
    from anymla.conversion.step import LayerResult
    from anymla.evaluation.scores import Scores
    from anymla.io.computing import Computing

REDUCTIONS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a model is and what its cache costs; ``blueprint`` is None where ``supported`` is False.

    ``notes``: what a conversion does to its files first, where they are not plain.
    """

    model: str
    commit: str | None  # of the hub, where it came from there
    supported: bool
    reason: str | None
    blueprint: Blueprint | None
    notes: tuple[str, ...] = ()

    @property
    def already_latent(self) -> bool:
        """Whether it is not converted because it has multi-head latent attention."""
        return self.reason is not None and self.reason.startswith(ALREADY)

    @property
    def targets(self) -> dict[str, tuple[str, str]]:
        """Which serving engines can have it, under which plan, and why not (planning/targets.py); none unsupported."""
        return {} if self.blueprint is None else verdicts(self.blueprint)

    def to_dict(self) -> dict[str, Any]:
        """The facts under their stable JSON names."""
        facts: dict[str, Any] = {"model": self.model, "commit": self.commit, "supported": self.supported}
        facts["reason"] = self.reason
        facts["notes"] = list(self.notes)
        facts |= {"cache_numbers_per_token_per_layer": None, "cache_bytes_per_token": None}
        if (blueprint := self.blueprint) is None:
            return facts
        facts["cache_numbers_per_token_per_layer"] = blueprint.cached_numbers
        facts["cache_bytes_per_token"] = blueprint.cache_bytes
        facts["cache_bytes_per_token_at"] = {f"{times}x": reduced_bytes(blueprint, times, 1) for times in REDUCTIONS}
        facts["cache_bytes_at"] = {str(length): original_bytes(blueprint, length) for length in told_lengths(blueprint)}
        first = asdict(next(iter(blueprint.attention_layers.values())))
        facts |= {"family": blueprint.model_type, "num_layers": len(blueprint.layers)}
        facts |= {name: first[name] for name in ("num_heads", "num_kv_heads", "head_dim")}
        shape = asdict(blueprint)
        return facts | {
            "layers": [None if layer is None else asdict(layer) for layer in blueprint.layers],
            "vision": blueprint.has_vision,
            "targets": {name: dict(zip(("export", "why"), found, strict=True)) for name, found in self.targets.items()},
            **{k: shape[k] for k in shape if k != "layers"},
        }


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did: where the model is, its plan, its layers, and held-out scores before and after.

    ``cache_bytes_at``: bytes of the cache before and after, by the number of tokens in it.
    ``commit``: the source's, where it came from the hub. ``notes``: what was done to its files first, where they were
    not plain, and how they differ from its config.
    """

    output: Path
    plan: Plan
    layers: tuple[LayerResult, ...]
    before: Scores
    after: Scores
    cache_bytes_at: dict[str, dict[str, int]]
    commit: str | None
    notes: tuple[str, ...]
    computing: Computing
    seconds: float
    peak_rss_bytes: int
    anymla_version: str

    def to_dict(self) -> dict[str, Any]:
        """The report under its stable JSON names."""
        return {
            "output": str(self.output),
            "model": self.plan.model,
            "commit": self.commit,
            "notes": list(self.notes),
            "recipe": self.plan.recipe.model_dump(),
            "layers": [asdict(layer) for layer in self.layers],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "cache_bytes_at": self.cache_bytes_at,
            "computing": asdict(self.computing),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "anymla_version": self.anymla_version,
            "versions": versions(),
        }
