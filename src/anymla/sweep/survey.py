"""Gathers on calibration text what a method asks of the original's layers; goes on where it was stopped.

Forwards, the stream of hidden states moves on layer by layer, as in a conversion. Backwards, it first moves through all
layers, and its state before each goes to a file. Then each layer is run again, from the last to the first, and the
gradient of the final loss moves the other way. Only one layer's weights and activations are in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from anymla.distributed import first_decides, rank, wait_for_all
from anymla.io.checkpoint import check_space
from anymla.io.device import give_back_memory
from anymla.io.safetensors import read_header, write_tensors
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.methods.base import Facts, Plan, Survey
from anymla.model_run.activations import Activations, Budget
from anymla.model_run.backward import layer_gradients, loss_gradient
from anymla.model_run.stream import LayerBatch, pass_through, run_layer
from anymla.modeling.spec import ModelSpec
from anymla.sweep.decoder import Decoder
from anymla.sweep.layer import Layer
from anymla.sweep.streams import SavedStreams

HIDDEN, GRADIENT = "surveyed", "gradient"  # names of the streams' files
PASS, BACKWARD_PASS = "calibration, pass", "calibration, backward pass"
Told = Callable[[int, int, str], None]  # (passes through a layer done, all of that kind, which kind)


@torch.no_grad()
def run_survey(
    survey: Survey,
    source: StreamedModel,
    model: ModelSpec,
    plan: Plan,
    windows: Tensor,
    work: WorkFolder,
    *,
    memory: int,
    told: Told | None = None,
) -> Facts:
    """What ``survey`` says of each layer that it looks at and that ``plan`` changes; None for the others.

    Args:
        survey: what is asked. Backwards, it sees all windows but those held out, one at a time, in float32 or finer.
        source: the original.
        model: its spec.
        plan: the one that awaits these facts.
        windows: those of all processes [N,T].
        work: an open work folder; what is done is kept in it.
        memory: bytes of activations that may be in memory at once; those beyond go to files in ``work``.
        told: called after each pass through a layer.

    Raises:
        OSError: not enough room on the disk.
        TextError: there are more processes than windows to choose on.
    """
    kept = KeptFacts(work)
    wanted = {index for index in survey.layers(len(model.layers)) if plan.choices[index] is not None}
    if not wanted:
        return []
    if survey.backward:
        if kept.gradient_after != min(wanted):
            decoder = Decoder(in_float32(source), model, windows)
            BackwardSurvey(survey, decoder, plan, kept, wanted, memory, told).run()
    elif kept.passed <= max(wanted):
        ForwardSurvey(survey, Decoder(source, model, windows), plan, kept, wanted, memory, told).run()
    for name in (HIDDEN, GRADIENT):
        for path in work.path.glob(f"{name}-{rank()}-after-*"):
            path.unlink()
    return kept.read()


def in_float32(source: StreamedModel) -> StreamedModel:
    """The same model, computed in float32 where it is in less: in 16 bits small gradients are lost."""
    if source.model.dtype.itemsize >= torch.float32.itemsize:
        return source
    finer = StreamedModel(source.folder, dtype=source.stored_dtype, device=source.device)
    finer.compute_in("float32")
    return finer


class KeptFacts:
    """What a work folder holds of a survey: in progress.json, and the tensors of each layer in a file beside it.

    "survey" has an entry for each layer that was passed forwards: its facts, None as long as there are none.
    "gradient_after" is how many layers are below the gradient that was saved last.
    """

    def __init__(self, work: WorkFolder) -> None:
        self.work = work

    @property
    def passed(self) -> int:
        """How many layers were passed forwards."""
        return len(self.work.progress["survey"])

    @property
    def gradient_after(self) -> int | None:
        """How many layers are below the gradient; None before there is one."""
        after: int | None = self.work.progress.get("gradient_after")
        return after

    def add(self, index: int, facts: dict[str, Any] | None, **done: Any) -> None:
        """Counts a layer as done with ``facts``, and what else is ``done``, once every process has saved its streams.

        ``facts``: the first process's are kept.
        """
        survey = list(self.work.progress["survey"])
        survey[index : index + 1] = [None if facts is None else self._written(index, facts)]
        self.commit(survey=survey, **done)

    def commit(self, **done: Any) -> None:
        """Counts ``done`` as done, once every process has saved its streams."""
        wait_for_all()
        if rank() == 0:
            self.work.commit(**done)
        else:
            self.work.progress |= done
        wait_for_all()

    def read(self) -> Facts:
        """The facts of all layers; their tensors stay in files until they are read."""
        return [
            None if facts is None else facts | (read_header(path) if (path := self._file(index)).exists() else {})
            for index, facts in enumerate(self.work.progress["survey"])
        ]

    def _written(self, index: int, facts: dict[str, Any]) -> Any:
        """What of ``facts`` is not in a file, as JSON gives it back."""
        tensors = {name: value for name, value in facts.items() if isinstance(value, Tensor)}
        if tensors and rank() == 0:
            write_tensors(self._file(index), tensors)
        plain = {name: value for name, value in facts.items() if name not in tensors}
        return first_decides(json.loads(json.dumps(plain)))

    def _file(self, index: int) -> Any:
        return self.work.path / f"facts-{index}.safetensors"


class SurveyRun:
    """One survey, from its first layer or from where it was stopped."""

    def __init__(
        self,
        survey: Survey,
        decoder: Decoder,
        plan: Plan,
        kept: KeptFacts,
        wanted: set[int],
        memory: int,
        told: Told | None,
    ) -> None:
        self.survey, self.decoder, self.plan, self.told = survey, decoder, plan, told
        self.kept, self.wanted, self.folder = kept, wanted, kept.work.path
        self.budget = Budget(memory, self.folder)

    def room(self, name: str, windows: int) -> Activations:
        """Room for a stream of as many windows."""
        shape = (windows, *self.decoder.shape[1:])
        return Activations(shape, self.decoder.dtype, self.decoder.source.device, self.budget, f"{name}-{rank()}")

    def tell(self, done: int, total: int, what: str = PASS) -> None:
        """Reports a pass through a layer."""
        if self.told is not None:
            self.told(done, total, what)

    def begin(self, saved: SavedStreams, hidden: Activations, generations: int) -> None:
        """Fills ``hidden`` with embeddings, where the disk has room for that many of it, or takes it up."""
        if not self.kept.passed:
            check_space(self.folder, generations * hidden.window * len(hidden))
            self.decoder.embed(hidden)
            saved.save(0)
        saved.restore(self.kept.passed)

    def ask(self, layer: Layer, batches: Iterable[LayerBatch], moved: Activations | None) -> dict[str, Any]:
        """The facts of a layer; what ``batches`` give goes into ``moved``."""
        observer = self.survey.observer(layer)
        for batch in batches:
            observer.add(batch)
            if moved is not None:
                moved[batch.windows] = batch.output
        return self.survey.layer(layer, observer)


class ForwardSurvey(SurveyRun):
    """Moves one stream of hidden states through the layers, up to the last that is looked at."""

    def run(self) -> None:
        """Looks at the layers that are not yet done."""
        hidden, before = (self.room(name, self.decoder.shape[0]) for name in (HIDDEN, "unmoved"))
        saved = SavedStreams(self.folder, hidden)
        self.begin(saved, hidden, 2)
        for index in range(self.kept.passed, max(self.wanted) + 1):
            saved.keep_only(index)
            before.restore(saved.path(hidden, index))
            with self.decoder.source.layer(self.decoder.modules[index]):
                facts = self._passed(self.decoder.layer(index, self.plan, original=hidden, converted=before))
            saved.save(index + 1)
            self.kept.add(index, facts)
            self.tell(index + 1, max(self.wanted) + 1)
            give_back_memory()

    def _passed(self, layer: Layer) -> dict[str, Any] | None:
        if layer.index not in self.wanted:
            pass_through(layer.module, layer.original, layer.arguments, layer.batch)
            return None
        attention = None if layer.old.attention is None else layer.attention
        batches = run_layer(layer.module, attention, layer.original, layer.arguments, layer.batch)
        return self.ask(layer, batches, layer.original)


class BackwardSurvey(SurveyRun):
    """Moves hidden states through all layers, and the gradient of the loss back down to the first one looked at."""

    def run(self) -> None:
        """Goes on until every layer is looked at."""
        windows = self.decoder.split.choice.stop
        self.hidden, self.gradient = (self.room(name, windows) for name in (HIDDEN, GRADIENT))
        self.states, self.gradients = (SavedStreams(self.folder, each) for each in (self.hidden, self.gradient))
        self.total, self.lowest = len(self.decoder.modules), min(self.wanted)
        if self.kept.gradient_after is None:
            self._go_up()
            self._turn()
        self._go_down()

    def _go_up(self) -> None:
        self.begin(self.states, self.hidden, self.total - self.lowest + 3)
        for index in range(self.kept.passed, self.total):
            self.states.keep_only(*range(self.lowest, index), index)
            with self.decoder.source.layer(self.decoder.modules[index]):
                layer = self.decoder.layer(index, self.plan, original=self.hidden, converted=self.hidden)
                pass_through(layer.module, self.hidden, layer.arguments, layer.batch)
            self.states.save(index + 1)
            self.kept.add(index, None)
            self.tell(index + 1, self.total)
            give_back_memory()

    def _turn(self) -> None:
        """Fills the gradient with respect to the final hidden states."""
        source, tuples = self.decoder.source, self.decoder.tuples
        with source.on_demand(self.decoder.modules):
            for number, window in enumerate(self.decoder.windows[: len(self.gradient)]):
                place, ids = slice(number, number + 1), window[None].to(source.device)
                _, self.gradient[place] = loss_gradient(source.model, self.hidden[place], ids, tuples=tuples)
        self.gradients.save(self.total)
        self.kept.commit(gradient_after=self.total)

    def _go_down(self) -> None:
        after = self.kept.gradient_after or self.total
        self.gradients.restore(after)
        for index in range(after - 1, self.lowest - 1, -1):
            self.states.keep_only(*range(self.lowest, index + 1))
            self.gradients.keep_only(index + 1)
            self.states.restore(index)
            with self.decoder.source.layer(self.decoder.modules[index]):
                facts = self._passed(index)
            self.gradients.save(index)
            self.kept.add(index, facts, gradient_after=index)
            self.tell(self.total - index, self.total - self.lowest, BACKWARD_PASS)  # takes longer: a count of its own
            give_back_memory()

    def _passed(self, index: int) -> dict[str, Any] | None:
        layer, asked = (
            self.decoder.layer(index, self.plan, original=self.hidden, converted=self.hidden),
            index in self.wanted,
        )
        batches = layer_gradients(layer.module, self.hidden, self.gradient, layer.arguments, weights=asked)
        if asked:
            return self.ask(layer, batches, None)
        for _ in batches:
            pass
        return None
