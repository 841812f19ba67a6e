"""Text out: continues a prompt through transformers' own generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anymla.architectures.model_spec import context_of
from anymla.errors import AnymlaError, CheckpointError, RecipeError, TextError
from anymla.io.checkpoint import load_tokenizer
from anymla.io.computing import load_to_compute
from anymla.io.device import pick_device
from anymla.io.find import with_revision
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source

LEAST_TEMPERATURE = 0.01  # below it, logits divided by it overflow


def continuation(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, streamer: Any = None, **sampling: Any
) -> str:
    """The prompt and what ``model`` adds to it.

    Raises:
        TextError: the tokenizer makes no token of the prompt.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"--prompt is not UTF-8 (character {error.start})") from error
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise TextError(f"--prompt {prompt!r} gives no tokens")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = model.generate(
        **inputs.to(model.device), max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def reply(model: Any, tokenizer: Any, question: str, *, max_new_tokens: int, **sampling: Any) -> str:
    """What ``model`` answers to ``question``, put by the tokenizer's chat template."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def stream_continuation(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str | None,
    revision: str | None = None,
    adapter: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Prints the continuation to stdout as it is made; ``note`` is called with what was done to the model first.

    Raises:
        CheckpointError, RecipeError, TextError: as the message says.
    """
    import torch

    if 0 < temperature < LEAST_TEMPERATURE:
        raise RecipeError(f"--temperature {temperature} is too small: give 0, or at least {LEAST_TEMPERATURE}")

    with plain_source(locate(with_revision(model, revision), adapter=adapter)) as plain:
        for text in plain.notes:
            note(text)
        context_of(plain.folder)  # refuses sizes that are none
        loaded = load_to_compute(plain.folder, dtype=dtype, device=pick_device(device))
        tokenizer = load_tokenizer(plain.folder)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = _streamer(tokenizer)
    try:
        continuation(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    except AnymlaError:
        raise
    except (TypeError, ValueError, ImportError, LookupError, AttributeError) as error:  # by its generation_config.json
        raise CheckpointError(f"{model} cannot continue the prompt: {' '.join(str(error).split()):.200}") from error


def _streamer(tokenizer: Any) -> Any:
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

    return Streamer(tokenizer, skip_special_tokens=True)
