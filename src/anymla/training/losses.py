"""The targets of tuning: the original's attention outputs, its logits, or the text itself.

Every loss is a mean over rows of means over a row's tokens. So it does not depend on how rows are divided among
processes and parts of a batch. Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    log_q, log_p = (each.float() if temperature == 1 else each.float() / temperature for each in (reference, logits))
    log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    if top_k is not None and top_k < log_q.shape[-1]:
        log_q, likeliest = log_q.topk(top_k, dim=-1)
        log_p = log_p.gather(-1, likeliest)
        log_q, log_p = (torch.cat([part, _rest(part)], dim=-1) for part in (log_q, log_p))
    return (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2


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


def sum_of_parts(loss: Callable[[slice], Tensor], parts: Iterable[slice]) -> Tensor:
    """The sum of the losses of ``parts`` of the tokens.

    What one part holds for its gradient is made again on the way back, so that no two parts are held at once.
    """
    sums: list[Tensor] = [checkpoint(loss, part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


def _row_means(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted means [B] of values [B,T]; 0 where no token counts."""
    return (values * weight).sum(-1) / weight.sum(-1).clamp_min(1)
