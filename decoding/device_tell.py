"""`tell` on the device: whatever the samples' rows are asked, a few launches, and no wait but the tick's own."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from decoding.device_logprobs import LogProbs
from decoding.download import Download
from decoding.events import TokenLogprob
from decoding.plan import Sample
from decoding.sampling import Position, hard_mask
from decoding.state import Goal, Group, Sequence, Told
from decoding.tell import Asked, fed_asked, goals_asked, possible, prompts_asked
from decoding.upload import upload
from triton_kernels.row_stats import row_stats

Tensor = torch.Tensor


class _Rows:
    """Rows of z, each with a token and how many of the best tokens are wanted. masks: what these are chosen among."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int]] = []
        self._counts: list[int] = []
        self._masks: list[Tensor] = []
        self._found: LogProbs | None = None

    def add(self, row: int, token: int = 0, count: int = 0, mask: Tensor | None = None) -> int:
        """Its place among the entries. All rows have a mask [w] bool, or none has."""
        self._rows.append((row, token))
        self._counts.append(count)
        self._masks += [] if mask is None else [mask]
        return len(self._rows) - 1

    def look(self, z: Tensor, down: Download, kernel: bool) -> None:
        """Have everything computed from z [S, W] as it is now."""
        if not self._rows:
            return
        index, tokens = upload(torch.tensor(self._rows).T.contiguous(), z.device)
        _, lse = row_stats(z, index, z.shape[1], kernel=kernel)
        if self._masks:
            pad = torch.nn.functional.pad
            allowed = torch.stack([pad(mask, (0, z.shape[1] - len(mask))) for mask in self._masks])
            z, index = z[index].masked_fill_(~allowed, -torch.inf), torch.arange(len(index), device=z.device)
        self._found = LogProbs(down, z, index, lse, tokens, self._counts, kernel)

    def entries(self) -> list[tuple[float, list[tuple[int, float]]]]:
        """See `LogProbs.entries`."""
        return [] if self._found is None else self._found.entries()


class Tellings:
    """What samples' rows z [S, W] are asked, computed before the processors edit them, told when `down` has fetched."""

    def __init__(self, samples: Seq[Sample], z: Tensor, down: Download, kernel: bool) -> None:
        self._plain, self._best, self._masked = _Rows(), _Rows(), _Rows()
        self._prompts = [(each, self._add(each)) for each in prompts_asked(samples)]
        self._fed = [(each, self._add(each)) for each in fed_asked(samples)]
        self._goals: list[tuple[Sequence, list[int], _Rows, int | None]] = []
        for sequence, goal, row in goals_asked(samples):
            choices = [self._plain.add(row, token) for token in goal.choices]
            self._goals.append((sequence, choices, *self._add_top(sequence, goal, row, z.device)))
        for rows in (self._plain, self._best, self._masked):
            rows.look(z, down, kernel)

    def _add(self, asked: Asked) -> list[int]:
        rows = self._best if asked.top else self._plain
        return [rows.add(row, token, asked.top) for row, token in zip(asked.rows, asked.tokens, strict=True)]

    def _add_top(self, sequence: Sequence, goal: Goal, row: int, device: torch.device) -> tuple[_Rows, int | None]:
        if not goal.top:
            return self._best, None
        mask = hard_mask(Position(sequence), sequence.group.width, device)
        rows = self._best if mask is None else self._masked
        return rows, rows.add(row, count=goal.top, mask=mask)

    def told(self) -> tuple[list[tuple[Group, list[TokenLogprob]]], dict[Sequence, list[float]], dict[Sequence, Told]]:
        """What `tell.score_prompts`, `tell.score_fed` and `tell.tell_goals` give."""
        entries = {rows: rows.entries() for rows in (self._plain, self._best, self._masked)}
        plain, scored = entries[self._plain], list[tuple[Group, list[TokenLogprob]]]()
        for each, places in self._prompts:
            own = [entries[self._best if each.top else self._plain][at] for at in places]
            told = [TokenLogprob(token, lp, tuple(top)) for token, (lp, top) in zip(each.tokens, own, strict=True)]
            scored.append((each.sequence.group, told))
        fed = {each.sequence: [plain[at][0] for at in places] for each, places in self._fed}
        goals = {
            sequence: Told([] if at is None else possible(entries[rows][at][1]), [plain[c][0] for c in choices])
            for sequence, choices, rows, at in self._goals
        }
        return scored, fed, goals
