"""RMS norm, with the residual sum before it where a layer has one: one read and one write of each row.

    r = x + residual (in x's dtype, where there is a residual)
    y = cast(r / sqrt(mean(r^2) + eps)) * weight

The statistics are fp32 for every dtype, and the row is cast before the weight, as Llama does it
(Zhang and Sennrich 2019, arXiv:1910.07467, equation 4). `offset` is added to the weight (Gemma: 1); such models
multiply before the cast, and so do others with `cast_last` (OLMo 2).

Launches: 1. Bytes: x read and y written once, the residual read and r written once where there is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two

Tensor = torch.Tensor


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, offset: float = 0.0, cast_last: bool = False
) -> tuple[Tensor, Tensor]:
    """See `rms_norm`."""
    r = x if residual is None else x + residual
    wide = r.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset or cast_last:
        return (y * (weight.float() + offset)).to(x.dtype), r
    return y.to(x.dtype) * weight, r


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, width, stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, CAST_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * stride + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)).to(
            x.dtype
        )
        tl.store(sum_ptr + row * width + at, x, mask=inside)
    wide = x.to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if CAST_LAST:
        y = y * (weight.to(tl.float32) + offset)
    else:
        y = y.to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * width + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    cast_last: bool = False,
    *,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, r): the normed rows and what was normed; r is `x` itself without a residual.

    x [.., d] and residual [.., d] fp32, bf16 or fp16 and of any strides, weight [d] of their dtype; y and r have x's
    shape and dtype. Raises ValueError if shapes or dtypes do not fit.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rms_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)} and residual do not fit")
    if weight.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        raise ValueError(f"rms_norm: x of {x.dtype}, weight of {weight.dtype} and residual do not fit")
    if not on_kernel(x, kernel):
        return rms_norm_reference(x, weight, eps, residual, offset, cast_last)
    rows = x.reshape(-1, x.shape[-1])
    n, width = rows.shape
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty(n, width, dtype=x.dtype, device=x.device)
    r = x if residual is None else torch.empty(n, width, dtype=x.dtype, device=x.device)
    other = rows if residual is None else residual.reshape(-1, width).contiguous()
    if n:
        block = power_of_two(width)
        _rms_norm_kernel[(n,)](
            rows, other, weight.contiguous(), y, r, width, rows.stride(0), eps, offset,
            residual is not None, cast_last or offset != 0.0, block, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return y.view(x.shape), r.view(x.shape)
