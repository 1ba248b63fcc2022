"""Rows of several models as one: log-probs, and weighted sums with gates, in fp32.

Three implementations of one interface: `TorchRows` is the specification and serves everywhere; `KernelRows`, on CPUs,
and `DeviceRows`, on GPUs, read each row where the forward left it and write nothing but the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from decoding.host_build import load_kernels
from decoding.truncate import kernel_edges, top_p_mask

if TYPE_CHECKING:
    from decoding.device_mix import DeviceRows

Track = tuple[torch.Tensor, list[int]]  # logits [R, V] of a model's forward, and which n of its rows
OUTSIDE = {"base": 0, "of": 1, "drop": 2}  # as host_mix.cpp numbers them


@dataclass(frozen=True, slots=True)
class Gating:
    """Where a term counts: in the top-p set of track `of`, with a top_p for each of the n rows.

    The other tokens keep the sum of the ungated terms ("base"), track `of`'s row ("of"), or nothing ("drop").
    """

    of: int
    top_p: tuple[float, ...]
    outside: Literal["base", "of", "drop"]


class TorchRows:
    """Rows of T tracks, cut to `width`; log-probs if `logprobs`, else logits."""

    def __init__(self, tracks: Sequence[Track], width: int, logprobs: bool) -> None:
        self._rows: list[torch.Tensor] = []
        for logits, index in tracks:
            row = logits if index == list(range(logits.shape[0])) else logits[torch.tensor(index, device=logits.device)]
            row = row[:, :width].float()  # [n, width]
            self._rows.append(torch.log_softmax(row, 1) if logprobs else row)

    def rows(self, t: int) -> torch.Tensor:
        """Track t's rows: [n, width] fp32, not to be written to."""
        return self._rows[t]

    def mix(self, tracks: Sequence[int], weights: torch.Tensor, gatings: Sequence[Gating | None]) -> torch.Tensor:
        """sum_j weights[:, j] rows(tracks[j]), gated terms after the others: [n, width] fp32, finite or -inf.

        weights: [n, J]. A weight of 0 leaves its term out (0 * inf is nan).
        """
        total = torch.zeros_like(self._rows[0])  # [n, width]
        closed: torch.Tensor | None = None  # [n, width] bool
        before: Gating | None = None
        for j in gates_together(gatings):
            gating, row, column = gatings[j], self._rows[tracks[j]], weights[:, j : j + 1]
            if gating is not None and gating != before:
                before, of = gating, self._rows[gating.of]
                closed = ~top_p_mask(of, gating.top_p)
                if gating.outside == "drop":
                    total.masked_fill_(closed, -torch.inf)
                elif gating.outside == "of":
                    total = torch.where(closed, of, total)
            if bool((column == 0).any()):
                row = row.masked_fill(column == 0, 0.0)
            total.addcmul_(row if closed is None else row.masked_fill(closed, 0.0), column)
        return total.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


class KernelRows:
    """The same, by kernels; equal up to rounding."""

    def __init__(self, tracks: Sequence[Track], width: int, logprobs: bool) -> None:
        self._logits, self._width = [logits for logits, _ in tracks], width
        self._index = torch.tensor([index for _, index in tracks])  # [T, n]
        if logprobs:
            normalisers = torch.ops.trimtab.log_normalisers
            self._shifts = torch.stack([normalisers(x, i, width) for x, i in zip(self._logits, self._index)])  # [T, n]
        else:
            self._shifts = torch.zeros(self._index.shape)
        self._plain: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, tracks: Sequence[Track], width: int, logprobs: bool) -> KernelRows | None:
        """None where the kernels do not apply: other devices and dtypes, no compiler."""
        for logits, _ in tracks:
            known = logits.dtype in (torch.float32, torch.bfloat16)
            if logits.device.type != "cpu" or not known or logits.stride(1) != 1:
                return None
        return cls(tracks, width, logprobs) if load_kernels() else None

    def rows(self, t: int) -> torch.Tensor:
        """Track t's rows: [n, width] fp32, not to be written to. What is not finite is -inf."""
        if t not in self._plain:
            self._plain[t] = self.mix([t], torch.ones(self._index.shape[1], 1), [None])
        return self._plain[t]

    def mix(self, tracks: Sequence[int], weights: torch.Tensor, gatings: Sequence[Gating | None]) -> torch.Tensor:
        """See `TorchRows.mix`."""
        order = gates_together(gatings)
        gates = list(dict.fromkeys(gating for j in order if (gating := gatings[j]) is not None))
        n = self._index.shape[1]
        least, last = torch.empty(len(gates), n), torch.empty(len(gates), n, dtype=torch.int64)
        for g, gate in enumerate(gates):
            logits, index = self._logits[gate.of], self._index[gate.of]
            least[g], last[g] = kernel_edges(logits, index, self._width, [0] * n, gate.top_p, [0.0] * n)
        return torch.ops.trimtab.mix_rows(  # type: ignore[no-any-return]
            self._logits,
            self._index,
            self._width,
            self._shifts,
            (weights if order == list(range(len(order))) else weights[:, order]).float().contiguous(),
            [tracks[j] for j in order],
            [-1 if (gating := gatings[j]) is None else gates.index(gating) for j in order],
            [gate.of for gate in gates],
            [OUTSIDE[gate.outside] for gate in gates],
            least,
            last,
        )


def rows_together(
    tracks: Sequence[Track], width: int, logprobs: bool, kernel: bool | None
) -> TorchRows | KernelRows | DeviceRows:
    """By the code that applies; kernel: see `decoding.mix.mix`."""
    if kernel is not None:
        from decoding.device_mix import DeviceRows  # needs triton

        return DeviceRows(tracks, width, logprobs, kernel)
    return KernelRows.of(tracks, width, logprobs) or TorchRows(tracks, width, logprobs)


def gates_together(gatings: Sequence[Gating | None]) -> list[int]:
    """The terms in the order in which they are summed: ungated ones, then gate by gate, as the gates first appear."""
    first = list(dict.fromkeys([None, *gatings]))
    return sorted(range(len(gatings)), key=lambda j: first.index(gatings[j]))
