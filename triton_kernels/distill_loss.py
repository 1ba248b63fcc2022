"""Losses between a target's and a drafter's distributions, from the drafter's hidden states, forward and backward.

    q = softmax(hidden W^T + bias), p = softmax(target), s = 1{q < p} (a half where equal), A = sum_x min(p, q)

    kind      loss of a row             its slope by the drafter's logits
    kl        sum p log(p / q)          q - p
    tvd       sum |p - q| / 2           q (E_q[s] - s)
    tvd++     tvd / sigma               the same / sigma, sigma^2 = m (1 - m), m = E_q[p > q], at least floor^2
    lk        -log A                    q (E_q[s] - s) / A
    lk mixed  w kl + (1 - w) tvd        likewise mixed, w = exp(-decay mean A)

(Goel et al. 2024, arXiv:2403.00858; Samarin et al. 2026, arXiv:2602.23881.) The loss is the mean over the rows of the
mask. sigma is that of m's mean over them, or the row's own (`per_position`).

The drafter's logits exist for one chunk of rows at a time, and the kernel overwrites them by their slopes
(`distill_sweep.py` has the sweep over the chunks): the memory is C V instead of several N V. The target is a tensor,
or hidden states and a head, whose logits then exist for one chunk as well. The mixed loss takes two sweeps, and so
additional products with the heads.

Launches: one a chunk (and the products). Bytes: target and logits are read twice (kl) or three times, slopes written
once. A program a row: full speed takes as many rows as the GPU has multiprocessors, which training has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_kernels.chunked_linear import CHUNK
from triton_kernels.dispatch import on_kernel
from triton_kernels.distill_sweep import KINDS, Options, TargetHead, checked, chunked_distill_loss, sigma

__all__ = ["KINDS", "TargetHead", "distill_loss", "distill_loss_reference"]

Tensor = torch.Tensor

_BLOCK = 4096
_KL, _TVD, _TVD_PLUS, _LK, _MIXED = (tl.constexpr(i) for i in range(5))


def distill_loss_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, options: Options
) -> Tensor:
    """See `distill_loss`; whole logits, and autograd's gradients."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_q = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias).to(wide), 1)  # [N, V]
    log_p = torch.log_softmax(target.to(wide), 1)
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p.masked_fill(p == 0, 0.0) - log_q)).sum(1)  # [N]
    tvd = (p - q).abs().sum(1) / 2
    count = mask.sum().clamp(min=1)
    if options.kind == "kl":
        rows = kl
    elif options.kind == "lk" and options.decay is not None:
        accepted = torch.minimum(p, q).sum(1)
        w = torch.exp(-options.decay * (accepted.detach() * mask).sum() / count)
        rows = w * kl + (1 - w) * (1 - accepted)
    elif options.kind == "lk":
        rows = -torch.logsumexp(torch.minimum(log_p, log_q), 1)
    else:
        rows = tvd
        if options.kind == "tvd++":
            m = (q * (p > q)).sum(1).detach()
            m = m if options.per_position else (m * mask).sum() / count
            rows = tvd / sigma(m, options.floor)
    return torch.where(mask, rows, 0.0).sum() / count


@triton.jit
def _logits(logits_ptr, target_ptr, at, width):
    """Of both models, fp32; what is outside or has no probability stays finite, so that differences are."""
    z = tl.load(logits_ptr + at, mask=at < width, other=-1e30).to(tl.float32)
    t = tl.load(target_ptr + at, mask=at < width, other=-1e30).to(tl.float32)
    return tl.maximum(z, -1e30), tl.maximum(t, -1e30)


