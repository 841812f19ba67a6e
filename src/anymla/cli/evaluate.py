"""eval, generate."""

from __future__ import annotations

from typing import Annotated

import typer

from anymla import pipeline
from anymla.cli.options import Device, Dtype, Json, Model, app, err, out, print_json
from anymla.recipe import MOST


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help="Text file, .jsonl (field 'text') or hub data set name[:config[:split]].")],
    against: Annotated[str | None, typer.Option(help="The original model, for KL and top-1 agreement.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=256, max=MOST, help="Read at most this many tokens. Default: all.")
    ] = None,
    length: Annotated[
        int, typer.Option(min=8, max=MOST, help="Tokens per window (at most the model's context).")
    ] = 1024,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL to the original, top-1 agreement, and the live cache's bytes per token."""
    with err.status("scoring"):
        scores = pipeline.evaluate(model, text, against, tokens=tokens, length=length, dtype=dtype, device=device)
    if as_json:
        return print_json(scores.to_dict())
    from anymla.report.tables import scores_table

    out.print(scores_table({str(model): scores}, f"On {text}"))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for temperature above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Continue a prompt, streaming, through transformers' own generate."""
    from anymla.evaluation.story import stream_continuation

    stream_continuation(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device, dtype=dtype
    )
