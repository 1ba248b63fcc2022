"""Keyed noise on the device: uniforms that are a pure function of a 64-bit key and a token id.

    h = mix(id x golden + low half of the key), u = (mix(h ^ high half) >> 9, plus a half) x 2^-23
    gumbel = -log(-log u)

mix is a bijective scramble of 32 bits (constants: C. Wellons, "lowbias32"). u has 23 bits, so it is exact in fp32 and
never 0 or 1. Whoever draws the same noise elsewhere computes the same integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix32(h):
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def uniform(low, high, ids):
    """Uniforms in (0, 1) of token ids [..]; low, high: the halves of the key, int32."""
    h = ids.to(tl.uint32) * 0x9E3779B1 + low.to(tl.uint32)
    h = _mix32(_mix32(h) ^ high.to(tl.uint32))
    return ((h >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def gumbel(low, high, ids):
    """Standard Gumbel noise of token ids [..]."""
    return -tl.log(-tl.log(uniform(low, high, ids)))