@triton.jit
def _distill_loss_kernel(
    logits_ptr, target_ptr, target_stride, mask_ptr, w_ptr, loss_ptr, share_ptr, width, floor,
    KIND: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    target_ptr += row * target_stride
    least = -1e30
    if tl.load(mask_ptr + row) == 0:
        if SLOPES:
            for first in range(0, width, BLOCK):
                at = first + tl.arange(0, BLOCK)
                tl.store(logits_ptr + at, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=at < width)
        tl.store(loss_ptr + row, 0.0)
        tl.store(share_ptr + row, 0.0)
        return
    # The normalisers, and E_p[t - z] for the KL.
    z_top, t_top, z_sum, t_sum, cross = least, least, 0.0, 0.0, 0.0
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z, t = _logits(logits_ptr, target_ptr, at, width)
        top = tl.maximum(z_top, tl.max(z, 0))
        z_sum = z_sum * tl.exp(z_top - top) + tl.sum(tl.exp(z - top), 0)
        z_top = top
        top = tl.maximum(t_top, tl.max(t, 0))
        e = tl.exp(t - top)
        scale = tl.exp(t_top - top)
        t_sum = t_sum * scale + tl.sum(e, 0)
        cross = cross * scale + tl.sum(tl.where(e > 0, e * (t - z), 0.0), 0)
        t_top = top
    z_norm, t_norm = z_top + tl.log(z_sum), t_top + tl.log(t_sum)
    kl = cross / t_sum - (t_norm - z_norm)
    loss, share, tied, level = kl, 0.0, 0.0, 0.0
    if KIND == _LK:
        top, total, below = least, 0.0, 0.0  # of log min(p, q); sums relative to e^top, which may underflow
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            z, t = _logits(logits_ptr, target_ptr, at, width)
            log_q, log_p = z - z_norm, t - t_norm
            low = tl.minimum(log_p, log_q)
            higher = tl.maximum(top, tl.max(low, 0))
            e = tl.exp(low - higher)
            scale = tl.exp(top - higher)
            s = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
            total = total * scale + tl.sum(e, 0)
            below = below * scale + tl.sum(e * s, 0)
            top = higher
        level = top + tl.log(total)
        loss, tied = -level, below / total
    elif KIND != _KL:
        distance, share = 0.0, 0.0
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            z, t = _logits(logits_ptr, target_ptr, at, width)
            log_q, log_p = z - z_norm, t - t_norm
            q, p = tl.exp(log_q), tl.exp(log_p)
            distance += tl.sum(tl.abs(p - q), 0)
            tied += tl.sum(tl.where(log_q < log_p, q, tl.where(log_q == log_p, q * 0.5, 0.0)), 0)
            share += tl.sum(tl.where(log_q < log_p, q, 0.0), 0)
        loss = distance / 2
    scale, w = 1.0, 0.0
    if KIND == _TVD_PLUS:
        scale = 1 / tl.maximum(tl.sqrt(tl.maximum(share * (1 - share), 0.0)), floor)
        loss = loss * scale
    if KIND == _MIXED:
        w = tl.load(w_ptr)
        share = 1 - loss
        loss = w * kl + (1 - w) * loss
        scale = 1 - w
    tl.store(loss_ptr + row, loss)
    tl.store(share_ptr + row, share)
    if SLOPES:
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            z, t = _logits(logits_ptr, target_ptr, at, width)
            log_q, log_p = z - z_norm, t - t_norm
            q = tl.exp(log_q)
            if KIND == _KL:
                slope = q - tl.exp(log_p)
            else:
                s = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
                # Where s is not 0, q is at most A = e^level.
                slope = scale * (q * tied - s * tl.exp(tl.minimum(log_q - level, 0.0)))
                if KIND == _MIXED:
                    slope += w * (q - tl.exp(log_p))
            tl.store(logits_ptr + at, slope.to(logits_ptr.dtype.element_ty), mask=at < width)


def _kernel_rows(
    logits: Tensor, target: Tensor, mask: Tensor, w: Tensor, loss: Tensor, share: Tensor, options: Options, slopes: bool
) -> None:
    """The `RowLoss` of the kernel."""
    target = target if target.stride(1) == 1 else target.contiguous()
    _distill_loss_kernel[(len(logits),)](
        logits, target, target.stride(0), mask, w, loss, share, logits.shape[1], options.floor, _number(options),
        slopes, _BLOCK, num_warps=8,
    )  # fmt: skip


def _number(options: Options) -> int:
    """The kernel's name for a loss; a batch's sigma is a factor outside."""
    if options.kind == "tvd++":
        return int((_TVD_PLUS if options.per_position else _TVD).value)
    if options.kind == "lk":
        return int((_MIXED if options.mixed else _LK).value)
    return int((_KL if options.kind == "kl" else _TVD).value)


def distill_loss(
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
    chunk: int = CHUNK,
    kernel: bool | None = None,
) -> Tensor:
    """The mean loss over the rows of `mask`, a scalar in fp32; 0 without any. Gradients go to hidden, weight, bias.

    hidden [N, D] fp32, bf16 or fp16, the drafter's last hidden states; weight [V, D] and bias [V], its head; target
    [N, V] of any float dtype, the target's logits or log-probs (-inf: no probability), or its hidden states and head;
    mask [N] bool, else all rows. `kind` is one of KINDS; `decay` makes lk the mixed loss; `per_position` and `floor`
    are tvd++'s. Raises ValueError if the shapes do not fit or for another kind.
    """
    options = Options(kind, per_position, floor, decay, chunk)
    rows = checked("distill_loss", hidden, weight, bias, target, mask, options)
    if on_kernel(hidden, kernel):
        return chunked_distill_loss(
            hidden, weight, bias, target, kind, mask=rows, per_position=per_position, floor=floor, decay=decay,
            chunk=chunk, rows=_kernel_rows,
        )  # fmt: skip
    logits = target.logits() if isinstance(target, TargetHead) else target
    return distill_loss_reference(hidden, weight, bias, logits.detach(), rows, options)
