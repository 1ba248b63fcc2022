"""Log-probs of chosen tokens, and of the best ones beside them, by the GPU's kernels: one download for all of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from decoding.download import Download
from triton_kernels.top_logprobs import MOST, top_logprobs

Tensor = torch.Tensor


class LogProbs:
    """Of rows `index` [n] of `source` [R, W]: the log-prob of a token each, and the `counts` best tokens with theirs.

    lse [n] fp32: the rows' log-normalisers; tokens [n]. kernel: as `triton_kernels` takes it.
    """

    def __init__(
        self,
        down: Download,
        source: Tensor,
        index: Tensor,
        lse: Tensor,
        tokens: Tensor,
        counts: Seq[int],
        kernel: bool | None,
    ) -> None:
        self._counts, width = counts, source.shape[1]
        most = min(max(counts), width)
        found = top_logprobs(source, index, width, lse, tokens, most, kernel=kernel if most <= MOST else False)
        self._chosen, self._ids, self._values = (down.want(x) for x in found)

    def entries(self) -> list[tuple[float, list[tuple[int, float]]]]:
        """The chosen token's log-prob, and the best tokens with theirs, best first: of each row, once fetched."""
        best = zip(self._ids().tolist(), self._values().tolist(), strict=True)
        rows = zip(self._chosen().tolist(), best, self._counts, strict=True)
        return [(own, list(zip(ids[:count], values[:count]))) for own, (ids, values), count in rows]
