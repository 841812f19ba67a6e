"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from anymla.account import account, reduced_bytes, told_lengths
from anymla.methods.cache_coding.explain import coded_layers, share_note
from anymla.methods.duration import spoken
from anymla.report.terminal import FittedTable, table
from anymla.report.units import measured, size

if TYPE_CHECKING:
    from anymla.evaluation.scores import Scores
    from anymla.modeling.attention_spec import AttentionSpec
    from anymla.modeling.spec import RopeSpec
    from anymla.outcomes import CodedConversion, Conversion, Inspection
    from anymla.training.outcome import Recovery


def _rope(rope: RopeSpec | None, first: AttentionSpec, rotated: int, layers: int) -> str:
    """The rope facts in one cell."""
    if rope is None:
        return "none"
    settings = [f"{name} {value}" for name, value in rope.settings.items()]
    part = f"{2 * first.rope_pairs} of {first.head_dim} dims" if 0 < 2 * first.rope_pairs < first.head_dim else None
    where = None if rotated == layers else f"in {rotated} of {layers} layers"
    return ", ".join(filter(None, [rope.rope_type, f"theta {rope.theta:g}", part, where, *settings]))


def inspection_table(inspection: Inspection) -> Group:
    """Draws the facts of `anymla inspect`."""
    if inspection.model_spec is None:
        return Group(Text(f"{inspection.model} cannot be converted: {inspection.reason}"))
    facts, attending = inspection.model_spec, inspection.model_spec.attention_layers
    first = next(iter(attending.values()))
    grouping = "MHA" if first.num_kv_heads == first.num_heads else "MQA" if first.num_kv_heads == 1 else "GQA"
    windows = {layer.sliding_window for layer in attending.values()}
    kept, rotated = len(facts.layers) - len(attending), sum(layer.rope_pairs > 0 for layer in attending.values())
    rows = [
        ("family", facts.model_type),
        *([("vision-language model", f"text model {facts.text_model_type}; vision stays as it is")] * facts.has_vision),
        ("can be converted", "yes"),
        ("layers", f"{len(facts.layers)}{f', {kept} without softmax attention stay unchanged' if kept else ''}"),
        ("attention", f"{grouping}: {first.num_heads} heads, {first.num_kv_heads} KV heads, head_dim {first.head_dim}"),
        ("rope", _rope(facts.rope, first, rotated, len(attending))),
        ("biases", f"q, k, v: {_yes(first.qkv_bias)}; output: {_yes(first.output_bias)}"),
        ("query and key norms", _yes(first.qk_norm)),
        ("sliding window", ", ".join(str(window or "none") for window in sorted(windows, key=str))),
        ("dtype", facts.dtype),
        *(("before conversion", note) for note in inspection.notes),
    ]
    lengths = told_lengths(facts)
    widest = max(layer.cached_numbers for layer in attending.values())
    now = [size(held) for held in account(facts, (1, *lengths)).cache_bytes_at.values()]
    cache = [("now", "100 %", *now, f"{facts.cached_numbers}")]
    for times in (4, 8, 16):
        less = [size(reduced_bytes(facts, times, length)) for length in (1, *lengths)]
        cache.append((f"{times}x less", f"{100 / times:g} %", *less, f"{widest / times:g}"))
    at_lengths = [f"at {length:,} tokens" for length in lengths]
    slides = any(layer.cache_window for layer in attending.values())
    return Group(
        table(inspection.model, ("fact", "value"), rows, texts=2),
        table("KV cache", ("", "--kv-cache", "per token", *at_lengths, "numbers per layer"), cache),
        *([Text(f"Here shares are of {facts.dtype}; {counted}.")] if (counted := share_note(facts.dtype)) else []),
        *([Text("Per token: until windows are full. Layers with a window then hold no more.")] * slides),
        Text(f"Next: anymla plan {inspection.model} --kv-cache 0.125"),
    )


