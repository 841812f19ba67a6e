"""Ties each converted attention layer to the original's: the same inputs, and both outputs side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from anymla.model_run.stream import first


class AttentionPairs:
    """Hooks on the attention modules ``names`` of the original, and on those of the converted model.

    After a pass of the original and then one of the converted model, ``targets`` and ``outputs`` hold what each layer's
    attention gave, [B,T,D] by module name, both on the original's inputs. The converted model runs as a whole, so that
    what wraps it (sharding, checkpointing of activations) works as always; nothing flows from one layer into the next.
    """

    def __init__(self, original: nn.Module, converted: nn.Module, names: list[str]) -> None:
        self.original, self.converted, self.names = original, converted, names
        self.inputs: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Records both models' passes inside the block."""
        with ExitStack() as hooks:
            for name in self.names:
                theirs, ours = self.original.get_submodule(name), self.converted.get_submodule(name)
                for handle in (
                    theirs.register_forward_pre_hook(self._keep_input(name), with_kwargs=True),
                    theirs.register_forward_hook(self._keep_target(name), with_kwargs=True),
                    ours.register_forward_pre_hook(self._replace_input(name), with_kwargs=True),
                    ours.register_forward_hook(self._keep_output(name), with_kwargs=True),
                ):
                    hooks.callback(handle.remove)
            yield

    def _keep_input(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs[name] = args[0] if args else kwargs["hidden_states"]

        return keep

    def _keep_target(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.targets[name] = first(output) - residual_of(args)

        return keep

    def _replace_input(self, name: str) -> Any:
        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = args[0] if args else kwargs["hidden_states"]
            given = self.inputs[name].to(own.dtype)  # the original may be in 16 bits
            return ((given, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": given})

        return replace

    def _keep_output(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self.outputs[name] = first(output) - residual_of(args)
            detached = first(output).detach()  # what comes after it learns nothing here, and need not be held
            return (detached, *output[1:]) if isinstance(output, tuple) else detached

        return keep


def residual_of(args: tuple[Any, ...]) -> Any:
    """The residual stream that some families' attention is given as its second argument, and adds."""
    return args[1] if len(args) > 1 and isinstance(args[1], Tensor) else 0
