"""Keyed noise: uniforms that are a pure function of (seed, branch path, position, lane, token id).

A request with a seed draws the same noise whatever else is in the batch, however its tokens were scheduled, and on
whatever device. 23-bit uniforms: the centre of each of 2^23 cells is exact in fp32 and never 0 or 1 (24-bit ones
round up to 1.0, whose Gumbel is infinite).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

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

    keys: [n, 2] int64, low and high 32 bits of `noise_key`; ids: [n, m] int64, or [1, m] for all rows alike.
    Returns [n, m].
    """
    low, high = keys[:, :1], keys[:, 1:]  # [n, 1]
    h = (ids * 0x9E3779B1 + low) & _MASK32
    h = _mix32(h) ^ high
    h = _mix32(h)
    return ((h >> 9).float() + 0.5) * 2.0**-23


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise -log(-log u), fp32, shaped as `uniform`."""
    return -torch.log(-torch.log(uniform(keys, ids)))


def key_tensor(keys: Sequence[int], device: torch.device) -> torch.Tensor:
    """[n, 2] int64 of 64-bit keys, low half first."""
    return torch.tensor([[key & _MASK32, key >> 32] for key in keys], dtype=torch.int64, device=device)


def _mix32(h: torch.Tensor) -> torch.Tensor:
    """A bijective scramble of 32 bits held in int64 (constants: C. Wellons, "lowbias32")."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)
