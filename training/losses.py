"""Losses: pure functions of logits and labels."""

from collections.abc import Callable

import torch
from torch import Tensor


def shift(logits: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line up predictions with what they predict.

    `logits` [batch, length, vocab], `ids` [batch, length], `targets` [batch, length] bool. Returns logits [n, vocab] in
    fp32, labels [n] and mask [n], n = batch * (length - 1): the logits at position t predict token t + 1.
    """
    return logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), targets[:, 1:].flatten()


def cross_entropy(logits: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy over the tokens that are targets, in nats; shapes as in `shift`.

    Zero without targets.
    """
    flat, labels, mask = shift(logits, ids, targets)
    nats = torch.nn.functional.cross_entropy(flat, labels, reduction="none")  # [n]
    return (nats * mask).sum() / mask.sum().clamp(min=1)


Distillation = Callable[[Tensor, Tensor], Tensor]
"""(target logits [n, vocab], drafter logits [n, vocab]) -> loss [n] of each position; gradients go to the drafter."""


def acceptance(target: Tensor, draft: Tensor) -> Tensor:
    """Share of drafts that the exact rule accepts, sum_x min(p(x), q(x)) = 1 - TV(p, q): [n] from logits [n, vocab].

    Leviathan et al. 2023, arXiv:2211.17192, corollary 3.6; p is the target, q the drafter, at T = 1.
    """
    return torch.minimum(_log_softmax(target).exp(), _log_softmax(draft).exp()).sum(-1)


def kl(target: Tensor, draft: Tensor) -> Tensor:
    """KL(target, drafter) = sum_x p(x) (log p(x) - log q(x)), in nats: [n] from logits [n, vocab]."""
    p, q = _log_softmax(target), _log_softmax(draft)
    return (p.exp() * (p - q)).sum(-1)


def tvd(target: Tensor, draft: Tensor) -> Tensor:
    """Total variation distance, half of sum_x |p(x) - q(x)|: [n] from logits [n, vocab].

    Its gradient is the policy gradient -E_{x ~ q}[r(x) grad log q(x)] with reward r(x) = 1{p(x) > q(x)} (Goel et al.
    2024, arXiv:2403.00858).
    """
    return (_log_softmax(target).exp() - _log_softmax(draft).exp()).abs().sum(-1) / 2


def tvd_plus(target: Tensor, draft: Tensor, *, per_position: bool = False, floor: float = 0.01) -> Tensor:
    """TVD++, `tvd` with its reward standardised (Goel et al. 2024, arXiv:2403.00858): [n].

    With expectations over the full vocabulary the reward's mean drops out (E_q[grad log q] = 0) and what remains is
    TVD / stopgrad(sigma). The reward is 0 or 1, so sigma^2 = m (1 - m) with m = E_q[r]: over all n positions together,
    or `per_position`, because one sigma for the whole batch is a mere factor, which Adam divides out. `floor` is the
    least sigma: where q hardly ever meets a reward, 1 / sigma has no bound.
    """
    p, q = _log_softmax(target).exp(), _log_softmax(draft).exp()
    mean = (q * (p > q)).sum(-1).detach()  # [n]
    if not per_position:
        mean = mean.mean()
    sigma = (mean * (1 - mean)).clamp(min=0).sqrt().clamp(min=floor)
    return (p - q).abs().sum(-1) / 2 / sigma


def lk(target: Tensor, draft: Tensor) -> Tensor:
    """-log sum_x min(p(x), q(x)) = -log of the acceptance: [n] from logits [n, vocab].

    The likelihood form of the LK losses (Samarin et al. 2026, arXiv:2602.23881).
    """
    return -torch.logsumexp(torch.minimum(_log_softmax(target), _log_softmax(draft)), dim=-1)


def lk_mixed(target: Tensor, draft: Tensor, *, decay: float) -> Tensor:
    """w KL + (1 - w) (1 - acceptance), w = stopgrad exp(-decay * mean acceptance): [n] from logits [n, vocab].

    The hybrid form of the LK losses (arXiv:2602.23881): KL leads while the drafter is bad, the acceptance once it is
    good. `decay` 0 is KL.
    """
    accepted = acceptance(target, draft)  # [n]
    w = torch.exp(-decay * accepted.detach().mean())
    return w * kl(target, draft) + (1 - w) * (1 - accepted)


def _log_softmax(logits: Tensor) -> Tensor:
    """In fp32, or in fp64 where it comes so."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
