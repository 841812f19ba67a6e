"""What several pages show of models: their bytes and quality side by side, their layers, and how they are served."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from anymla.architectures.model_spec import read_config, spec_of
from anymla.io.checkpoint import ACCOUNT
from anymla.io.config import read_object
from anymla.layouts import GRID_TARGETS, TARGETS, target_refusal
from anymla.methods.mla.settings import MLA
from anymla.report.chart import Chart, Series
from anymla.report.page import Cell, Command, Section, Table, Tile, number
from anymla.report.units import duration, measured, share, size, unit_of

if TYPE_CHECKING:
    from anymla.methods.base import Method, Paper
    from anymla.run_outcome import Cost, Quality

NOTICEABLE = 0.01  # of the bytes; weights that change by less are the same
BITS, ONCE = "bits per packed weight", "+ once"  # columns that few models need
RARE = (BITS, ONCE)
FAR = 20  # times; losses that are further apart are drawn on a logarithmic scale


class Outcome(Protocol):
    """A model: its name, what it costs, how good it is, and the seconds that took."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def account(self) -> Cost: ...  # noqa: D102
    @property
    def quality(self) -> Quality | None: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102


def tiles(first: Outcome, last: Outcome, seconds: float) -> tuple[Tile, ...]:
    """The figures of ``last`` beside those of ``first``."""
    before, after = first.account, last.account
    found = [_less(f"Cache at {after.context:,} tokens", before.cache_bytes_at_context, after.cache_bytes_at_context)]
    if before.weight_bytes is not None and after.weight_bytes is not None:
        found.append(_less("Weights", before.weight_bytes, after.weight_bytes))
    if first.quality is not None and last.quality is not None:
        found += quality_tiles(last.quality, first.quality.perplexity)
    return (*found, Tile("Time", duration(seconds)))


def _less(label: str, before: int, after: int) -> Tile:
    return Tile(label, size(after), f"of {size(before)}: {share(after, before)}")


def quality_tiles(quality: Any, original: float | None) -> list[Tile]:
    """KL, perplexity beside that of the ``original``, and agreement, where they are known."""
    found = [Tile("Perplexity", f"{quality.perplexity:.4g}", "" if original is None else f"original: {original:.4g}")]
    if quality.kl is not None:
        error = f" ± {quality.kl_error:.2g}" if quality.kl_error else ""
        found.insert(0, Tile("KL to the original", f"{quality.kl:.3g}{error}", "nats per token; 0 is the same"))
        found.append(Tile("Same top token", f"{quality.top1_agreement:.1%}", "as the original"))
    return found


def outcomes_table(outcomes: Mapping[str, Outcome], first: str, seconds: str) -> Table:
    """A row per model; ``first``: what the names are; ``seconds``: what took them. What no model has is left out.

    Shares are of the first model's bytes.
    """
    original = next(iter(outcomes.values())).account
    rows = [{first: Cell(name), **_cells(outcome, original, seconds)} for name, outcome in outcomes.items()]
    shown = [first, *(name for name in rows[0] if any(_tells(name, row[name].value) for row in rows))]
    return Table(columns=tuple(shown), rows=tuple(tuple(row[column] for column in shown) for row in rows))


def _tells(column: str, value: float | None) -> bool:
    return value is not None and (value != 0 or column not in RARE)


def _cells(outcome: Outcome, original: Cost, seconds: str) -> dict[str, Cell]:
    cost, quality = outcome.account, outcome.quality
    held, whole = cost.cache_bytes_at_context, original.cache_bytes_at_context
    perplexity = kl = error = agreement = None
    if quality is not None:
        perplexity, kl, error, agreement = quality.perplexity, quality.kl, quality.kl_error, quality.top1_agreement
    return {
        "weights": _bytes(cost.weight_bytes),
        BITS: _figure(cost.bits_per_weight, ".2f"),
        "cache per token": _bytes(cost.cache_bytes_per_token),
        ONCE: _bytes(cost.cache_bytes_once),
        f"cache at {cost.context:,} tokens": _bytes(held),
        "share": number(share(held, whole), held / whole if whole else None),
        "perplexity": _figure(perplexity, ".3f"),
        "KL (nats per token)": number(measured(kl, error), kl),
        "same top token": _figure(agreement, ".1%"),
        seconds: _figure(outcome.seconds, ".1f"),
    }


def _figure(value: float | None, form: str) -> Cell:
    return number("-" if value is None else f"{value:{form}}", value)


def _bytes(value: int | None) -> Cell:
    return number("?" if value is None else size(value), value)


def quality_charts(outcomes: Mapping[str, Outcome]) -> Iterator[Chart]:
    """KL against bytes of the cache, and of weights and cache where both change."""
    context = next(iter(outcomes.values())).account.context
    caches = {name: each.account.cache_bytes_at_context for name, each in outcomes.items()}
    weights = {name: each.account.weight_bytes or 0 for name, each in outcomes.items()}
    scored = {name: each.quality.kl or 0.0 for name, each in outcomes.items() if each.quality is not None}
    if not scored:
        return
    if len({*caches.values()}) > 1:
        yield _kl_chart(scored, caches, f"cache at {context:,} tokens")
    if all(weights.values()) and max(weights.values()) > (1 + NOTICEABLE) * min(weights.values()):
        both = {name: held + weights[name] for name, held in caches.items()}
        yield _kl_chart(scored, both, f"weights and cache at {context:,} tokens")


