"""What a case of `benchmarks.kernels` is: a kernel at a shape, its reference, and the bytes that it moves.

Shapes are those of an 8B Llama (hidden 4096, feed-forward 14336, 32 heads of 128, 8 KV heads, vocabulary 128256) and of
an engine's batches; `QUICK` ones are tiny. Bytes are those that the kernel's docstring states, with every pass over the
data counted, so what a cache serves can bring a time below what they take from memory. Where products outweigh them
there are none, and only the comparison with the reference says something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
Inputs = tuple[Any, ...]
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape. `make` draws the inputs on a device; `call` and `reference` take them.

    bytes: what the docstring says is moved; None where products outweigh it. Both calls return tensors
    that can be compared.
    """

    kernel: str
    shape: str
    make: Callable[[torch.device], Inputs]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of the model and of the batches."""

    rows: Sequence[int]
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    prefill: int
    dtype: torch.dtype


FULL = Dims((1, 16, 64), 4096, 14336, 32, 8, 128, 128_256, 2048, 1024, torch.bfloat16)
QUICK = Dims((1, 3), 64, 96, 4, 2, 16, 300, 40, 70, torch.float32)  # the interpreter's products take bf16 for integers


def drawn(d: Dims, device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal numbers, of the cases' dtype unless another is given."""
    return torch.randn(*shape, device=device).to(dtype or d.dtype)


def index(device: torch.device, tracks: int, rows: int) -> Tensor:
    """Row i of each track is its i-th: [tracks, rows]."""
    return torch.arange(rows, dtype=torch.int32, device=device).repeat(tracks, 1)
