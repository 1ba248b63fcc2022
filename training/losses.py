"""Losses: pure functions of logits and labels."""

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
