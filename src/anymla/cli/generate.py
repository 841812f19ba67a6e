"""generate, chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from anymla.cli.options import Adapter, Device, Dtype, Model, Revision, app, err, out, print_note
from anymla.cli.progress import shown
from anymla.errors import TextError
from anymla.settings import MOST

if TYPE_CHECKING:
    from anymla.evaluation.generation import Talk

LEAVE = "/exit"

NewTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to add at most, in one answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for temperature above 0.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Continue a prompt, streaming, through transformers' own generate."""
    from anymla.evaluation.generation import stream_continuation

    with shown("generate"):
        stream_continuation(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            dtype=dtype,
            revision=revision,
            adapter=adapter,
            note=print_note,
        )


@app.command()
def chat(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="The original model, which answers too; also org/name@revision.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Talk with a model, and see the bytes of its cache grow. Each line is a turn; /exit ends the talk."""
    import torch

    from anymla.evaluation.generation import Talk, loaded, sampling

    options = sampling(temperature)
    sources = {model: {"adapter": adapter, "revision": revision}} | ({against: {}} if against is not None else {})
    with shown("chat"):
        talks = {
            name: Talk(*loaded(name, device=device, dtype=dtype, note=print_note, **where), options)
            for name, where in sources.items()
        }
    if not talks[model].templated:
        print_note("its tokenizer has no chat template: the model continues your lines as one text")
    torch.manual_seed(seed)
    try:
        for line in _lines():
            _take_turn(line, talks, max_new_tokens)
    except KeyboardInterrupt:
        out.print()


def _lines() -> Iterator[str]:
    """Lines from the terminal, or from what stdin is, until it ends or says /exit."""
    typed = sys.stdin.isatty()
    if typed:
        err.print(f"{LEAVE}, Ctrl-C or Ctrl-D ends the talk")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise TextError(f"a line is not UTF-8 (byte {error.start})") from error
        if line == LEAVE:
            return
        if line:
            yield line


def _take_turn(line: str, talks: dict[str, Talk], max_new_tokens: int) -> None:
    """Lets each model answer, and shows what its cache holds by now."""
    from anymla.evaluation.generation import blaming, streamer_of
    from anymla.report.units import size

    if not sys.stdin.isatty():
        out.print(f"> {line}", soft_wrap=True)
    sizes: list[int] = []
    for name, talk in talks.items():
        if len(talks) > 1:
            out.print(f"{name}:", soft_wrap=True)
        with blaming(name):
            talk.answer(line, max_new_tokens=max_new_tokens, streamer=streamer_of(talk.tokenizer, skip_prompt=True))
        sizes.append(talk.cache_bytes())
        times = f", {sizes[-1] / sizes[0]:.2g} times as much" if len(sizes) > 1 else ""
        out.print(f"[{talk.cached_tokens} tokens, cache {size(sizes[-1])}{times}]", soft_wrap=True)
