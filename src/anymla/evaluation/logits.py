"""Logits a few positions at a time: where a vocabulary is large, those of a whole text fill the memory.

Shapes: B windows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from anymla.model_run.stream import INNER_MODELS

MOST = 1 << 24  # logits at once: 64 MiB in float32


@dataclass(frozen=True)
class Logits:
    """Logits [B,T,V], made when they are asked for.

    ``head`` makes those of some positions, [B,t,V], of the ``source``: hidden states [B,T,D], or all logits.
    """

    source: Tensor
    head: Callable[[Tensor, slice], Tensor]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, whole: Tensor) -> Logits:
        """Logits that are there."""
        return cls(whole, lambda source, part: source[:, part], tuple(whole.shape))

    def at(self, part: slice) -> Tensor:
        """Those of the positions ``part``, [B,t,V]."""
        return self.head(self.source, part)

    def parts(self, first: int = 0, last: int | None = None) -> Iterator[slice]:
        """The positions from ``first`` to before ``last``, in equal parts of about 64 MiB of float32 logits each."""
        rows, length, vocabulary = self.shape
        stop = length if last is None else last
        count = max(1, -(-rows * (stop - first) * vocabulary // MOST))
        size = max(1, -(-(stop - first) // count))
        for start in range(first, stop, size):
            yield slice(start, min(start + size, stop))


def logits_of_pass(model: Any, inputs: Mapping[str, Tensor]) -> Logits:
    """Runs ``model`` on ``inputs`` up to its head; the head runs on those positions that are asked for."""
    found: Logits = at_head(model, model, inputs, lambda logits: logits)
    return found


def at_head(run: Any, model: Any, inputs: Mapping[str, Tensor], use: Callable[[Logits], Any]) -> Any:
    """Calls ``run``, which is ``model`` or wraps it, and gives what ``use`` makes of the logits, or the model's output.

    The last hidden states are made once. For each part of them, the model's own forward pass is called again, and its
    body returns that part. So the family's own steps after the body run too. All logits are made at once in two cases:
    the body cannot be distinguished from the head, or weights are sharded and gathered once for each pass.
    """
    bodies = [] if any(isinstance(part, FSDPModule) for part in model.modules()) else list(_bodies(model))
    entered: list[nn.Module] = []  # the body: what the model calls first
    seen: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        if not entered:
            entered.append(module)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module is not entered[0] or seen or not _is_sequence(output, inputs["input_ids"]):
            return None
        seen.append(output)
        return _part(output, output.last_hidden_state, slice(-1, None))

    def give(module: nn.Module, args: Any, output: Any) -> Any:
        return use(_lazy(model, entered[0], seen[0], inputs["input_ids"]) if seen else Logits.of(output.logits))

    with ExitStack() as hooks:
        for body in bodies:
            hooks.callback(body.register_forward_pre_hook(before).remove)
            hooks.callback(body.register_forward_hook(after).remove)
        hooks.callback(model.register_forward_hook(give, prepend=True).remove)
        return run(**inputs, use_cache=False)


def _lazy(model: Any, body: nn.Module, output: Any, ids: Tensor) -> Logits:
    def head(states: Tensor, part: slice) -> Tensor:
        with _giving(body, _part(output, states, part)):
            logits: Tensor = model.forward(input_ids=ids[:, part], use_cache=False).logits
        return logits

    return Logits(output.last_hidden_state, head, (*ids.shape, model.config.get_text_config().vocab_size))


def _bodies(model: Any) -> Iterator[nn.Module]:
    """The model without its head, and what is inside: some heads call one, some the other."""
    module = getattr(model, "base_model", None)
    while module is not None:
        if getattr(module, "get_output_embeddings", lambda: None)() is None:
            yield module
        module = next((getattr(module, name) for name in INNER_MODELS if hasattr(module, name)), None)


def _is_sequence(output: Any, ids: Tensor) -> bool:
    hidden = getattr(output, "last_hidden_state", None)
    return hidden is not None and hidden.shape[:2] == ids.shape


def _part(output: Any, states: Tensor, part: slice) -> Any:
    """``output`` as if only these positions of ``states`` had been run.

    In one piece: for a part of several rows that is not, torch's linear layer copies the head's whole weight.
    """
    return type(output)(**dict(output) | {"last_hidden_state": states[:, part].contiguous()})


@contextmanager
def _giving(body: nn.Module, output: Any) -> Iterator[None]:
    """Lets ``body`` give ``output``, whatever it is called with."""
    before = vars(body).get("forward")
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
