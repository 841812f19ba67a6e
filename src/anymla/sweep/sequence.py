"""Converts a model layer by layer: each one fitted to give the original's output from the converted layers below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from anymla.account import LayerAccount, measured_layer, told_lengths
from anymla.architectures.families import FAMILIES
from anymla.distributed import from_first, rank, wait_for_all, world
from anymla.errors import TextError
from anymla.io.device import give_back_memory
from anymla.io.streamed import StreamedModel
from anymla.io.work import WorkFolder
from anymla.methods.mla.costs import reconstruction_steps
from anymla.methods.mla.layer_step import LayerResult, LayerStep, Split
from anymla.methods.mla.plan import TYPICAL_ROPE_SHARE, MLAPlan
from anymla.methods.mla.split import best_split, open_splits
from anymla.model_run.activations import Activations, Budget
from anymla.model_run.stream import check_runs, decoder_layers, layer_inputs, layers_give_tuples, pass_through
from anymla.modeling.spec import ModelSpec
from anymla.sweep.progress import check_room
from anymla.sweep.shards import pack, write_layer, write_outside

PROBE_TOKENS = 8
Progress = Callable[[int, int, LayerResult], None]  # (layers done, layers, the last one's result)


@dataclass(frozen=True)
class LayerRecord:
    """A layer that is done: its result, its cache before and after.

    ``spec``: what the new config says of it, ready for JSON. All are None for a layer that has no softmax attention and
    stays as it is.
    """

    result: LayerResult | None = None
    spec: dict[str, Any] | None = None
    before: LayerAccount | None = None
    after: LayerAccount | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> LayerRecord:
        """The record that ``asdict`` took apart."""
        if fields["result"] is None:
            return cls()
        caches = (LayerAccount(**fields[name]) for name in ("before", "after"))
        return cls(LayerResult(**fields["result"]), fields["spec"], *caches)


class Streams:
    """The two streams of hidden states that move on layer by layer: the original's, and that of converted layers.

    What they were behind each layer is saved before that layer counts as done, and goes once the next one does.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, budget: Budget) -> None:
        self.original = Activations(shape, dtype, device, budget, f"original-{rank()}")
        self.converted = Activations(shape, dtype, device, budget, f"converted-{rank()}")
        self.folder = budget.folder

    def save(self, layers: int) -> None:
        """Keeps both as they are behind ``layers`` layers."""
        for stream in (self.original, self.converted):
            stream.save(self.folder / f"{stream.name}-behind-{layers}")

    def restore(self, layers: int) -> None:
        """Takes both up behind ``layers`` layers."""
        for stream in (self.original, self.converted):
            stream.restore(self.folder / f"{stream.name}-behind-{layers}")

    def drop_others(self, layers: int) -> None:
        """Removes all that is saved but what lies behind ``layers`` layers."""
        for stream in (self.original, self.converted):
            for path in self.folder.glob(f"{stream.name}-behind-*"):
                if path.name != f"{stream.name}-behind-{layers}":
                    path.unlink()


@dataclass(frozen=True)
class Converted:
    """All layers' records; this process's windows [N,T], their final hidden states, and which are held out."""

    records: list[LayerRecord]
    windows: Tensor
    streams: Streams
    held_out: slice


def own_windows(windows: Tensor, split: Split) -> tuple[Tensor, Split]:
    """This process's part of each kind of window; all processes' parts together are ``windows``.

    Raises:
        TextError: there are more processes than windows to choose on.
    """
    kinds = (split.fit, split.choice, split.held_out)
    parts = [windows[kind][rank() :: world()] for kind in kinds]
    if min(len(windows[kind]) for kind in kinds[:2]) < world():
        raise TextError(
            f"{world()} processes need {4 * world()} calibration windows and there are {len(windows)}: give more "
            "--calibration-tokens or a shorter --calibration-length"
        )
    first, second = len(parts[0]), len(parts[0]) + len(parts[1])
    return torch.cat(parts), Split(slice(0, first), slice(first, second), slice(second, second + len(parts[2])))


