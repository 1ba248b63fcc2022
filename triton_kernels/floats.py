"""What several kernels do with floats: an integer image in the same order, and weights that cannot overflow."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image(x):
    """An integer for each float, in the order of the floats; -0.0 counts as 0.0. `value_of` turns it back."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(i):
    i = i.to(tl.int32)
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, best, scale):
    """exp((x - best) / scale), 0 far below the best."""
    d = x - best
    return tl.where(d > -87.0 * scale, tl.exp(tl.maximum(d, -88.0 * scale) / scale), 0.0)


@triton.jit
def finite_or_0(x):
    return tl.where(x > -float("inf"), x, 0.0)
