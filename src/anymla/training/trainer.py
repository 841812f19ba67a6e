"""transformers' Trainer with a teacher: the losses of both stages, and scores on held-out text."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Trainer

from anymla.evaluation.logits import Logits, at_head, logits_of_pass
from anymla.evaluation.scores import ScoreSums
from anymla.methods.tune import Tune
from anymla.model_run.stream import decoder_layers
from anymla.modeling.attention import ConvertedAttention
from anymla.training.best import Best
from anymla.training.losses import layer_loss, shares, sum_of_parts, token_kl, token_loss
from anymla.training.pairs import AttentionPairs
from anymla.training.redraw import redrawn


class TuneTrainer(Trainer):  # type: ignore[misc]
    """Trains towards ``teacher``; ``pairs`` of attention layers are set in the layer-wise stage only.

    ``windows`` [N,T]: held-out text, which every process scores whole; ``best``: what keeps the best weights.
    """

    def __init__(
        self,
        *,
        teacher: Any,
        tuning: Tune,
        windows: Tensor,
        pairs: AttentionPairs | None,
        best: Best | None,
        **options: Any,
    ) -> None:
        super().__init__(eval_dataset=[{} for _ in windows], **options)
        self.tuning, self.windows, self.pairs, self.best = tuning, windows, pairs, best
        self.model_accepts_loss_kwargs = False  # the losses are means: over parts of a batch they are averaged
        if self.is_fsdp_enabled and not isinstance(teacher, FSDPModule):  # an earlier stage has done it
            for part in (*decoder_layers(teacher), teacher):
                fully_shard(part)
        self.teacher = teacher

    def create_accelerator_and_postprocess(self) -> None:
        """As always, but each attention is sharded on its own, for in the layer-wise stage it learns on its own.

        On CPUs, too, where accelerate of itself shards nothing.
        """
        if self.args.fsdp:
            model = self._plain_model()
            attentions = [module for module in model.modules() if isinstance(module, ConvertedAttention)]
            names = {type(part).__name__ for part in (*decoder_layers(model), *attentions)}
            self.args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(sorted(names))
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As always; in the layer-wise stage with both models hooked, also on the way back, which may compute twice."""
        with nullcontext() if self.pairs is None else self.pairs.hooked():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The stage's loss on a batch of rows."""
        weight = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).float()
        if self.pairs is not None:
            self._teach(inputs)
            model(**inputs, use_cache=False)
            return layer_loss(self.pairs.outputs, self.pairs.targets, weight)
        if self.tuning.redraw:
            inputs = inputs | {"input_ids": self._redrawn(inputs)}
        reference = self._teach(inputs) if self.tuning.cross_entropy < 1 else None
        loss: Tensor = at_head(
            model, self._plain_model(), inputs, lambda logits: self._text_loss(logits, reference, inputs, weight)
        )
        return loss

    def _text_loss(self, logits: Logits, reference: Logits | None, inputs: dict[str, Tensor], weight: Tensor) -> Tensor:
        """KL to the ``reference`` and cross-entropy on the text, in the recipe's shares."""
        ids, share = inputs["input_ids"], self.tuning.cross_entropy
        begins, following = inputs.get("position_ids"), ids.roll(-1, 1)
        predicted = weight if begins is None else (begins > 0).float()  # nothing tells how a document begins
        predicted = shares(torch.cat([predicted[:, 1:], torch.zeros_like(predicted[:, :1])], dim=1))
        counted = shares(weight)

        def loss(logits: Logits, part: slice) -> Tensor:
            given, total = logits.at(part), torch.zeros((), device=ids.device)
            if share > 0:
                total = total + share * (token_loss(given, following[:, part]) * predicted[:, part]).sum()
            if reference is not None:
                kl = token_kl(given, reference.at(part), self.tuning.temperature, self.tuning.top_k)
                total = total + (1 - share) * (kl * counted[:, part]).sum()
            return total

        return sum_of_parts(loss, logits, self.model.parameters())

    @torch.no_grad()
    def _redrawn(self, inputs: dict[str, Tensor]) -> Tensor:
        """The rows [B,T] of ``inputs`` with tokens that the teacher draws anew."""
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        begins = torch.zeros_like(ids, dtype=torch.bool) if positions is None else positions == 0
        seed = self.tuning.seed + self.state.global_step
        return redrawn(self._teach(inputs), ids, begins, float(self.tuning.redraw or 0), seed)

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Tensor]) -> Logits:
        return logits_of_pass(self.teacher, inputs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Perplexity and KL to the teacher on the held-out windows, as `anymla eval` has them."""
        model, sums, original = self.model_wrapped, ScoreSums(), ScoreSums()
        learning = model.training
        model.eval()
        for window in self.windows:
            ids = window[None].to(self.args.device)
            reference = self._teach({"input_ids": ids})
            at_head(model, self._plain_model(), {"input_ids": ids}, partial(sums.add, ids=ids, reference=reference))
            original.add(reference, ids, None)
        model.train(learning)
        perplexity, kl = sums.quality()
        metrics = {"eval_perplexity": perplexity, "eval_kl": kl or 0.0}
        self.log(metrics | {"original_perplexity": original.quality()[0]})
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.best is not None:
            self.best.take(metrics[self.tuning.scored_by], self.learned)
            self.control.should_training_stop |= self.best.ends
        return metrics

    def learned(self) -> dict[str, Tensor]:
        """The weights that learn, as they are; empty in all processes but the first where they are sharded."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.model_wrapped, options=whole)
        names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: weights[name] for name in names & weights.keys()}

    def _plain_model(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
