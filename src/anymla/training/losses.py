"""The targets of tuning: the original's attention outputs, its logits, or the text itself.

Every loss is a mean over rows of means over a row's tokens. So it does not depend on how rows are divided among
processes and parts of a batch. Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anymla.evaluation.logits import Logits


def layer_loss(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Mean over layers of the squared error of ``outputs`` [B,T,D], relative to the power of ``targets``.

    ``weight`` [B,T]: 1 where a token counts, 0 at padding.
    """
    errors = []
    for name, target in targets.items():
        target = target.float()
        difference = _row_means((outputs[name].float() - target).square().mean(-1), weight)
        power = _row_means(target.square().mean(-1), weight)
        errors.append((difference / power.clamp_min(torch.finfo(power.dtype).tiny)).mean())
    return torch.stack(errors).mean()


def token_kl(logits: Tensor, reference: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """KL divergence [B,T] of ``logits`` [B,T,V] from the ``reference``'s, times temperature squared, in nats.

    The square keeps gradients of one size whatever the temperature (Hinton et al., arXiv 1503.02531). With ``top_k``,
    the reference's k most likely tokens count one by one and all others as one: a lower bound of the whole.
    """
    if temperature != 1:
        logits, reference = logits.float() / temperature, reference.float() / temperature
    if top_k is None or top_k >= reference.shape[-1]:
        whole: Tensor = _WholeKL.apply(logits, reference)
        return whole * temperature**2
    log_q, log_p = (each.log_softmax(-1, dtype=torch.float32) for each in (reference, logits))
    log_q, likeliest = log_q.topk(top_k, dim=-1)
    log_p = log_p.gather(-1, likeliest)
    log_q, log_p = (torch.cat([part, _rest(part)], dim=-1) for part in (log_q, log_p))
    return (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2


class _WholeKL(torch.autograd.Function):
    """KL divergence [...] of logits [...,V] from a reference's, with its gradient for the logits: p - q.

    autograd would pass over the logits twice as often: for each step of the formula once more.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, reference: Tensor) -> Tensor:
        log_q, log_p = (each.log_softmax(-1, dtype=torch.float32) for each in (reference, logits))
        q = log_q.exp()
        kl = log_q.sub_(log_p).mul_(q).sum(-1)
        context.gradient = log_p.exp_().sub_(q)
        return kl

    @staticmethod
    def backward(context: Any, *scale: Tensor) -> tuple[Tensor, None]:
        return context.gradient * scale[0][..., None], None


def _rest(log_p: Tensor) -> Tensor:
    """Log of what the probabilities leave to 1, [..., 1]."""
    left = 1 - log_p.exp().sum(-1, keepdim=True)
    return left.clamp_min(torch.finfo(left.dtype).eps).log()


def token_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy [B,T] of ``logits`` [B,T,V] on the tokens ``following`` [B,T], in nats."""
    return -logits.float().log_softmax(-1).gather(-1, following[..., None])[..., 0]


def shares(weight: Tensor) -> Tensor:
    """Each token's weight [B,T], if the loss is a mean over rows of means weighted by ``weight`` [B,T]."""
    return weight / weight.sum(-1, keepdim=True).clamp_min(1) / len(weight)


def sum_of_parts(loss: Callable[[Logits, slice], Tensor], logits: Logits, weights: Iterable[Tensor]) -> Tensor:
    """The sum of the ``loss`` of all parts of ``logits``, with gradients for their source and for ``weights``.

    The gradient of a part is taken as soon as its loss is known. So no two parts are held at once, and none is made
    again on the way back.
    """
    learned = [weight for weight in weights if weight.requires_grad]
    total: Tensor = _SumOfParts.apply(loss, logits, logits.source, *learned)
    return total


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, loss: Callable[[Logits, slice], Tensor], logits: Logits, source: Tensor, *weights: Tensor
    ) -> Tensor:
        inputs = (source.detach().requires_grad_(True), *weights)  # only the head lies between them and the loss
        total = source.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for part in logits.parts():
            with torch.enable_grad():
                lost = loss(replace(logits, source=inputs[0]), part)
            found = torch.autograd.grad(lost, inputs, allow_unused=True)
            gradients = [_added(*each) for each in zip(gradients, found, strict=True)]
            total = total + lost.detach()
        context.gradients = gradients
        return total

    @staticmethod
    def backward(context: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if each is None else each * scale[0] for each in context.gradients)


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total.add_(more)


def _row_means(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted means [B] of values [B,T]; 0 where no token counts."""
    return (values * weight).sum(-1) / weight.sum(-1).clamp_min(1)
