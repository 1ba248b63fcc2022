"""Keyed noise: uniforms that are a pure function of (seed, branch path, position, lane, token id).

A request with a seed draws the same noise whatever else is in the batch, however its tokens were scheduled, and on
whatever device. 23-bit uniforms: the centre of each of 2^23 cells is exact in fp32 and never 0 or 1 (24-bit ones
round up to 1.0, whose Gumbel is infinite).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from decoding.upload import uploaded

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1


class Lane(IntEnum):
    """Independent streams at one position: rejection never shares a lane, coupled shares TOKEN with its drafter."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def _splitmix(x: int) -> int:
    """One step of SplitMix64 (Steele, Lea and Flood 2014): a bijective scramble of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def noise_key(seed: int, path: Sequence[int], position: int, lane: Lane) -> int:
    """64-bit key of one position's noise. `path`: child indices from the root of the search."""
    key = _splitmix(seed & _MASK64)
    for part in (len(path), *path, position, int(lane)):
        key = _splitmix(key ^ _splitmix(part & _MASK64))
    return key


def uniform(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Uniforms in (0, 1), fp32, of 23 bits: one per (row key, token id).

    keys: [n, 2] int32, low and high half of `noise_key`; ids: [n, m] int, or [1, m] for all rows alike. Returns
    [n, m]. Products and sums wrap at 32 bits.
    """
    h = ids.to(torch.int32) * _GOLDEN + keys[:, :1]
    h = _mix32(h).bitwise_xor_(keys[:, 1:])
    h = _mix32(h)
    return h.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise -log(-log u), fp32, shaped as `uniform`; at most `GUMBEL_MAX`."""
    return uniform(keys, ids).log_().neg_().log_().neg_()


def key_tensor(keys: Sequence[int], device: torch.device) -> torch.Tensor:
    """[n, 2] int32 of 64-bit keys, low half first."""
    return uploaded([key_halves(key) for key in keys], device, torch.int32)


def key_halves(key: int) -> tuple[int, int]:
    """A 64-bit key as two signed 32-bit numbers, the low half first."""
    return _signed(key), _signed(key >> 32)


def _signed(value: int) -> int:
    """The low 32 bits as a signed number."""
    return ((value & _MASK32) ^ 0x80000000) - 0x80000000


_GOLDEN = _signed(0x9E3779B1)
_FIRST, _SECOND = _signed(0x7FEB352D), _signed(0x846CA68B)
GUMBEL_MAX = 16.7  # -log(-log(1 - 2^-24)) = 16.64, and room for rounding


def _mix32(h: torch.Tensor) -> torch.Tensor:
    """A bijective scramble of 32 bits, in place (constants: C. Wellons, "lowbias32"). Shifts are unsigned."""
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= _FIRST
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= _SECOND
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h
