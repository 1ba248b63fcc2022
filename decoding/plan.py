"""The plan of one tick: which positions of which tracks are computed, and which rows are mixed and sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from decoding.state import Sequence, Track


@dataclass(slots=True, eq=False)
class Span:
    """Positions `start .. start + count` of one track to be computed in this tick; the last `rows` give logits.

    marks: of a scorer's text, the positions whose rows are wanted instead. place: where its first row is in its
    model's `Rows` of this tick, set by `Plan.pack`.
    """

    sequence: Sequence
    track: Track
    start: int
    count: int
    rows: int
    marks: Seq[int] = ()
    place: int = -1

    @property
    def offsets(self) -> Seq[int]:
        """Which of its positions give rows, counted from its start."""
        if self.marks:
            return [mark - self.start for mark in self.marks]
        return range(self.count - self.rows, self.count)


@dataclass(slots=True)
class Sample:
    """Rows of one sequence in this tick: `count` mixed rows from shared position `first` on, one span per track.

    `offsets[j]` is the first row of track j in its model's `Rows` of this tick, set by `Plan.pack`. `drafts`: how many
    of the rows, the last ones, follow a drafted token.
    """

    sequence: Sequence
    first: int
    count: int
    spans: list[Span]
    offsets: list[int] = field(default_factory=list)
    drafts: int = 0

    @property
    def ends(self) -> bool:
        """Whether its last rows predict the next token (others score the prompt, or what was fed)."""
        return self.first + self.count - self.drafts == len(self.sequence.output)

    @property
    def draws(self) -> bool:
        """Whether its last rows are drawn from."""
        return self.ends and self.sequence.draws

    def token_after(self, i: int) -> int | None:
        """The token that follows its i-th row, if that is part of the output or a draft."""
        at, output = self.first + i + 1, self.sequence.output
        if 0 <= at < len(output):
            return output[at]
        drafts = self.sequence.draft.tokens if self.sequence.draft else []
        return drafts[at - len(output)] if 0 <= at - len(output) < len(drafts) else None


@dataclass(slots=True)
class Plan:
    """One tick: spans per model, in packing order, and the rows that are mixed and sampled.

    tokens, rows, search: what is left of its budgets, tokens in units of the dearest model's; `search` is the part that
    hypotheses of searches and their scorers may take.
    """

    tick: int = 0
    tokens: float = 0.0
    rows: int = 0
    search: float = math.inf
    spans: dict[str, list[Span]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    pending: dict[str, set[bytes]] = field(default_factory=dict)  # prefix keys that this tick computes, per model
    drafting: list[Sequence] = field(default_factory=list)

    def put(self, span: Span, price: float) -> None:
        """Compute `span` in this tick."""
        self.spans.setdefault(span.track.model, []).append(span)
        self.tokens -= span.count * price
        self.rows -= span.rows

    def searched(self, price: float) -> int:
        """How many tokens of a search at `price` there is room for: one at least as long as anything is left."""
        if self.search <= 0.0:
            return 0
        return max(1, int(min(self.search, 1e9) / price))

    def pack(self) -> None:
        """Settle the rows' places: drafts may be fewer than planned, and a drafting role has computed some already."""
        for sample in self.samples:
            draft = sample.sequence.draft
            made = len(draft.tokens) if draft else 0
            for span in sample.spans:
                span.count -= sample.drafts - made
                span.rows -= sample.drafts - made
                if draft and span.track is draft.track and draft.rows:
                    span.start, span.count, span.rows = span.start + span.count - 1, 1, 1
            sample.count -= sample.drafts - made
            sample.drafts = made
        for spans in self.spans.values():
            row = 0
            for span in spans:
                span.place = row
                row += span.rows
        for sample in self.samples:
            sample.offsets = [span.place for span in sample.spans]
