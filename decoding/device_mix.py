"""`combine.TorchRows` by the kernels of `triton_kernels`: rows are read where the forwards left them, nothing waits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from decoding.combine import OUTSIDE, Gating, Track
from decoding.device_process import bits_of, edits_of
from decoding.sampling import Position
from decoding.upload import uploaded
from triton_kernels.cutoffs import cutoffs
from triton_kernels.mix import Gates, mix
from triton_kernels.row_stats import row_stats

Tensor = torch.Tensor


class DeviceRows:
    """Rows of T tracks, cut to `width`; log-probs if `logprobs`, else logits. kernel: as `triton_kernels` takes it."""

    def __init__(self, tracks: Sequence[Track], width: int, logprobs: bool, kernel: bool) -> None:
        self._logits, self._width, self._kernel = [logits for logits, _ in tracks], width, kernel
        self._index = uploaded([index for _, index in tracks], self._logits[0].device, torch.int32)  # [T, n]
        self._shifts: Tensor | None = None
        if logprobs:
            stats = [row_stats(x, i, width, kernel=kernel)[1] for x, i in zip(self._logits, self._index, strict=True)]
            self._shifts = torch.stack(stats)  # [T, n]
        self._plain: dict[int, Tensor] = {}

    def rows(self, t: int) -> Tensor:
        """Track t's rows: [n, width] fp32, not to be written to. What is not finite is -inf."""
        if t not in self._plain:
            ones = torch.ones(self._index.shape[1], 1, device=self._index.device)
            self._plain[t] = self.mix([t], ones, [None])[0]
        return self._plain[t]

    def mix(
        self,
        tracks: Sequence[int],
        weights: Tensor,
        gatings: Sequence[Gating | None],
        floor: tuple[int, Sequence[float]] | None = None,
        masks: Sequence[Tensor | None] = (),
        places: Sequence[Position | None] = (),
        hide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(z, each row's maximum before masks and edits [n] fp32); see `TorchRows.mix`.

        floor: a track, and each row's least ratio to its best token.
        masks: each row's allowed tokens [W] bool, None for all; hide: they are applied, else the floor alone looks at
        them. places: whose penalties and bias are applied to each row, None for none.
        """
        logs, device = None, weights.device
        if floor is not None:
            ratios = [math.log(ratio) if ratio > 0 else -math.inf for ratio in floor[1]]
            logs = (floor[0], uploaded(ratios, device, torch.float32))
        bits, mask_of = bits_of(masks, self._width, device)
        gates = list(dict.fromkeys(gating for gating in gatings if gating is not None))
        cuts = [self._cut(gate) for gate in gates]
        found = mix(
            self._logits,
            self._index,
            self._width,
            weights.float(),
            tracks,
            self._shifts,
            [-1 if gating is None else gates.index(gating) for gating in gatings],
            Gates(
                [gate.of for gate in gates],
                [OUTSIDE[gate.outside] for gate in gates],
                torch.stack([least for least, _ in cuts]),
                torch.stack([last for _, last in cuts]),
            )
            if gates
            else None,
            logs,
            bits,
            mask_of,
            edits_of(places, device),
            hide,
            kernel=self._kernel,
        )
        return found.z, found.policy_best

    def _cut(self, gate: Gating) -> tuple[Tensor, Tensor]:
        index = self._index[gate.of]
        ones, none = torch.ones(len(index), device=index.device), torch.zeros_like(index)
        top_p = uploaded(gate.top_p, index.device, torch.float32)
        logits = self._logits[gate.of]
        cut = cutoffs(logits, index, self._width, ones, none, top_p, torch.zeros_like(ones), kernel=self._kernel)
        return cut.least, cut.last
