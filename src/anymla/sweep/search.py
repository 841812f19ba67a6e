"""Chooses what becomes of layers by the KL of the whole model, in rounds; goes on where it was stopped.

Everything that may be chosen next is tried. All trials move through the decoder together, one layer at a time, so that
a layer's weights are read once for all of them. A trial begins where its model first differs from the one so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from anymla.distributed import first_decides, rank, wait_for_all
from anymla.evaluation.held_out import kl_of_streams
from anymla.io.device import give_back_memory
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.methods.base import Chosen, Facts, Plan, Search, Survey, SweptMethod
from anymla.model_run.activations import Activations, Budget
from anymla.model_run.stream import pass_through, run_layer
from anymla.modeling.spec import ModelSpec
from anymla.sweep.decoder import Decoder
from anymla.sweep.layer import Layer
from anymla.sweep.survey import PASS, Told


@torch.no_grad()
def run_search(
    method: SweptMethod,
    search: Search,
    source: StreamedModel,
    model: ModelSpec,
    windows: Tensor,
    work: WorkFolder,
    *,
    memory: int,
    told: Told | None = None,
) -> Facts:
    """What ``search`` chose of each layer, with the KL in nats per token of that round; None for the others.

    Args:
        method: what changes the layers.
        search: what may be chosen, and what the model then is.
        source: the original.
        model: its spec.
        windows: those of all processes [N,T].
        work: an open work folder; what is chosen is kept in it.
        memory: bytes of activations that may be in memory at once; those beyond go to files.
        told: called after each pass of the trials through a layer.
    """
    rounds = [{int(layer): fact for layer, fact in each} for each in work.progress["search"]]
    trials = _Trials(method, search, lambda: Decoder(source, model, windows), work, memory, told)
    while True:
        chosen = {layer: fact for each in rounds for layer, fact in each.items()}
        look = partial(trials.look, search.plan(chosen))
        if not (candidates := first_decides(search.candidates(chosen, look))):
            return [chosen.get(index) for index in range(len(model.layers))]
        lost = trials.lost(chosen, candidates, len(rounds) + 1)
        best = min(range(len(lost)), key=lambda number: (lost[number], -number))
        rounds.append({layer: fact | {"kl": lost[best]} for layer, fact in candidates[best].items()})
        _commit(work, [[*each.items()] for each in rounds])


def _commit(work: WorkFolder, rounds: list[Any]) -> None:
    wait_for_all()
    if rank() == 0:
        work.commit(search=rounds)
    else:
        work.progress["search"] = rounds
    wait_for_all()


class _Trials:
    """Runs trials over this process's windows."""

    def __init__(
        self,
        method: SweptMethod,
        search: Search,
        decoder: Callable[[], Decoder],
        work: WorkFolder,
        memory: int,
        told: Told | None,
    ) -> None:
        self.method, self.search, self.told = method, search, told
        self.memory, self.folder, self._make = memory, work.path, decoder

    @cached_property
    def decoder(self) -> Decoder:
        """The model, once something is to be run."""
        return self._make()

    @cached_property
    def original(self) -> Activations:
        """The original's final hidden states."""
        stock = Plan(after=self.decoder.model, choices=(None,) * len(self.decoder.modules))
        return self._final([stock], 0)[0]

    def lost(self, chosen: Chosen, candidates: list[Chosen], number: int) -> list[float]:
        """The KL of the model with each of ``candidates`` beside ``chosen``, over all processes."""
        original = self.original
        plans = [self.search.plan(chosen), *(self.search.plan(chosen | each) for each in candidates)]
        return [self._kl(original, stream) for stream in self._final(plans, number)[1:]]

    def look(self, plan: Plan, survey: Survey) -> Facts:
        """What ``survey`` says of each layer of the model as planned; None of those that it does not have."""
        decoder, facts = self.decoder, Facts()
        stream = self._room(Budget(self.memory, self.folder))
        decoder.embed(stream)
        for index, module in enumerate(decoder.modules):
            if plan.place(index) is None:
                facts.append(None)
                continue
            with decoder.source.layer(module), self._planned(index, plan, stream) as layer:
                observer = survey.observer(layer)
                for batch in run_layer(module, None, stream, layer.arguments, layer.batch):
                    observer.add(batch)
                    stream[batch.windows] = batch.output
                facts.append(survey.layer(layer, observer))
            give_back_memory()
        return facts

    def _final(self, plans: list[Plan], number: int) -> list[Activations]:
        """The final hidden states of every plan's model; the first plan is the one that the others begin with."""
        budget, decoder = Budget(self.memory, self.folder), self.decoder
        first = self._room(budget)
        decoder.embed(first)
        streams: list[Activations] = [first, *(first for _ in plans[1:])]  # a trial's own from where it differs
        for index, module in enumerate(decoder.modules):
            with decoder.source.layer(module):
                for trial, plan in enumerate(plans):
                    if streams[trial] is first and _differ(plan, plans[0], index):
                        streams[trial] = self._copied(first, budget)
                for stream, plan in zip(streams, plans, strict=True):
                    if (stream is not first or plan is plans[0]) and plan.place(index) is not None:
                        with self._planned(index, plan, stream) as layer:
                            pass_through(layer.module, stream, layer.arguments, layer.batch)
            give_back_memory()
            if self.told is not None:
                total = len(decoder.modules)
                self.told(number * total + index + 1, (self.search.count + 1) * total, PASS)
        return streams

    @contextmanager
    def _planned(self, index: int, plan: Plan, stream: Activations) -> Iterator[Layer]:
        """Within the block, a layer is as a plan changes it."""
        layer = self.decoder.layer(index, plan, original=stream, converted=stream)
        if layer.choice is None:
            yield layer
            return
        path, attention, weights = layer.attention_path, layer.attention, layer.module.state_dict()
        self.method.apply(layer, None)
        try:
            yield layer
        finally:
            layer.module.set_submodule(path, attention)
            layer.module.load_state_dict(weights, assign=True)

    def _room(self, budget: Budget) -> Activations:
        return Activations(self.decoder.shape, self.decoder.dtype, self.decoder.source.device, budget)

    def _copied(self, stream: Activations, budget: Budget) -> Activations:
        made = self._room(budget)
        for window in range(len(stream)):
            made[window : window + 1] = stream[window : window + 1]
        made.maps = dict(stream.maps)
        return made

    def _kl(self, original: Activations, stream: Activations) -> float:
        source, decoder = self.decoder.source, self.decoder
        pair = (original.split(1), stream.split(1))
        return kl_of_streams(source, decoder.windows, *pair, tuples=decoder.tuples)


def _differ(plan: Plan, other: Plan, index: int) -> bool:
    """Whether two plans make different things of a layer."""
    return (plan.layer(index), plan.choices[index]) != (other.layer(index), other.choices[index])
