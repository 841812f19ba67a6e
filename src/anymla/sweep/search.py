"""Chooses layers one after the other by the KL of the whole model; goes on where it was stopped.

Every layer that may come next is tried. All trials move through the decoder together, one layer at a time, so that a
layer's weights are read once for all of them. A trial begins where its model first differs from the one so far.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anymla.distributed import rank, wait_for_all
from anymla.evaluation.held_out import kl_of_streams
from anymla.io.device import give_back_memory
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.methods.base import Facts, LayerMethod, Plan, Search
from anymla.model_run.activations import Activations, Budget
from anymla.model_run.stream import pass_through
from anymla.modeling.spec import ModelSpec
from anymla.sweep.decoder import Decoder

Told = Callable[[int, int], None]  # (passes through a layer done, all of them)


@torch.no_grad()
def run_search(
    method: LayerMethod,
    search: Search,
    source: StreamedModel,
    model: ModelSpec,
    windows: Tensor,
    work: WorkFolder,
    *,
    memory: int,
    told: Told | None = None,
) -> Facts:
    """What ``search`` chose: the KL in nats per token of each layer when it was added; None for the others.

    Args:
        method: what changes the layers.
        search: which may be chosen, and what the model then is.
        source: the original.
        model: its spec.
        windows: those of all processes [N,T].
        work: an open work folder; what is chosen is kept in it.
        memory: bytes of activations that may be in memory at once; those beyond go to files.
        told: called after each pass through a layer.
    """
    chosen: dict[int, float] = {int(layer): lost for layer, lost in work.progress["search"]}
    if search.candidates(tuple(chosen)):
        trials = _Trials(method, search, Decoder(source, model, windows), work, memory, told)
        while candidates := search.candidates(tuple(chosen)):
            lost = trials.lost(tuple(chosen), candidates)
            best = min(lost, key=lambda layer: (lost[layer], -layer))
            chosen[best] = lost[best]
            _commit(work, list(chosen.items()))
    return [{"kl": chosen[index]} if index in chosen else None for index in range(len(model.layers))]


def _commit(work: WorkFolder, chosen: list[tuple[int, float]]) -> None:
    wait_for_all()
    if rank() == 0:
        work.commit(search=chosen)
    else:
        work.progress["search"] = chosen
    wait_for_all()


class _Trials:
    """Runs trials over this process's windows."""

    def __init__(
        self,
        method: LayerMethod,
        search: Search,
        decoder: Decoder,
        work: WorkFolder,
        memory: int,
        told: Told | None,
    ) -> None:
        self.method, self.search, self.decoder, self.told = method, search, decoder, told
        self.memory, self.folder = memory, work.path
        self.original = self._final([self._stock()], 0)[0]

    def lost(self, chosen: tuple[int, ...], candidates: list[int]) -> dict[int, float]:
        """The KL of the model with each of ``candidates`` added to ``chosen``, over all processes."""
        plans = [self.search.plan(chosen), *(self.search.plan((*chosen, layer)) for layer in candidates)]
        streams = self._final(plans, len(chosen) + 1)
        return {layer: self._kl(stream) for layer, stream in zip(candidates, streams[1:], strict=True)}

    def _stock(self) -> Plan:
        return Plan(after=self.decoder.model, choices=(None,) * len(self.decoder.modules))

    def _final(self, plans: list[Plan], step: int) -> list[Activations]:
        """The final hidden states of every plan's model; the first plan is the one that the others begin with."""
        budget, decoder = Budget(self.memory, self.folder), self.decoder
        first = self._room(budget)
        decoder.embed(first)
        streams: list[Activations] = [first, *(first for _ in plans[1:])]  # a trial's own from where it differs
        for index, module in enumerate(decoder.modules):
            with decoder.source.layer(module):
                for number, plan in enumerate(plans):
                    if streams[number] is first and plan.after.layers[index] != plans[0].after.layers[index]:
                        streams[number] = self._copied(first, budget)
                for stream, plan in zip(streams, plans, strict=True):
                    if stream is not first or plan is plans[0]:
                        self._pass(index, plan, stream)
            give_back_memory()
            if self.told is not None:
                total = len(decoder.modules)
                self.told(step * total + index + 1, (self.search.count + 1) * total)
        return streams

    def _pass(self, index: int, plan: Plan, stream: Activations) -> None:
        """Moves a stream through a layer as a plan changes it; the layer is as before then."""
        layer = self.decoder.layer(index, plan, original=stream, converted=stream)
        if layer.choice is None:
            pass_through(layer.module, stream, layer.arguments, layer.batch)
            return
        path, before = layer.attention_path, layer.attention
        self.method.apply(layer, None)
        pass_through(layer.module, stream, layer.arguments, layer.batch)
        layer.module.set_submodule(path, before)

    def _room(self, budget: Budget) -> Activations:
        return Activations(self.decoder.shape, self.decoder.dtype, self.decoder.source.device, budget)

    def _copied(self, stream: Activations, budget: Budget) -> Activations:
        made = self._room(budget)
        for window in range(len(stream)):
            made[window : window + 1] = stream[window : window + 1]
        made.maps = dict(stream.maps)
        return made

    def _kl(self, stream: Activations) -> float:
        source, decoder = self.decoder.source, self.decoder
        pair = (self.original.split(1), stream.split(1))
        return kl_of_streams(source, decoder.windows, *pair, tuples=decoder.tuples)