class Sequence:
    """One conversion, from its first layer or from where ``work`` says that it was stopped."""

    def __init__(
        self,
        source: StreamedModel,
        model_spec: ModelSpec,
        plan: MLAPlan,
        windows: Tensor,
        work: WorkFolder,
    ) -> None:
        self.source, self.specs, self.work = source, model_spec.layers, work
        steps = reconstruction_steps(model_spec, plan.recipe)
        self.model_spec, self.plans = model_spec, plan.layers
        self.recipe = plan.recipe.model_copy(update={"reconstruction_steps": steps})
        self.family = FAMILIES[model_spec.text_model_type]
        self.layers = decoder_layers(source.model)
        self.windows, self.split = own_windows(windows, Split.of(len(windows)))
        self.records = [LayerRecord.of(fields) for fields in work.progress["layers"]]
        with source.on_demand(self.layers, embeddings=True):
            ids = self.windows[:1].to(source.device)
            self.tuples = tuples = layers_give_tuples(source.model, ids[:, :PROBE_TOKENS])
            inputs = layer_inputs(source.model, ids, tuples=tuples)
            self.arguments, self.hidden = inputs.arguments, inputs.hidden
            self.probes = [
                layer_inputs(source.model, ids[:, :PROBE_TOKENS], tuples=tuples, use_cache=True) for _ in range(2)
            ]
            check_runs(source.model, self.probes[0].hidden, tuples=tuples)

    @torch.no_grad()
    def run(self, memory: int, max_shard_size: int, progress: Progress | None) -> Converted:
        """Converts the layers that are not yet done; activations beyond ``memory`` bytes go to files."""
        streams = self._begin(Budget(memory, self.work.path))
        self._agree(streams)
        if self.records and progress is not None and (last := self.records[-1].result) is not None:
            progress(len(self.records), len(self.layers), last)
        for index in range(len(self.records), len(self.layers)):
            with self.source.layer(self.layers[index]):
                record = self._convert(index, streams)
                if rank() == 0:
                    write_layer(self.source, self.work, self.layers[index], index)
            streams.save(index + 1)
            self._commit(record, max_shard_size)
            streams.drop_others(index + 1)
            give_back_memory()
            if progress is not None and record.result is not None:
                progress(index + 1, len(self.layers), record.result)
        return Converted(self.records, self.windows, streams, self.split.held_out)

    def _begin(self, budget: Budget) -> Streams:
        done, shape = len(self.records), (len(self.windows), *self.hidden.shape[1:])
        check_room(self.work, self.source, 4 * self.hidden.nbytes * shape[0])  # two streams, two generations each
        streams = Streams(shape, self.hidden.dtype, self.source.device, budget)
        if done:
            streams.restore(done)
            streams.drop_others(done)
            return streams
        with self.source.on_demand(self.layers, embeddings=True):
            for number, window in enumerate(self.windows):
                ids = window[None].to(self.source.device)
                hidden = layer_inputs(self.source.model, ids, tuples=self.tuples).hidden
                streams.original[number : number + 1] = streams.converted[number : number + 1] = hidden
        streams.save(0)
        streams.restore(0)
        if rank() == 0:
            write_outside(self.source, self.work, self.layers, behind=False)
        return streams

    def _agree(self, streams: Streams) -> None:
        """Gives all layers one split, where the target needs it."""
        plan = next(plan for plan in self.plans if plan is not None)
        if not (splits := open_splits(plan, self.recipe, self.model_spec)):
            return
        if (chosen := self.work.progress.get("split")) is None:
            chosen = best_split(self, streams, splits)
            if rank() == 0:
                self.work.commit(split=chosen)
        dims, step = chosen
        agreed = {"rope_dims": dims, "kv_rank": plan.cached_numbers - dims, "rope_choices": (), "rope_step": step}
        self.plans = tuple(layer and layer.model_copy(update=agreed) for layer in self.plans)

    def step(self, index: int) -> LayerStep:
        """The conversion of one layer, whose weights are there."""
        plan, spec = self.plans[index], self.specs[index].attention
        if plan is None or spec is None:
            raise ValueError(f"layer {index} has no softmax attention")
        config = self.source.model.config.get_text_config()
        layer, arguments = self.layers[index], self.arguments[index]
        saved = self.source.saved_in(layer)
        return LayerStep(layer, spec, self.family, config, plan, self.recipe, arguments, self.split, saved)

    def _convert(self, index: int, streams: Streams) -> LayerRecord:
        layer, arguments = self.layers[index], self.arguments[index]
        if self.plans[index] is None:
            for stream in (streams.original, streams.converted):
                pass_through(layer, stream, arguments, 1)
            return LayerRecord()
        before = self._cached(index, 0)
        step = self.step(index)
        step.measure(index, streams.original, streams.converted)
        attention, result = step.choose(index, self._near(index))
        for tensor in attention.state_dict().values():
            from_first(tensor)  # the algebra of another machine may differ in the last bit
        step.install(attention)
        pass_through(layer, streams.converted, arguments, step.batch)
        step.close()
        spec = replace(attention.layer_spec, module=f"{self.source.name_of(layer)}.{step.path}")
        return LayerRecord(result, spec.to_dict(), before, self._cached(index, 1))

    def _near(self, index: int) -> float:
        """The rope share of the last converted layer, near which this one's choice lies."""
        for plan, record in zip(self.plans[:index][::-1], self.records[:index][::-1], strict=True):
            if plan is not None and record.result is not None:
                return record.result.rope_dims / plan.cached_numbers
        return TYPICAL_ROPE_SHARE

    def _cached(self, index: int, probe: int) -> LayerAccount:
        """The live cache after a few tokens ran through the layer as it now is."""
        arguments = self.probes[probe].arguments[index]
        self.layers[index](self.probes[probe].hidden, **arguments)
        cache = next(value for value in arguments.values() if isinstance(value, Cache))
        return measured_layer(cache.layers[index], told_lengths(self.model_spec), self.source.width)

    def _commit(self, record: LayerRecord, max_shard_size: int) -> None:
        """Counts a layer as done, once every process has saved what lies behind it."""
        self.records.append(record)
        wait_for_all()
        if rank() == 0:
            self.work.commit(layers=[asdict(record) for record in self.records])
            pack(self.work, len(self.records) + 1, max_shard_size)
        wait_for_all()