def _kl_chart(scored: Mapping[str, float], held: Mapping[str, int], what: str) -> Chart:
    """A series per model; on a logarithmic scale, which has no place for 0, where they are far apart."""
    unit, each = unit_of(held.values())
    losses = [kl for kl in scored.values() if kl > 0]
    log = len(losses) > 1 and max(losses) > FAR * min(losses)
    drawn = {name: kl for name, kl in scored.items() if kl > 0 or not log}
    return Chart(
        title=f"KL against bytes of {what}",
        x_label=f"{what} ({unit})",
        y_label="KL, log scale" if log else "KL (nats per token)",
        series=tuple(Series(name=name, points=((held[name] / each, kl),)) for name, kl in drawn.items()),
        log=log,
        from_zero=True,
    )


def layers_section(folder: Path, errors: Mapping[int, float] | None = None, before: float | None = None) -> Section:
    """Every layer's bytes, as account.json in ``folder`` has them.

    ``errors``: of each layer, where they were measured. ``before``: bytes per token of the original's cache.
    """
    layers: Sequence[Mapping[str, Any]] = read_object(folder / ACCOUNT)["layers"]
    held = [layer["cache_bytes_per_token"] for layer in layers]
    unit, each = unit_of([*held, 0 if before is None else before / len(layers)])
    level = None if before is None else ("original, mean over layers", before / len(layers) / each)
    line = Series(name="now", points=tuple((index, value / each) for index, value in enumerate(held)))
    charts = [_by_layer("Cache of a token", f"cache per token ({unit})", line, level)]
    if errors:
        points = tuple((layer, 100 * error) for layer, error in errors.items())
        charts.append(_by_layer("Error of the hidden states", "squared error (%)", Series(name="error", points=points)))
    columns = ("layer", "weights", "cache per token", ONCE, *(["error"] if errors else []))
    names = ("weight_bytes", "cache_bytes_per_token", "cache_bytes_once")
    rows = tuple(
        (
            number(str(index), index),
            *(_bytes(layer[name]) for name in names),
            *([_figure(errors.get(index), ".2%")] if errors else []),
        )
        for index, layer in enumerate(layers)
    )
    return Section(heading="Layers", charts=tuple(charts), tables=(Table(columns=columns, rows=rows),))


def _by_layer(what: str, label: str, series: Series, level: tuple[str, float] | None = None) -> Chart:
    return Chart(title=f"{what} by layer", x_label="layer", y_label=label, series=(series,), level=level)


def papers_section(methods: Sequence[Method]) -> Section:
    """Returns what each step does, and where it comes from."""
    rows = [
        (Cell(step.name), Cell(does), Cell(paper.title, link=paper.link))
        for step in methods
        for does, paper in {step.summary: step.paper, **_chosen(step)}.items()
    ]
    table = Table(columns=("step", "what it does", "paper"), rows=tuple(rows))
    return Section(heading="Methods and papers", tables=(table,))


def _chosen(step: Method) -> dict[str, Paper]:
    """Whose the choices of the step mla are."""
    if not isinstance(step, MLA):
        return {}
    return dict(
        zip((f"rope channels: {step.rope}", f"factorisation: {step.factorization}"), step.papers(), strict=True)
    )


def use_section(folder: Path, place: Path, original: str, method: Method | None = None) -> Section:
    """The commands that use and serve what lies in ``folder`` and will be at ``place``.

    ``method``: the step that converted it, which may have planned for a target.
    """
    target, cache = (method.target, method.cache_option) if isinstance(method, MLA) else (None, "")
    config = read_config(folder)
    converted = str(config["model_type"]).startswith("anymla_")
    quoted, other = shlex.quote(str(place)), shlex.quote(original)
    found = [
        Command("Talk with it, the original beside it", f"anymla chat {quoted} --against {other}"),
        Command("Compare both on a text of yours", f"anymla compare {other} {quoted} --text YOUR.txt -o RESULTS"),
        Command("Serve it in transformers", f"transformers serve {quoted}{' --trust-remote-code' * converted}"),
    ]
    if not converted:
        found += _stock(quoted, packed="quantization_config" in config)
        return Section(
            heading="Use it", text="It is a stock checkpoint: it needs nothing of anymla.", commands=(*found,)
        )
    found += [
        Command(
            f"Export it, which ends with the commands to serve it ({name})",
            f"anymla export {quoted} --to {name}{cache * (name == target)} -o SERVED",
        )
        for name in _exports(config, target)
    ]
    return Section(heading="Use it", commands=(*found,))


def _exports(config: Mapping[str, Any], target: str | None) -> list[str]:
    """Formats that hold the model: that of its ``target``, and those that ask for no plan of their own."""
    spec = spec_of(config)
    if "quantization_config" in config or any(layer.packed or layer.coded or layer.shared for layer in spec.layers):
        return []
    latent = all(layer.latent is not None and not layer.latent.exact_window for layer in spec.layers)
    free = {name for name in TARGETS if latent and name not in GRID_TARGETS and target_refusal(name, spec) is None}
    return [name for name in TARGETS if name == target or name in free]


def _stock(quoted: str, *, packed: bool) -> Iterator[Command]:
    yield Command("Serve it in vLLM", f"vllm serve {quoted}")
    if not packed:
        lines = f"python convert_hf_to_gguf.py {quoted} --outfile model.gguf\nllama-server -m model.gguf"
        yield Command("Serve it in llama.cpp, whose repository has the converter", lines)
