"""What all kernels share: where they run, and block sizes."""

from __future__ import annotations

import torch


def on_kernel(x: torch.Tensor, kernel: bool | None) -> bool:
    """Whether an operation on `x` goes to its kernel: on CUDA, unless `kernel` says otherwise."""
    return x.is_cuda if kernel is None else kernel


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: sizes of Triton's blocks."""
    return max(least, 1 << max(0, n - 1).bit_length())
