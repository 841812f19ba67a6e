"""A model whose weights stay in their files but for the module that is in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from anymla.errors import CheckpointError
from anymla.io.auto import model_class
from anymla.io.checkpoint import check_loading, check_weights, implementations, safe_config
from anymla.io.device import copied_to
from anymla.io.extra import left_out
from anymla.io.safetensors import Stored, read_header
from anymla.io.shards import check_amount


class StreamedModel:
    """A causal language model on the meta device; transformers' own loading fills one module at a time.

    ``model``: the model; its non-persistent buffers (rope frequencies) are real and on ``device``. ``saved``: the dtype
    of each of its tensors, as transformers loads and saves it, whatever is computed in. ``notes``: what the files hold
    that the config does not tell, in words.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or no place in the model.
    """

    def __init__(self, folder: Path, *, dtype: str | None, device: str) -> None:
        self.folder, self.device = folder, device
        self.stored: dict[str, Stored] = {}
        for file in check_weights(folder):
            self.stored |= read_header(file)
        self.model = self._skeleton(dtype)
        self._names: dict[nn.Module, str] = {module: name for name, module in self.model.named_modules()}
        mapping = get_model_conversion_mapping(self.model)
        dtype_now = self.model.dtype
        self._loading = LoadStateDictConfig(
            dtype=dtype_now,
            dtype_plan=self.model._get_dtype_plan(dtype_now),
            weight_mapping=mapping,
            ignore_mismatched_sizes=True,
        )
        self.saved: dict[str, torch.dtype] = {name: value.dtype for name, value in self.model.state_dict().items()}
        self._dtype: torch.dtype = dtype_now
        self._computing: torch.dtype = dtype_now
        self._sources = self._renamed(mapping)
        self._ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        self.notes = [*left_out(self._placeless()), *self._untie()]

    def _skeleton(self, dtype: str | None) -> Any:
        """The model on the meta device, once every tensor in the files was found to have its place."""
        config = safe_config(self.folder)
        try:
            check_amount(self.folder, config, {name: prod(tensor.shape) for name, tensor in self.stored.items()})
            model, info = model_class(config).from_pretrained(
                None,
                config=config,
                dtype=dtype or "auto",
                state_dict={name: tensor.meta() for name, tensor in self.stored.items()},
                device_map={"": "meta"},
                output_loading_info=True,
                **implementations(config, dtype),
                ignore_mismatched_sizes=True,  # reported below, by name
            )
            self._fill_buffers(model)
            _say_device(model, self.device)
        except CheckpointError:
            raise
        except Exception as error:  # configs, tensors and transformers' own checks raise anything
            raise CheckpointError(f"{self.folder} cannot be loaded: {' '.join(str(error).split()):.300}") from error
        check_loading(self.folder, info, model, self.stored)
        return model.eval().requires_grad_(False)

    def _fill_buffers(self, model: Any) -> None:
        """Computes what no file holds, as the model's own constructor does."""
        from accelerate import init_empty_weights

        before = torch.get_default_dtype()
        torch.set_default_dtype(model.dtype)
        try:
            with init_empty_weights(include_buffers=False):
                twin = type(model)(model.config)
        finally:
            torch.set_default_dtype(before)
        for module, real in zip(model.modules(), twin.modules(), strict=True):
            for name in module._non_persistent_buffers_set:
                value = real._buffers[name]
                module._buffers[name] = None if value is None else value.to(self.device)
            for name, value in vars(real).items():
                if isinstance(value, Tensor):  # kept beside the buffers
                    setattr(module, name, value.to(self.device))

    def _renamed(self, mapping: list[Any]) -> dict[str, list[str]]:
        """Which tensors of the files make a tensor of the model: by its name, the names in the files."""
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, sources = self.model.state_dict(), dict[str, list[str]]()
        for name in self.stored:
            target, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            sources.setdefault(name if target not in state and name in state else target, []).append(name)
        return sources

    def _placeless(self) -> list[str]:
        """Tensors in the files that transformers leaves out when it loads the model."""
        state = self.model.state_dict()
        return sorted(name for target, names in self._sources.items() if target not in state for name in names)

    def _untie(self) -> list[str]:
        """Takes a tie away where the files hold two different tensors, as transformers does when it loads them.

        In the config too, so that the model that comes out keeps both. Returns a note for each.
        """
        stored = [name for name in self._ties if name in self._sources]
        broken = [name for name in stored if (owner := self._first_of_tied(name)) != name and self._differ(name, owner)]
        for name in broken:
            del self._ties[name]
        for prefix, part in self.model.named_modules():
            if isinstance(part, PreTrainedModel):
                dotted = f"{prefix}." if prefix else ""
                if any(f"{dotted}{name}" in broken for name in part.get_expanded_tied_weights_keys()):
                    part.config.tie_word_embeddings = False
        return [
            f"config.json ties {name} to other weights, and the files hold a different one: it was kept, as "
            "transformers does, and the new config says tie_word_embeddings false"
            for name in broken
        ]

    def _differ(self, name: str, other: str) -> bool:
        """Whether two tensors of the files differ once they are loaded, in the model's dtype."""
        self._load((name, other))
        differ = not torch.equal(self.model.get_parameter(name), self.model.get_parameter(other))
        for loaded in (name, other):
            unload(self.model.get_submodule(loaded.rpartition(".")[0]), recurse=False)
        return differ

    def compute_in(self, dtype: str) -> None:
        """Lets all weights be ``dtype`` once they are loaded, with the numbers that they have as saved."""
        self._computing = getattr(torch, dtype)
        if self._computing == self._dtype:
            return
        self.model.to(self._computing)
        for module in self.model.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.dtype == self._dtype:  # kept beside the buffers
                    setattr(module, name, value.to(self._computing))

    def as_saved(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model in the dtype that it is saved in; a new one in the model's."""
        if self._computing == self._dtype or not tensor.is_floating_point():
            return tensor
        return tensor.to(self.saved.get(name, self._dtype))

    def saved_in(self, module: nn.Module) -> torch.dtype:
        """The dtype that most of a module's numbers are saved in: that of its largest parameter."""
        largest = max(module.named_parameters(), key=lambda named: named[1].numel())[0]
        return self.saved[f"{self._names[module]}.{largest}"]

    def dtypes_in(self, module: nn.Module) -> dict[str, torch.dtype]:
        """The dtypes that a module's tensors are saved in, by their names in it."""
        prefix = f"{self._names[module]}."
        return {name.removeprefix(prefix): dtype for name, dtype in self.saved.items() if name.startswith(prefix)}

    @property
    def stored_dtype(self) -> str:
        """The dtype of the checkpoint, which is what is saved in."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def width(self) -> float:
        """The size of a saved number over that of a computed one."""
        return self._dtype.itemsize / self._computing.itemsize

    def _first_of_tied(self, name: str) -> str:
        """The first tensor in the files of those that ``name`` is tied with; ``name`` where there is none."""
        tied = self._ties.get(name, name)
        ring = [tied, *(other for other, source in self._ties.items() if source == tied)]
        return next((other for other in ring if other in self._sources), name)

    def owner(self, name: str) -> str:
        """The tensor that the files hold for ``name``: itself, or the one it is tied to."""
        return name if name in self._sources else self._first_of_tied(name)

    def name_of(self, module: nn.Module) -> str:
        """The dotted name of a module of the model."""
        return self._names[module]

    def tied_away(self) -> set[str]:
        """Names that the model ties to others, and that files leave out."""
        return set(self.model.get_expanded_tied_weights_keys(all_submodels=True))

    @contextmanager
    def layer(self, module: nn.Module) -> Iterator[None]:
        """Within the block, all weights of ``module`` are on the device; whatever it holds then is dropped at the end.

        Raises:
            CheckpointError: a file of the source is gone or was cut.
        """
        prefix, parts = f"{self._names[module]}.", list(module.modules())
        self._load(target for target in self._sources if target.startswith(prefix))
        self._to_device(module)
        try:
            yield
        finally:
            for part in (*parts, *module.modules()):  # those that were replaced, too
                unload(part, recurse=False)

    @contextmanager
    def on_demand(self, layers: Iterable[nn.Module], *, embeddings: bool = False) -> Iterator[None]:
        """Within the block, a module outside ``layers`` gets its weights when it first runs.

        ``embeddings``: the input embeddings get theirs at once, for models that send tokens to where these weights are.
        """
        inside = {module for layer in layers for module in layer.modules()}
        outside = [module for module in self.model.modules() if module not in inside]
        hooks = [module.register_forward_pre_hook(lambda module, _: self.fill(module)) for module in outside]
        try:
            if embeddings:
                self.fill(self.model.get_input_embeddings())
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in outside:
                unload(module, recurse=False)

    def fill(self, module: nn.Module) -> None:
        """Loads what ``module`` itself, not its children, lacks."""
        prefix = f"{name}." if (name := self._names[module]) else ""
        lacking = [prefix + name for name, tensor in _own_tensors(module) if tensor.is_meta]
        owners = {name: self.owner(name) for name in lacking}
        self._load(set(owners.values()))
        for name, owner in owners.items():
            if name != owner:
                parent, _, last = owner.rpartition(".")
                other = self.model.get_submodule(parent)
                module._parameters[name.rpartition(".")[2]] = other._parameters[last]
                unload(other, recurse=False)
        self._to_device(module, recurse=False)

    def _load(self, targets: Iterable[str]) -> None:
        names = [name for target in targets for name in self._sources.get(target, ())]
        if not names:
            return
        try:
            tensors = {name: self.stored[name].read() for name in names}
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.folder} can no longer be read: {error}") from error
        self.model._load_pretrained_model(self.model, tensors, None, self._loading)

    def _to_device(self, module: nn.Module, *, recurse: bool = True) -> None:
        for part in module.modules() if recurse else (module,):
            for name, tensor in _own_tensors(part):
                if tensor.is_meta:
                    raise CheckpointError(f"{self.folder} lacks the tensor {self._names.get(part, '')}.{name}")
                value = self._ready(f"{prefix}.{name}" if (prefix := self._names[part]) else name, tensor)
                if name in part._parameters:
                    part._parameters[name] = nn.Parameter(value, requires_grad=False)
                else:
                    part._buffers[name] = value

    def _ready(self, name: str, tensor: Tensor) -> Tensor:
        """A loaded tensor, rounded as it is saved, in what is computed in."""
        if self._computing == self._dtype or not tensor.is_floating_point():
            return copied_to(self.device, tensor)
        return copied_to(self.device, tensor.to(self.saved[name])).to(self._computing)


def _say_device(model: nn.Module, device: str) -> None:
    """Lets ``model.device``, where models put their inputs, be where weights will be and not where they are now."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            module.__class__ = type(
                kind.__name__, (kind,), {"device": torch.device(device), "__module__": kind.__module__}
            )


def unload(module: nn.Module, *, recurse: bool = True) -> None:
    """Drops the numbers of ``module``, all that a state dict holds; shapes stay."""
    for part in module.modules() if recurse else (module,):
        for name, tensor in _own_tensors(part):
            empty = torch.empty_like(tensor, device="meta")
            if name in part._parameters:
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
            else:
                part._buffers[name] = empty


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the module itself."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return [(name, tensor) for name, tensor in (module._parameters | buffers).items() if tensor is not None]
