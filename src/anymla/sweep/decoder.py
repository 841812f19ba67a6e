"""A streamed model as a sweep runs it: its layers, this process's windows, and what each layer is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymla.architectures.families import FAMILIES
from anymla.architectures.stock_config import config_after
from anymla.io.streamed import StreamedModel
from anymla.methods.base import Plan
from anymla.model_run.activations import Activations
from anymla.model_run.stream import batch_size, check_runs, decoder_layers, layer_inputs, layers_give_tuples
from anymla.modeling.spec import ModelSpec
from anymla.sweep.layer import CalibrationSplit, Layer
from anymla.sweep.streams import own_windows

PROBE_TOKENS = 8


class Decoder:
    """The layers of ``source`` and how they are run.

    ``windows`` [N,T] are this process's; ``shape`` [N,T,D] and ``dtype`` are those of their hidden states. ``tuples``:
    whether the layers return tuples.

    Raises:
        TextError: there are more processes than windows to choose on.
        UnsupportedModelError: transformers' own code fails.
    """

    def __init__(self, source: StreamedModel, model: ModelSpec, windows: Tensor) -> None:
        self.source, self.model = source, model
        self.family = FAMILIES[model.text_model_type]
        self.modules = decoder_layers(source.model)
        self.windows, self.split = own_windows(windows, CalibrationSplit.of(len(windows)))
        with source.on_demand(self.modules, embeddings=True):
            ids = self.windows[:1].to(source.device)
            self.tuples = layers_give_tuples(source.model, ids[:, :PROBE_TOKENS])
            inputs = layer_inputs(source.model, ids, tuples=self.tuples)
            check_runs(source.model, inputs.hidden[:, :PROBE_TOKENS], tuples=self.tuples)
        self.arguments = inputs.arguments
        self.shape, self.dtype = (len(self.windows), *inputs.hidden.shape[1:]), inputs.hidden.dtype

    @torch.no_grad()
    def embed(self, *streams: Activations) -> None:
        """Fills each stream with the embeddings of as many windows as it has room for."""
        with self.source.on_demand(self.modules, embeddings=True):
            for number, window in enumerate(self.windows):
                ids, place = window[None].to(self.source.device), slice(number, number + 1)
                hidden = layer_inputs(self.source.model, ids, tuples=self.tuples).hidden
                for stream in streams:
                    if number < len(stream):
                        stream[place] = hidden

    def layer(
        self,
        index: int,
        plan: Plan,
        *,
        original: Activations,
        converted: Activations,
        below: tuple[dict[str, Any] | None, ...] = (),
    ) -> Layer:
        """One layer, whose weights are there."""
        module, old, planned = self.modules[index], self.model.layers[index], plan.layer(index)
        heads = 0 if old.attention is None else old.attention.num_heads
        return Layer(
            index=index,
            module=module,
            name=self.source.name_of(module),
            old=old,
            planned=old if planned is None else planned,
            choice=plan.choices[index],
            below=below,
            arguments=self.arguments[index],
            windows=self.split,
            batch=batch_size(heads, self.shape[1]) if self.family.batched and heads else 1,
            config=self.source.model.config.get_text_config(),
            new_config=config_after(self.source.model.config, self.model, plan.after, plan.removed).get_text_config(),
            family=self.family,
            saved=self.source.saved_in(module),
            dtypes=self.source.dtypes_in(module),
            original=original,
            converted=converted,
            weights_of=self.weights_of,
        )

    def weights_of(self, index: int) -> dict[str, Tensor]:
        """The weights of a layer that is not in use."""
        with self.source.layer(self.modules[index]):
            weights: dict[str, Tensor] = self.modules[index].state_dict()
        return weights