def targets_table(inspection: Inspection) -> FittedTable:
    """Draws the engines of `anymla inspect --targets`."""
    rows = ((name, *found) for name, found in inspection.targets.items())
    return table(inspection.model, ("target", "export", "because or with"), rows, texts=3)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def plan_table(costs: Mapping[str, Any]) -> Group:
    """Draws the plan of `anymla plan`; a ~ marks a split that conversion will choose on calibration text."""
    rows = []
    numbered = enumerate(costs["layers"])  # in a run of equal layers, index and position differ by the same
    alike = groupby(numbered, key=lambda each: each[1] | {"layer": each[1]["layer"] - each[0]})
    for _, pairs in alike:
        group = [layer for _, layer in pairs]
        layer = group[0]
        indices = [member["layer"] for member in group]
        about = "~" if layer["chosen_on_calibration"] else ""
        rows.append(
            (
                f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else indices[0],
                f"{about}{layer['rope_dims']}",
                f"{about}{layer['kv_rank']}",
                " -> ".join(size(layer["cache_bytes_per_token"][when]) for when in ("before", "after")),
                *(_before_after(layer[name]) for name in ("cached_numbers", "parameters", "flops_per_token")),
            )
        )
    columns = ("layers", "2K", "r", "cache per token", "numbers", "parameters", "FLOPs per token")
    cache = costs["cache_bytes_per_token"]
    notes = [
        f"{LEGEND} Parameters and FLOPs are of the attention, FLOPs of one decoded token at 4096 cached tokens.",
        f"Cache per token{_while_short(costs)}: {size(cache['before'])} -> {size(cache['after'])}"
        + (f", and {size(costs['exact_window_bytes'])} for the exact window" if costs["exact_window_bytes"] else "")
        + f"{_at_lengths(costs['cache_bytes_at'])}. "
        f"Predicted peak memory of the conversion: {size(costs['predicted_peak_bytes'])}; time on this machine's "
        f"processor: {spoken(costs['estimated_seconds'])}.",
    ]
    if costs["kept_layers"]:
        notes.append(f"Unchanged, without softmax attention: layers {', '.join(map(str, costs['kept_layers']))}.")
    if any(layer["chosen_on_calibration"] for layer in costs["layers"]):
        notes.append("~ marks a typical split; conversion chooses it per layer on calibration text.")
    return Group(table(costs["model"], columns, rows), *(Text(note) for note in (*notes, *costs["notes"])))


def _while_short(costs: Mapping[str, Any]) -> str:
    """Where layers slide: up to when a token takes what is said."""
    each, sizes = costs["cache_bytes_per_token"]["before"], costs["cache_bytes_at"]
    slides = any(found["before"] < int(length) * each for length, found in sizes.items())
    return " until sliding windows are full" if slides else ""


