"""What losses behind a language model's head share: logits of a few rows at a time, in one buffer, and their gradients.

    logits = hidden W^T + bias,  d hidden = d logits W,  d W = d logits^T hidden,  d bias = sum of d logits

The products are torch's. For bf16 and fp16 the sums over chunks (d W, d bias) are kept in fp32: with many chunks, a sum
in bf16 would stand still.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor

CHUNK = 1024  # rows: products that are large enough for a GPU, and 0.3 GB of bf16 logits for 152k tokens


def check_head(what: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> None:
    """Raises ValueError if hidden [N, D], weight [V, D] and bias [V] do not fit, or no row fits a chunk."""
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [tuple(each.shape) for each in (hidden, weight, bias) if each is not None]
        raise ValueError(f"{what}: hidden [N, D], weight [V, D] and bias [V] do not fit: {shapes}")
    if chunk < 1:
        raise ValueError(f"{what}: a chunk holds at least one row, not {chunk}")


def logits_of(buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [C, D] -> logits [C, V], the first rows of `buffer`."""
    rows = buffer[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=rows)
    return torch.addmm(bias, hidden, weight.t(), out=rows)


@dataclass(slots=True)
class Gradients:
    """Of a head; None where not wanted. hidden [N, D] in its dtype, weight [V, D] and bias [V] in fp32 or wider."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Gradients:
        """For `wanted` of hidden, weight, bias."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return cls(
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=wide) if wanted[1] else None,
            torch.zeros_like(weight[:, 0], dtype=wide) if wanted[2] else None,
        )

    def add(self, start: int, slope: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """The share of rows `start`..: slope [C, V] = d logits, hidden [C, D], weight [V, D]."""
        if self.hidden is not None:
            torch.mm(slope, weight, out=self.hidden[start : start + len(slope)])
        if self.weight is not None:
            if slope.dtype == self.weight.dtype:
                self.weight.addmm_(slope.t(), hidden)
            else:
                self.weight += slope.t() @ hidden
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.bias.dtype)
