"""How rows are drawn from, as the GPU's kernels take it: two copies to the device, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.noise import Lane, key_halves
from decoding.sampling import Position
from decoding.upload import upload, uploaded

Tensor = torch.Tensor
_NO_K = (1 << 31) - 1


@dataclass(slots=True)
class DrawParams:
    """Of n rows: temperature, top_p, min_p [n] fp32; top_k [n] int32; keys [n, 2] int32 of their noise.

    more: columns [n] int32 that went up beside them.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    keys: Tensor
    more: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        places: Seq[Position],
        lanes: Seq[Lane],
        generator: torch.Generator,
        device: torch.device,
        *more: Seq[int],
    ) -> DrawParams:
        """A lane of noise for each place. Rows of requests without a seed get keys out of `generator`."""
        drawn = [at.sampling for at in places]
        real = uploaded([[p.temperature, p.top_p, p.min_p] for p in drawn], device, torch.float32)
        seeded = [at.sequence.group.seed is not None for at in places]
        halves = [key_halves(at.key(lane)) if own else (0, 0) for at, lane, own in zip(places, lanes, seeded)]
        columns = [[min(p.top_k, _NO_K) for p in drawn], seeded, *zip(*halves, strict=True), *more]
        top_k, keyed, low, high, *rest = upload(torch.tensor(columns, dtype=torch.int32), device)
        keys = torch.stack([low, high], 1)
        if not all(seeded):
            fresh = torch.randint(-(1 << 31), 1 << 31, keys.shape, generator=generator, device=device)
            keys = torch.where(keyed[:, None] > 0, keys, fresh.int())
        temperature, top_p, min_p = (column.contiguous() for column in real.unbind(1))
        return cls(temperature, top_p, min_p, top_k, keys, tuple(rest))

    @property
    def limits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `cutoffs` takes them."""
        return self.temperature, self.top_k, self.top_p, self.min_p