def _at_lengths(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """What the whole cache takes, by the number of tokens in it."""
    return "".join(
        f"; at {int(length):,} tokens: {size(each['before'])} -> {size(each['after'])}"
        for length, each in sizes.items()
    )


def _before_after(values: Mapping[str, int]) -> str:
    return f"{_short(values['before'])} -> {_short(values['after'])}"


def _short(value: float) -> str:
    """A number with at most three digits and its unit."""
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


LEGEND = "2K: rope dims. r: rank of the latent. numbers: what a layer caches of a token, 2K + r."


def conversion_layers_table(conversion: Conversion) -> Group:
    """Every layer: converted to what, at what loss; or kept, where it has no softmax attention."""
    done, counted = {layer.layer: layer for layer in conversion.layers}, account(conversion.spec).layers
    rows: list[tuple[Any, ...]] = []
    for index in range(len(conversion.plan.layers)):
        if (layer := done.get(index)) is None:
            rows.append((index, "none: kept", "", "", "", ""))
        else:
            cached = size(counted[index].cache_bytes_per_token)
            rows.append((index, "converted", layer.rope_dims, layer.kv_rank, cached, f"{layer.error:.2%}"))
    columns = ("layer", "attention", "2K", "r", "cache per token", "error")
    legend = f"{LEGEND} error: squared change of the hidden states after the attention, over their squared size."
    return Group(table(str(conversion.output), columns, rows), Text(legend))


def codes_table(planned: Mapping[str, Any]) -> Group:
    """Draws the plan of a cache of codes."""
    (name,) = planned["recipe"]
    cache, once = planned["cache_bytes_per_token"], planned["cache_bytes_once"]
    exact = f", and {size(once)} once for exact tokens" if once else ""
    coded = [
        CODE_LEGEND,
        "Bits and axes are those that a conversion with these settings chooses."
        if "curve" in planned
        else "Bits and axes are those of typical layers; conversion chooses them on calibration text (--curve too).",
    ]
    notes = [
        *(coded if planned["layers"] else ()),
        f"Cache per token{_while_short(planned)}: {size(cache['before'])} -> {size(cache['after'])}{exact}"
        f"{_at_lengths(planned['cache_bytes_at'])}. Time of the conversion on this machine's processor: "
        f"{spoken(planned['estimated_seconds'])}.",
    ]
    if (counted := share_note(planned["dtype"])) is not None:
        notes.append(f"{counted[0].upper()}{counted[1:]}.")
    return Group(_codes(f"{planned['model']}, {name}", planned["layers"]), *map(Text, notes))


def _codes(title: str, layers: Iterable[Mapping[str, Any]]) -> FittedTable | Text:
    """The layers whose cache is coded; words where there is none."""
    rows = [*_code_rows(layers)]
    nothing = Text(f"{title}: no layer is coded. The cache stays as it is. A lower --kv-cache makes it smaller.")
    return table(title, CODE_COLUMNS, rows) if rows else nothing


CODE_LEGEND = (
    "Per layer: where keys and values are coded, numbers per token, their average bits, and bytes; multiply-adds of "
    "one new token per cached one."
)
CODE_COLUMNS = (
    "layers",
    "keys in",
    "numbers",
    "bits",
    "bytes",
    "values in",
    "numbers",
    "bits",
    "bytes",
    "multiply-adds",
)


def _code_rows(layers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """A row per run of equal layers."""
    alike = groupby(enumerate(layers), key=lambda each: {**each[1], "layer": each[1]["layer"] - each[0]})
    for _, pairs in alike:
        run = [layer for _, layer in pairs]
        first, last = run[0], run[-1]["layer"]
        numbers = first["layer"] if len(run) == 1 else f"{first['layer']}-{last}"
        yield (numbers, *_place(first["keys"]), *_place(first["values"]), _before_after(first["multiply_adds"]))


def _place(place: Mapping[str, Any]) -> tuple[str, int, str, int]:
    """Where keys or values of a layer live, in how many numbers, bits and bytes."""
    mixed = f" of {place['heads_mixed']}" if place["basis"] != "own" else ""
    return f"{place['basis']}{mixed}", place["numbers"], f"{place['bits']:.2f}", place["bytes"]


def coded_layers_table(conversion: CodedConversion) -> Group:
    """Every layer with a cache of codes: where keys and values live, and what they cost."""
    rows = coded_layers(conversion.spec)
    return Group(_codes(str(conversion.output), rows), *([Text(CODE_LEGEND)] if rows else []))


def scores_table(scores: Mapping[str, Scores], title: str) -> FittedTable:
    """Quality against the original (KL in nats with its standard error, same top token) and cache, per model.

    The cache as bytes per token and numbers per token and layer; where a model has an exact window, as bytes per token
    and those of the window, which are there once.
    """
    windows = any(score.cache_window_bytes for score in scores.values())
    rows = [
        (
            name,
            f"{score.perplexity:.3f}",
            measured(score.kl, score.kl_error),
            "-" if score.top1_agreement is None else f"{score.top1_agreement:.1%}",
            size(score.cache_bytes_per_token),
            size(score.cache_window_bytes) if windows else f"{score.cache_numbers_per_token_per_layer:g}",
            f"{score.tokens:,}",
        )
        for name, score in scores.items()
    ]
    cache = ("per token", "+ once") if windows else ("per token", "numbers")
    return table(title, ("model", "perplexity", "KL", "same top token", *cache, "tokens"), rows)


def recovery_table(report: Recovery) -> FittedTable:
    """Perplexity and KL to the original before and after tuning, on held-out text."""
    rows = [
        ("original", f"{report.original_perplexity:.3f}", "0.0000"),
        *(
            (name, f"{quality.perplexity:.3f}", f"{quality.kl:.4f}")
            for name, quality in (("before", report.before), ("after", report.after))
        ),
    ]
    closed = report.gap_closed
    change = f"{closed:.1%} of the gap closed" if closed >= 0 else f"the gap grew by {-closed:.1%}"
    title = f"After {report.tokens:,} tokens, in log-perplexity: {change}"
    return table(title, ("model", "perplexity", "KL"), rows)
