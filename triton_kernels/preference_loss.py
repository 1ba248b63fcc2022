"""Log-probs of given tokens behind a head, without the whole logits, and the pairwise losses made of them.

    lp_n = z_n[y_n] - log sum_v exp z_n[v],  z = hidden W^T + bias       token_logprobs
    lp(sequence) = sum of its tokens' lp                                 sequence_logprobs
    loss = mean of -log sigmoid(beta (m - m_ref)),  m = lp(chosen) - lp(rejected)

Without a reference it trains autoregressive reward models (GenARM, Xu et al. 2024, arXiv:2410.08193), with a
reference's m_ref it is DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7); neither normalises by length.

The logits exist for one chunk of rows at a time. The slopes by them, d lp (1{v = y} - softmax(z)[v]), depend on all
tokens of a pair, so the backward pass makes the logits again, and the kernel overwrites them.

Launches: one a chunk each way (and the products). Bytes: logits read once by the forward pass, read and written once by
the backward pass. The forward pass has a program a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from triton_kernels.chunked_linear import CHUNK, Gradients, check_head, logits_of
from triton_kernels.dispatch import on_kernel

Tensor = torch.Tensor

_BLOCK = 4096


def token_logprobs_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """See `token_logprobs`; whole logits, and autograd's gradients."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias).to(wide), 1)  # [N, V]
    found = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets < 0, 0.0, found)


@triton.jit
def _token_logprobs_kernel(logits_ptr, targets_ptr, logprobs_ptr, norms_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target < 0:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(norms_ptr + row, 0.0)
        return
    logits_ptr += row * width
    top, total = -1e30, 0.0
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + at, mask=at < width, other=-1e30).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    norm = top + tl.log(total)
    tl.store(logprobs_ptr + row, tl.load(logits_ptr + target).to(tl.float32) - norm)
    tl.store(norms_ptr + row, norm)


@triton.jit
def _token_slopes_kernel(logits_ptr, targets_ptr, norms_ptr, slopes_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * width
    slope = tl.zeros([BLOCK], tl.float32)
    if target >= 0:
        z = tl.load(logits_ptr + at, mask=at < width, other=-1e30).to(tl.float32)
        q = tl.exp(z - tl.load(norms_ptr + row))
        slope = tl.load(slopes_ptr + row) * (tl.where(at == target, 1.0, 0.0) - q)
    tl.store(logits_ptr + at, slope.to(logits_ptr.dtype.element_ty), mask=at < width)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int = CHUNK,
    kernel: bool | None = None,
) -> Tensor:
    """Log-probs [N] in fp32 of the tokens `targets` [N] int, 0 where a target is negative (nothing is to be predicted).

    hidden [N, D] fp32, bf16 or fp16; weight [V, D] and bias [V], the head. Gradients go to all three. Raises ValueError
    if the shapes do not fit.
    """
    check_head("token_logprobs", hidden, weight, bias, chunk)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"token_logprobs: targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    if not on_kernel(hidden, kernel):
        return token_logprobs_reference(hidden, weight, bias, targets)
    found: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets.contiguous(), chunk)
    return found


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        n, device = len(hidden), hidden.device
        head = _head(hidden, weight, bias)
        buffer = torch.empty(min(chunk, n), len(weight), dtype=hidden.dtype, device=device)
        logprobs, norms = torch.empty(n, device=device), torch.empty(n, device=device)
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logits = logits_of(buffer, hidden[part], *head)  # [C, V]
            _token_logprobs_kernel[(len(logits),)](
                logits, targets[part], logprobs[part], norms[part], len(weight), _BLOCK, num_warps=8
            )
        ctx.save_for_backward(hidden, weight, bias, targets, norms)
        ctx.chunk = chunk
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        n, width, slopes = len(hidden), len(weight), slopes.float().contiguous()
        head = _head(hidden, weight, bias)
        made = Gradients.zeros(hidden, weight, ctx.needs_input_grad[:3])
        buffer = torch.empty(min(ctx.chunk, n), width, dtype=hidden.dtype, device=hidden.device)
        for start in range(0, n, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = logits_of(buffer, hidden[part], *head)  # [C, V]
            _token_slopes_kernel[(len(logits), triton.cdiv(width, _BLOCK))](
                logits, targets[part], norms[part], slopes[part], width, _BLOCK, num_warps=8
            )
            made.add(start, logits, hidden[part], head[0])
        return made.hidden, made.weight, made.bias, None, None


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In hidden's dtype, as autocast would have it."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Tensor,
    count: int,
    *,
    bias: Tensor | None = None,
    chunk: int = CHUNK,
    kernel: bool | None = None,
) -> Tensor:
    """Summed log-probs [count] in fp32: segments [N] int says which sequence each row of `token_logprobs` is of.

    `count` is a number of the host's, so that nothing waits for the device; where a target is negative the segment is
    not looked at. Raises ValueError if the shapes do not fit.
    """
    if segments.shape != targets.shape:
        raise ValueError(f"sequence_logprobs: segments {tuple(segments.shape)} for targets {tuple(targets.shape)}")
    logprobs = token_logprobs(hidden, weight, bias, targets, chunk=chunk, kernel=kernel)
    return logprobs.new_zeros(count).index_add(0, torch.where(targets < 0, 0, segments), logprobs)


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Tensor,
    pairs: int,
    beta: float,
    reference: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk: int = CHUNK,
    kernel: bool | None = None,
) -> Tensor:
    """The mean loss of the pairs, a scalar in fp32: sequences 0 .. pairs - 1 are chosen over pairs .. 2 pairs - 1.

    `reference` [2 pairs]: the sequences' summed log-probs under a reference model (DPO). Shapes as in
    `sequence_logprobs`, which raises ValueError; so does a reference of another shape, or no pair.
    """
    if pairs < 1 or (reference is not None and reference.shape != (2 * pairs,)):
        shape = None if reference is None else tuple(reference.shape)
        raise ValueError(f"preference_loss: a reference of shape {shape} for {pairs} pairs, of which one is the least")
    found = sequence_logprobs(hidden, weight, targets, segments, 2 * pairs, bias=bias, chunk=chunk, kernel=kernel)
    if reference is not None:
        found = found - reference.detach()
    return -torch.nn.functional.logsigmoid(beta * (found[:pairs] - found[pairs:])).mean()
