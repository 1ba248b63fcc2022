"""Losses between a target's and a drafter's distributions, chunk by chunk: the sweep, and a chunk's losses in torch.

The formulas are those of `distill_loss.py`, whose kernel takes the place of `torch_rows` on CUDA; nothing here needs
triton. The drafter's logits exist for one chunk of rows at a time, and so do the target's where it is given as what its
head reads: the memory is some C V instead of several N V. `torch_rows` overwrites the drafter's logits by their slopes,
which two products turn into gradients. They are made by the forward pass and scaled by the backward pass. A batch's
sigma is a factor, so one sweep over the chunks is enough; w is not, so the mixed loss takes two sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from triton_kernels.chunked_linear import Gradients, check_head, logits_of

Tensor = torch.Tensor

KINDS = ("kl", "tvd", "tvd++", "lk")
HOST_CHUNK = 128  # rows: a few buffers of them stay near the processor, and products are still large enough


class Options(NamedTuple):
    """What to minimise, and how many rows at a time."""

    kind: str
    per_position: bool
    floor: float
    decay: float | None
    chunk: int

    @property
    def mixed(self) -> bool:
        """Whether it is the mixed form of lk."""
        return self.kind == "lk" and self.decay is not None


class TargetHead(NamedTuple):
    """A target's logits as what they are made of: last hidden states [N, E], and its head, weight [V, E], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self) -> Tensor:
        """All of them, [N, V]."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)


RowLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Options, bool], None]
"""(logits [C, V], target [C, V], mask [C] uint8, w [1], loss [C], share [C], options, slopes): writes loss and share,
and over the logits their slopes if asked for. share is m of tvd++, the acceptance of the mixed loss."""


def torch_rows(
    logits: Tensor, target: Tensor, mask: Tensor, w: Tensor, loss: Tensor, share: Tensor, options: Options, slopes: bool
) -> None:
    """A `RowLoss` in torch, in fp32, or in fp64 where the logits come so."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q = torch.log_softmax(logits, 1, dtype=wide)  # [C, V]
    log_p = torch.log_softmax(target, 1, dtype=wide).clamp_(min=-1e30)  # finite, so that 0 log 0 is 0
    if options.mixed:
        divergence, steep = _kl(log_p, log_q)
        distance, share[:], slope = _distance(log_p, log_q)
        share[:] = 1 - distance
        loss[:] = w * divergence + (1 - w) * distance
        slope.mul_(1 - w).add_(steep.mul_(w))
    elif options.kind == "kl":
        loss[:], slope = _kl(log_p, log_q)
    elif options.kind == "lk":
        loss[:], slope = _lk(log_p, log_q)
    else:
        loss[:], share[:], slope = _distance(log_p, log_q)
        if options.kind == "tvd++" and options.per_position:
            by = 1 / sigma(share, options.floor)  # [C]
            loss.mul_(by)
            slope.mul_(by[:, None])
    left_out = mask == 0
    loss.masked_fill_(left_out, 0.0)
    share.masked_fill_(left_out, 0.0)
    if slopes:
        logits.copy_(slope.masked_fill_(left_out[:, None], 0.0))


