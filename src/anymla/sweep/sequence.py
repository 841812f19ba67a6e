"""Runs a method over a model, layer by layer; each layer sees what the converted layers below it have made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from anymla.account import LayerAccount, measured_layer, told_lengths
from anymla.distributed import from_first, rank, wait_for_all
from anymla.io.device import give_back_memory
from anymla.io.packed import PackedFiles
from anymla.io.streamed import StreamedModel
from anymla.io.telling import tell
from anymla.io.work import WorkFolder
from anymla.methods.base import Plan, SweptMethod
from anymla.model_run.activations import Budget
from anymla.model_run.maps import OwnTokens, sharing_part
from anymla.model_run.stream import (
    layer_inputs,
    pass_through,
    run_layer,
)
from anymla.modeling.packing import Packing
from anymla.modeling.shared_attention import MAPS
from anymla.modeling.spec import LayerSpec, ModelSpec
from anymla.sweep.decoder import PROBE_TOKENS, Decoder
from anymla.sweep.layer import Layer, Observer
from anymla.sweep.progress import check_room
from anymla.sweep.shards import pack, write_layer, write_outside
from anymla.sweep.streams import Streams

Progress = Callable[[int, int, dict[str, Any]], None]  # (layers done, layers, the last one's result)


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """A layer that is done: what it is now, the method's result, and its cache before and after.

    ``result``: None for a layer that stays as it is; ``before`` and ``after``: of one without softmax attention.
    ``removed``: whether the new model does not have it.
    """

    spec: LayerSpec
    result: dict[str, Any] | None = None
    before: LayerAccount | None = None
    after: LayerAccount | None = None
    removed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        integers = None if self.spec.integers is None else asdict(self.spec.integers)
        return asdict(self) | {"spec": self.spec.to_dict(), "integers": integers}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> LayerRecord:
        """The record that ``to_dict`` took apart."""
        integers, result = fields["integers"], fields["result"]
        spec = replace(LayerSpec.of(fields["spec"]), integers=None if integers is None else Packing(**integers))
        before, after = (None if fields[name] is None else LayerAccount(**fields[name]) for name in ("before", "after"))
        return cls(spec=spec, result=result, before=before, after=after, removed=fields["removed"])


class Sequence:
    """One sweep, from its first layer or from where ``work`` says that it was stopped.

    ``memory``: bytes of activations that may be in memory at once; those beyond go to files.
    """

    def __init__(
        self, source: StreamedModel, model: ModelSpec, windows: Tensor, work: WorkFolder, *, memory: int
    ) -> None:
        self.source, self.model, self.work = source, model, work
        self.decoder = decoder = Decoder(source, model, windows)
        self.modules = decoder.modules
        self.records = [LayerRecord.of(fields) for fields in work.progress["layers"]]
        with source.on_demand(self.modules, embeddings=True):
            ids = decoder.windows[:1, :PROBE_TOKENS].to(source.device)
            self.probes = [layer_inputs(source.model, ids, tuples=decoder.tuples, use_cache=True) for _ in range(2)]
        size = math.prod(decoder.shape) * decoder.dtype.itemsize
        check_room(work, source, 4 * size)  # two streams, two generations each
        self.streams = Streams(decoder.shape, decoder.dtype, source.device, Budget(memory, work.path))
        self._begin()

    def _begin(self) -> None:
        """Fills both streams: with embedded windows, or with what was saved."""
        if self.records:
            self.streams.restore(len(self.records))
            return
        self.decoder.embed(self.streams.original, self.streams.converted)
        self.streams.save(0)
        self.streams.restore(0)
        if rank() == 0:
            write_outside(self.source, self.work, self.modules, after=False)

    @torch.no_grad()
    def convert(
        self,
        method: SweptMethod,
        plan: Plan,
        *,
        shard_size: int,
        progress: Progress | None,
        packed: PackedFiles | None = None,
    ) -> None:
        """Changes the layers that are not yet done; weights that stay what ``packed`` holds are written packed."""
        if self.records and progress is not None and (result := self.records[-1].result) is not None:
            progress(len(self.records), len(self.modules), result)
        for index in range(len(self.records), len(self.modules)):
            self._tell(index, "reading")
            with self.source.layer(self.modules[index]):
                place, layer = plan.place(index), self._layer(index, plan)
                record = self._removed(layer) if place is None else self._changed(method, layer)
                if rank() == 0 and place is not None:
                    write_layer(self.source, self.work, self.modules[index], index, place, packed)
            self.streams.save(index + 1)
            self.records.append(record)
            self._commit(layers=[each.to_dict() for each in self.records])
            if rank() == 0:
                pack(self.work, index + 2, shard_size)
            wait_for_all()
            self.streams.keep_only(index + 1)
            give_back_memory()
            if progress is not None and record.result is not None:
                progress(index + 1, len(self.modules), record.result)

    def _tell(self, index: int, what: str) -> None:
        """Says what is done with a layer."""
        tell(f"layer {index + 1} of {len(self.modules)}: {what}")

    def _layer(self, index: int, plan: Plan) -> Layer:
        """One layer, whose weights are there."""
        below = tuple(record.result for record in self.records)
        streams = self.streams
        return self.decoder.layer(index, plan, original=streams.original, converted=streams.converted, below=below)

    def _removed(self, layer: Layer) -> LayerRecord:
        """Moves the original's stream on."""
        pass_through(layer.module, layer.original, layer.arguments, layer.batch)
        return LayerRecord(spec=layer.old, removed=True)

    def _changed(self, method: SweptMethod, layer: Layer) -> LayerRecord:
        """Lets the method change a layer, and moves both streams on."""
        before = self._cached(layer.index, 0)
        if layer.choice is None:
            for stream in (layer.original, layer.converted):
                pass_through(layer.module, stream, layer.arguments, 1)
            return LayerRecord(spec=layer.old, before=before, after=self._cached(layer.index, 1))
        observer = method.observer(layer)
        self._tell(layer.index, "moments of the calibration text")
        self._observe(layer, observer)
        self._tell(layer.index, "new weights")
        changed = method.apply(layer, observer)
        for tensor in layer.module.state_dict().values():
            from_first(tensor)  # the algebra of another machine may differ in the last bit
        pass_through(layer.module, layer.converted, layer.arguments, layer.batch)
        after = self._cached(layer.index, 1)
        kept = {name: getattr(layer.old, name) or getattr(changed.spec, name) for name in ("integers", "width")}
        spec = replace(changed.spec, **kept)
        return LayerRecord(spec=spec, result=changed.result, before=before, after=after)

    def _observe(self, layer: Layer, observer: Observer) -> None:
        """Moves the original's stream through the original layer, and lets ``observer`` see every batch."""
        attention = None if layer.old.attention is None else layer.attention
        for batch in run_layer(layer.module, attention, layer.original, layer.arguments, layer.batch):
            observer.add(batch)
            layer.original[batch.windows] = batch.output

    def _cached(self, index: int, probe: int) -> LayerAccount | None:
        """The live cache after a few tokens ran through the layer as it now is; None where it has none."""
        if self.model.layers[index].attention is None:
            return None
        arguments, hidden = self.probes[probe].arguments[index], self.probes[probe].hidden
        if (part := sharing_part(self.modules[index])) is not None:
            arguments = arguments | {MAPS: OwnTokens(part, hidden.shape[1], hidden)}
        self.modules[index](hidden, **arguments)
        cache = next(value for value in arguments.values() if isinstance(value, Cache))
        return measured_layer(cache.layers[index], told_lengths(self.model), self.source.width)

    def _commit(self, **done: Any) -> None:
        """Counts ``done`` as done, once every process has saved what follows from it."""
        wait_for_all()
        if rank() == 0:
            self.work.commit(**done)
        wait_for_all()
