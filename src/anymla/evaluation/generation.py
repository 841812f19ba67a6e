"""Text out, through transformers' own generate: continues a prompt, answers a question, keeps up a talk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from anymla.architectures.model_spec import context_of
from anymla.errors import AnymlaError, CheckpointError, RecipeError, TextError
from anymla.io.checkpoint import load_tokenizer
from anymla.io.computing import load_to_compute
from anymla.io.device import pick_device
from anymla.io.find import with_revision
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source

LEAST_TEMPERATURE = 0.01  # below it, logits divided by it overflow


def generated(model: Any, tokenizer: Any, ids: Any, **options: Any) -> Any:
    """What generate returns, as a dictionary, for the tokens ``ids`` [1,T]; ``options`` are its own."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = ids.to(model.device)
    return model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), pad_token_id=pad, return_dict_in_generate=True, **options
    )


def token_ids(tokenizer: Any, text: str, name: str, *, special: bool = True) -> Any:
    """The tokens [1,T] of ``text``, which messages call ``name``; ``special``: with those that begin every text.

    Raises:
        TextError: the tokenizer makes no token of it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{name} is not UTF-8 (character {error.start})") from error
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    if ids.numel() == 0:
        raise TextError(f"{name} {text!r} gives no tokens")
    return ids


def continuation(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, **options: Any) -> str:
    """The prompt and what ``model`` adds to it; ``options`` are generate's.

    Raises:
        TextError: the tokenizer makes no token of the prompt.
    """
    ids = token_ids(tokenizer, prompt, "--prompt")
    tokens = generated(model, tokenizer, ids, max_new_tokens=max_new_tokens, **options).sequences
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


@dataclass
class Talk:
    """A talk with one model, whose cache is kept between turns: each turn reads what is new.

    Turns are put by the tokenizer's chat template. Without one, each is a new line of one text.
    ``options``: generate's. ``ids`` [T]: all tokens so far. ``cache``: None before the first answer.
    """

    model: Any
    tokenizer: Any
    context: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ids: Any = None
    cached_tokens: int = 0
    _cache: dict[str, Any] = field(default_factory=dict)  # under the name that generate has for it

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def answer(self, question: str, *, max_new_tokens: int, streamer: Any = None) -> str:
        """What the model answers; ``streamer`` is given its tokens as they come.

        Raises:
            CheckpointError: the chat template cannot be used.
            TextError: the question gives no tokens, or the talk fills the model's context.
        """
        import torch

        from anymla.modeling.arguments import CACHE_NAMES

        ids = self._with(question)
        if self.context is not None:
            max_new_tokens = min(max_new_tokens, self.context - ids.shape[1])
        if max_new_tokens < 1:
            raise TextError(f"the talk fills the model's context of {self.context} tokens: begin another")
        options = {"max_new_tokens": max_new_tokens, "streamer": streamer} | self.options | self._cache
        output = generated(self.model, self.tokenizer, ids, **options)
        name = next(name for name in CACHE_NAMES if output.get(name) is not None)
        self._cache = {name: output[name]}
        tokens = output.sequences[0].cpu()
        self.cached_tokens = len(tokens) - 1  # the last one was not read yet
        ends = self.model.generation_config.eos_token_id
        ended = ends is not None and tokens[-1] in torch.tensor(ends)
        self.ids = tokens[:-1] if ended else tokens  # the template ends an answer in its own way
        return str(self.tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True)).strip()

    def cache_bytes(self) -> int:
        """Bytes of the cache, measured from its tensors, in the checkpoint's dtype."""
        from anymla.account import measured_layer

        (cache,) = self._cache.values()
        width = (self.model.config.dtype or self.model.dtype).itemsize / self.model.dtype.itemsize
        layers = (measured_layer(layer, [self.cached_tokens], width) for layer in cache.layers)
        return sum(layer.cache_bytes_at[str(self.cached_tokens)] for layer in layers)

    def _with(self, question: str) -> Any:
        """All tokens [1,T] up to where the answer to ``question`` begins."""
        import torch

        text = self._put(question) if self.templated else ("" if self.ids is None else "\n") + question
        ids = token_ids(self.tokenizer, text, "the line", special=self.ids is None and not self.templated)
        return ids if self.ids is None else torch.cat([self.ids[None], ids], dim=1)

    def _put(self, question: str) -> str:
        """What the chat template puts after the last answer, or at the beginning, up to the start of the next one."""
        turn = [{"role": "user", "content": question}]
        if self.ids is None:
            return self._rendered(turn)
        mark = uuid4().hex  # stands for the last answer, whose tokens are known
        _, found, rest = self._rendered([*turn, {"role": "assistant", "content": mark}, *turn]).rpartition(mark)
        if not found:
            raise CheckpointError("the tokenizer's chat template leaves earlier answers out: a talk cannot go on")
        return rest

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates are programs
            raise CheckpointError(f"the chat template cannot be used: {' '.join(str(error).split()):.200}") from error


def sampling(temperature: float) -> dict[str, Any]:
    """Generate's options for ``temperature``; 0 takes the most likely token.

    Raises:
        RecipeError: it is too small to divide by.
    """
    if 0 < temperature < LEAST_TEMPERATURE:
        raise RecipeError(f"--temperature {temperature} is too small: give 0, or at least {LEAST_TEMPERATURE}")
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def loaded(
    model: str,
    *,
    device: str,
    dtype: str | None,
    revision: str | None = None,
    adapter: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Any, int | None]:
    """A model, its tokenizer and its context, to generate with; ``note`` is called with what was done to it first.

    Raises:
        CheckpointError, RecipeError: as the message says.
    """
    with plain_source(locate(with_revision(model, revision), adapter=adapter)) as plain:
        for text in plain.notes:
            note(text)
        context = context_of(plain.folder)  # refuses sizes that are none
        network = load_to_compute(plain.folder, dtype=dtype, device=pick_device(device))
        return network, load_tokenizer(plain.folder), context


@contextmanager
def blaming(model: str) -> Iterator[None]:
    """Makes what a model's own files, as its generation_config.json, let go wrong in generate an error of one line.

    Raises:
        CheckpointError: that.
    """
    try:
        yield
    except AnymlaError:
        raise
    except (TypeError, ValueError, ImportError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{model} cannot continue the prompt: {' '.join(str(error).split()):.200}") from error


def stream_continuation(
    model: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, **where: Any
) -> None:
    """Prints the continuation to stdout as it is made; ``where``: as of :func:`loaded`.

    Raises:
        CheckpointError, RecipeError, TextError: as the message says.
    """
    import torch

    options = sampling(temperature)
    network, tokenizer, _ = loaded(model, **where)
    torch.manual_seed(seed)
    with blaming(model):
        shown = streamer_of(tokenizer)
        continuation(network, tokenizer, prompt, max_new_tokens=max_new_tokens, streamer=shown, **options)


def streamer_of(tokenizer: Any, *, skip_prompt: bool = False) -> Any:
    """Prints a text as it is made; the prompt with its first token, for bad settings show up in between."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        prompt: Any = None
        begun = False

        def put(self, value: Any) -> None:
            if not self.begun:
                self.prompt, self.begun = value, True
                return
            self._print_prompt()
            super().put(value)

        def end(self) -> None:
            self._print_prompt()
            super().end()

        def _print_prompt(self) -> None:
            if self.prompt is not None:
                super().put(self.prompt)
                self.prompt = None

    return Streamer(tokenizer, skip_prompt, skip_special_tokens=True)