def _kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p, q) [C] and its slope q - p [C, V]."""
    p = log_p.exp()
    divergence = (log_p - log_q).mul_(p).sum(1)
    return divergence, log_q.exp().sub_(p)


def _distance(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """TVD [C], E_q[p > q] [C] and the slope q (E_q[d] - d) / 2 [C, V]; d = sign(p - q) = 2 s - 1."""
    q = log_q.exp()
    apart = log_p.exp().sub_(q)
    distance = apart.abs().sum(1) / 2
    d = apart.sign_()
    share = (q * (d > 0)).sum(1)
    mean = (q * d).sum(1, keepdim=True)
    return distance, share, d.sub_(mean).mul_(q).mul_(-0.5)


def _lk(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """-log A [C] and its slope q (E_q[s] - s) / A [C, V], also where A underflows: where s is not 0, q is at most A."""
    level = torch.logsumexp(torch.minimum(log_p, log_q), 1)
    s = (log_p - log_q).sign_().add_(1).mul_(0.5)
    s.mul_((log_q - level[:, None]).clamp_(max=0).exp_())
    tied = s.sum(1, keepdim=True)
    return -level, log_q.exp().mul_(tied).sub_(s)


def sigma(m: Tensor, floor: float) -> Tensor:
    """Standard deviation of a reward of 0 or 1 with mean m, at least `floor`."""
    return (m * (1 - m)).clamp(min=0).sqrt().clamp(min=floor)


def checked(
    what: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | TargetHead,
    mask: Tensor | None,
    options: Options,
) -> Tensor:
    """The mask, all rows if there is none. Raises ValueError if shapes do not fit, or there is no such loss."""
    check_head(what, hidden, weight, bias, options.chunk)
    if options.kind not in KINDS:
        raise ValueError(f"{what}: no loss called {options.kind!r}; choose from {', '.join(KINDS)}")
    if isinstance(target, TargetHead):
        check_head(f"{what}, target", *target, options.chunk)
    shape = (len(target.hidden), len(target.weight)) if isinstance(target, TargetHead) else tuple(target.shape)
    if shape != (len(hidden), len(weight)) or (mask is not None and mask.shape != hidden.shape[:1]):
        raise ValueError(f"{what}: target {shape} or mask do not fit {tuple(hidden.shape)}")
    return torch.ones_like(hidden[:, 0], dtype=torch.bool) if mask is None else mask.bool()


def chunked_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | TargetHead,
    kind: str,
    *,
    mask: Tensor | None = None,
    per_position: bool = False,
    floor: float = 0.01,
    decay: float | None = None,
    chunk: int = HOST_CHUNK,
    rows: RowLoss = torch_rows,
) -> Tensor:
    """`distill_loss` by `rows`, on any device: the same arguments, fp64 too, which gives an fp64 scalar."""
    options = Options(kind, per_position, floor, decay, chunk)
    mask = checked("chunked_distill_loss", hidden, weight, bias, target, mask, options)
    learn = torch.is_grad_enabled()
    found: Tensor = _Sweeps.apply(hidden, weight, bias, target, mask, options, rows, learn)
    return found


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk: int = HOST_CHUNK
) -> Tensor:
    """Mean of -log q(label) over rows, in nats; labels [N] int64, the rest as in `chunked_distill_loss`. 0 without any.

    It is KL from targets that are sure. Raises ValueError if shapes do not fit.
    """
    check_head("chunked_cross_entropy", hidden, weight, bias, chunk)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"chunked_cross_entropy: labels {tuple(labels.shape)} do not fit {tuple(hidden.shape)}")
    options = Options("kl", False, 0.01, None, chunk)
    mask, learn = torch.ones_like(labels, dtype=torch.bool), torch.is_grad_enabled()
    found: Tensor = _Sweeps.apply(hidden, weight, bias, labels, mask, options, _label_rows, learn)
    return found


def _label_rows(
    logits: Tensor, labels: Tensor, mask: Tensor, w: Tensor, loss: Tensor, share: Tensor, options: Options, slopes: bool
) -> None:
    """A `RowLoss` of labels [C] in place of a target's logits; all rows count."""
    log_q = torch.log_softmax(logits, 1, dtype=loss.dtype)  # [C, V]
    at = labels[:, None]
    torch.neg(log_q.gather(1, at)[:, 0], out=loss)
    if slopes:
        logits.copy_(log_q.exp_().scatter_add_(1, at, torch.full_like(log_q[:, :1], -1.0)))


class _Sweeps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | TargetHead,
        mask: Tensor,
        options: Options,
        rows: RowLoss,
        learn: bool,
    ) -> Tensor:
        """Loss, and in `ctx` the gradients of the sum of rows, with their factor."""
        n, device = len(hidden), hidden.device
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        target_of = _chunks_of(target, options.chunk)
        mask = mask.contiguous().view(torch.uint8)
        wanted = ctx.needs_input_grad[:3] if learn else (False, False, False)
        made = Gradients.zeros(hidden, weight, wanted)
        buffer = hidden.new_empty(min(options.chunk, n), len(weight))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, share = torch.zeros(2, n, device=device, dtype=wide).unbind(0)
        w = torch.ones(1, device=device, dtype=wide)
        count = mask.sum().clamp(min=1).to(wide)

        def sweep(slopes: bool) -> None:
            for start in range(0, n, options.chunk):
                part = slice(start, start + options.chunk)
                logits = logits_of(buffer, hidden[part], weight, bias)  # [C, V]
                rows(logits, target_of(part), mask[part], w, loss[part], share[part], options, slopes)
                if slopes:
                    made.add(start, logits, hidden[part], weight)

        if options.mixed:
            sweep(slopes=False)
            assert options.decay is not None
            w = torch.exp(-options.decay * share.sum() / count).reshape(1)
        sweep(slopes=any(wanted))
        factor = 1 / count
        if options.kind == "tvd++" and not options.per_position:
            factor = factor / sigma(share.sum() / count, options.floor)
        ctx.save_for_backward(made.hidden, made.weight, made.bias, factor)
        return loss.sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *made, factor = ctx.saved_tensors
        return (*(None if each is None else each * (slope * factor) for each in made), *[None] * 5)


def _chunks_of(target: Tensor | TargetHead, chunk: int) -> Callable[[slice], Tensor]:
    """The target's logits of a slice of rows, each made when asked for, all in one buffer."""
    if not isinstance(target, TargetHead):
        return target.detach().__getitem__
    hidden = target.hidden.detach()
    weight = target.weight.detach().to(hidden.dtype)
    bias = None if target.bias is None else target.bias.detach().to(hidden.dtype)
    buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
    return lambda part: logits_of(buffer, hidden[part], weight, bias)
