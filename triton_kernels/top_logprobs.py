"""Log-probs of the chosen tokens and of the k best of each row, equal values by ascending id.

    lp_v = z_v - lse

Value and id are one integer, the value's image above the id counted down, so that the order is strict and each of the k
is the next maximum. Launches: 2, the k best of each chunk and of those; 1 gather for k = 0. Bytes: the rows read once,
8 k for every 2048 tokens written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two
from triton_kernels.floats import image, value_of

Tensor = torch.Tensor
CHUNK = 2048
MOST = 32  # candidates of a row then fit a program
_NONE = tl.constexpr(-(1 << 63))


class TopLogprobs(NamedTuple):
    """chosen [n] fp32; of the k best, best first: ids [n, k] int32, values [n, k] fp32."""

    chosen: Tensor
    ids: Tensor
    values: Tensor


def top_logprobs_reference(
    source: Tensor, index: Tensor, width: int, lse: Tensor, chosen: Tensor, k: int
) -> TopLogprobs:
    """See `top_logprobs`; by sorting."""
    z = source[index.long(), :width].float()
    values, ids = z.sort(dim=1, descending=True, stable=True)
    of_chosen = z.gather(1, chosen.long()[:, None])[:, 0] - lse
    return TopLogprobs(of_chosen, ids[:, :k].int(), values[:, :k] - lse[:, None])


@triton.jit
def _chunk_kernel(
    x_ptr, index_ptr, keys_ptr, width, stride, chunks, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    row = x_ptr + tl.load(index_ptr + i).to(tl.int64) * stride
    x = tl.load(row + at, mask=at < width, other=0.0).to(tl.float32)
    keys = tl.where(at < width, (image(x).to(tl.int64) << 32) | (2147483647 - at).to(tl.int64), _NONE)
    for k in range(K):
        best = tl.max(keys, axis=0)
        tl.store(keys_ptr + (i * chunks + chunk) * K + k, best)
        keys = tl.where(keys == best, _NONE, keys)


@triton.jit
def _join_kernel(
    x_ptr, index_ptr, lse_ptr, chosen_ptr, keys_ptr, to_chosen_ptr, ids_ptr, values_ptr, stride, count,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + i)
    row = x_ptr + tl.load(index_ptr + i).to(tl.int64) * stride
    tl.store(to_chosen_ptr + i, tl.load(row + tl.load(chosen_ptr + i)).to(tl.float32) - lse)
    keys = tl.load(keys_ptr + i * count + at, mask=at < count, other=_NONE)
    for k in range(K):
        best = tl.max(keys, axis=0)
        tl.store(ids_ptr + i * K + k, (2147483647 - (best & 0x7FFFFFFF)).to(tl.int32))
        tl.store(values_ptr + i * K + k, value_of(best >> 32) - lse)
        keys = tl.where(keys == best, _NONE, keys)


def top_logprobs(
    source: Tensor, index: Tensor, width: int, lse: Tensor, chosen: Tensor, k: int, *, kernel: bool | None = None
) -> TopLogprobs:
    """Of rows `index` of `source`, of their first `width` tokens; k is cut to the width.

    source [R, V] fp32, bf16 or fp16 without NaN, index [n] int32 or int64, lse [n] fp32 (`row_stats`), chosen [n] int32
    or int64, ids below `width`. Raises ValueError if k is above `MOST` or the shapes do not fit.
    """
    k = min(k, width)
    if k > MOST or lse.shape != index.shape or chosen.shape != index.shape or not 0 < width <= source.shape[1]:
        raise ValueError(f"top_logprobs: k {k} of at most {MOST}, source {tuple(source.shape)} and rows do not fit")
    if not on_kernel(source, kernel):
        return top_logprobs_reference(source, index, width, lse, chosen, k)
    source = source if source.stride(1) == 1 else source.contiguous()
    index, lse, chosen = index.contiguous(), lse.contiguous(), chosen.contiguous()
    n, device = index.shape[0], source.device
    ids, values = torch.empty(n, k, dtype=torch.int32, device=device), torch.empty(n, k, device=device)
    if not k:
        return TopLogprobs(source[index.long(), chosen.long()].float() - lse, ids, values)
    block = min(CHUNK, power_of_two(width, 32))
    chunks = triton.cdiv(width, block)
    keys = torch.empty(n, chunks, k, dtype=torch.int64, device=device)
    of_chosen = torch.empty(n, device=device)
    if n:
        _chunk_kernel[(n, chunks)](source, index, keys, width, source.stride(0), chunks, k, block)
        count = chunks * k
        _join_kernel[(n,)](
            source, index, lse, chosen, keys, of_chosen, ids, values, source.stride(0), count,
            k, power_of_two(count), num_warps=8,
        )  # fmt: skip
    return TopLogprobs(of_chosen, ids, values)
