"""Each row's maximum and log-sum-exp: the log-normalisers by which logits become log-probs.

    lse = best + log sum_v exp(z_v - best)

Launches: 2, over chunks of rows so that one row fills the machine, and over rows. Bytes: the rows read once, and 8
bytes for every 2048 tokens written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two
from triton_kernels.floats import finite_or_0

Tensor = torch.Tensor
CHUNK = 2048  # tokens a program reads: a row of 150k then has 75 of them


def row_stats_reference(source: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """See `row_stats`."""
    rows = source[index.long(), :width].float()  # [n, W]
    odd = ((rows != rows) | (rows == torch.inf)).any(1)
    best, lse = rows.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1), torch.logsumexp(rows, 1)
    return best.masked_fill(odd, torch.inf), lse.masked_fill(odd, torch.nan)


@triton.jit
def sum_above(x, best):
    """Sum of exp(x - best) of a block; best is its maximum, or -inf."""
    return tl.sum(tl.exp(x - finite_or_0(best)), axis=0)


@triton.jit
def joined(best_ptr, sum_ptr, chunks, CHUNKS: tl.constexpr):
    """(best, log-sum-exp) of a row from the maximum of each of its chunks and the sum of exponentials below it."""
    at = tl.arange(0, CHUNKS)
    bests = tl.load(best_ptr + at, mask=at < chunks, other=-float("inf"))
    sums = tl.load(sum_ptr + at, mask=at < chunks, other=0.0)
    best = tl.max(bests, axis=0)
    total = tl.sum(sums * tl.exp(bests - finite_or_0(best)), axis=0)
    return best, best + tl.where(total > 0, tl.log(tl.maximum(total, 1e-30)), 0.0)


@triton.jit
def _chunk_kernel(x_ptr, index_ptr, best_ptr, sum_ptr, width, stride, chunks, BLOCK: tl.constexpr):
    i, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    row = x_ptr + tl.load(index_ptr + i).to(tl.int64) * stride
    x = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
    odd = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0) > 0
    x = tl.where(odd, -float("inf"), x)
    best = tl.max(x, axis=0)
    tl.store(sum_ptr + i * chunks + chunk, sum_above(x, best))
    tl.store(best_ptr + i * chunks + chunk, tl.where(odd, float("inf"), best))


@triton.jit
def _join_kernel(bests_ptr, sums_ptr, best_ptr, lse_ptr, chunks, CHUNKS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)
    bests = tl.load(bests_ptr + i * chunks + at, mask=at < chunks, other=-float("inf"))
    if tl.max(bests, axis=0) == float("inf"):
        tl.store(best_ptr + i, float("inf"))
        tl.store(lse_ptr + i, float("nan"))
    else:
        best, lse = joined(bests_ptr + i * chunks, sums_ptr + i * chunks, chunks, CHUNKS)
        tl.store(best_ptr + i, best)
        tl.store(lse_ptr + i, lse)


def row_stats(source: Tensor, index: Tensor, width: int, *, kernel: bool | None = None) -> tuple[Tensor, Tensor]:
    """(best, lse), [n] fp32 each, of the first `width` tokens of rows `index` of `source`.

    source [R, V] fp32, bf16 or fp16, index [n] int32 or int64. A row of nothing finite has best and lse -inf, one that
    holds NaN or +inf best +inf and lse NaN. Raises ValueError if the shapes do not fit.
    """
    if source.dim() != 2 or index.dim() != 1 or not 0 < width <= source.shape[1]:
        raise ValueError(f"row_stats: source {tuple(source.shape)}, index and width {width} do not fit")
    if not on_kernel(source, kernel):
        return row_stats_reference(source, index, width)
    source = source if source.stride(1) == 1 else source.contiguous()
    index, n, block = index.contiguous(), index.shape[0], min(CHUNK, power_of_two(width, 32))
    chunks = triton.cdiv(width, block)
    bests, sums = torch.empty(2, n, chunks, device=source.device)
    best, lse = torch.empty(2, n, device=source.device)
    if n:
        _chunk_kernel[(n, chunks)](source, index, bests, sums, width, source.stride(0), chunks, block)
        _join_kernel[(n,)](bests, sums, best, lse, chunks, power_of_two(chunks))
    return best, lse
