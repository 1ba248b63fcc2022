"""What changes while a request runs: tracks, sequences, groups, and the plan of one tick. Inside the engine only."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.core import Constraint, Policy, Request, Speculation
from decoding.events import TokenLogprob
from decoding.lookup import Lookup
from decoding.output import OutputText


@dataclass(slots=True, eq=False)
class Track:
    """A model looking at one hypothesis through one view: its own prompt, block table and progress.

    Terms of one model that are shown the same prompt share a track.

    Positions count from the prompt's first id; position `len(prompt) + i` is output token i, and after the output come
    the tick's drafts. `keys` are the chained prefix-cache keys of the leading full blocks, made when first needed and
    kept over a preemption.
    """

    model: str
    prompt: tuple[int, ...]
    root: bytes
    adapter: str | None = None
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    keys: list[bytes] = field(default_factory=list)
    published: int = 0


@dataclass(slots=True, eq=False)
class Draft:
    """How one sequence drafts, and what it has drafted in this tick.

    track: the drafter's, None for a lookup. role: the index of the policy's track that it is, None for one of its own.
    confidence: the drafter's own probability of each draft. worth: the chance of passing, that of its forerunners
    included, which pays for the n-th draft.
    level: drafts a tick as the pace has decided; wanted: those that are asked for in this one; planned: those that its
    budgets and memory have room for.
    probs: each draft's distribution [W] that it was drawn from, empty where drafts are certain (greedy, lookups).
    bonus: whether a token of the policy follows drafts that were all accepted. broken: its model failed to draft.
    logprobs: the drafter's log-probs [W] at T = 1, of rules that compare models. rows: a role's own logits [V], which
    the mix uses too. masks: what the constraint allows before each draft and after the last.
    """

    spec: Speculation
    track: Track | None = None
    role: int | None = None
    lookup: Lookup | None = None
    bonus: bool = True
    level: int = 0
    wanted: int = 0
    worth: Seq[float] = ()
    planned: int = 0
    paused_until: int = -1
    probing: bool = False
    broken: bool = False
    tokens: list[int] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    reached: float = 1.0  # the chance that everything drafted so far passes
    hits: float = 0.0  # decayed counts of accepted drafts and of rejections, for the pace
    misses: float = 0.0

    @property
    def own(self) -> Track | None:
        """The track that is nobody else's."""
        return self.track if self.role is None else None

    def clear(self) -> None:
        """Forget the tick's drafts."""
        self.planned = 0
        self.tokens, self.probs, self.logprobs, self.rows, self.masks, self.confidence = [], [], [], [], [], []
        self.reached = 1.0


@dataclass(slots=True, eq=False)
class Sequence:
    """One hypothesis: the unit that is admitted, preempted and freed. All its tracks share `output`.

    `next_row` counts on the shared axis where 0 is the first output token and -1 the last prompt position; it is the
    first position whose mixed row is still wanted (the row at position r predicts the token at r + 1).
    """

    group: Group
    index: int
    path: tuple[int, ...]
    tracks: list[Track]
    text: OutputText
    next_row: int = -1
    output: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)  # of output ids, for the penalties
    solver_state: Any = None
    draft: Draft | None = None
    constraint: Constraint | None = None
    running: bool = False
    finished: bool = False
    last_tick: int = -1

    @property
    def order(self) -> tuple[float, int, int]:
        """Age: the smaller, the earlier it is served and the later it is preempted."""
        return (self.group.request.arrival, self.group.serial, self.index)

    @property
    def rows_wanted(self) -> int:
        """Rows from `next_row` to the one that predicts the next token (which `max_tokens` 0 does not want)."""
        return len(self.output) - self.next_row - (self.group.max_output == 0)

    @property
    def all_tracks(self) -> list[Track]:
        """The policy's tracks, and the drafter's if it has one of its own."""
        own = self.draft.own if self.draft else None
        return self.tracks if own is None else [*self.tracks, own]

    def ids(self, track: Track, start: int, end: int) -> Seq[int]:
        """Ids at positions start .. end of `track`."""
        n = len(track.prompt)
        if end <= n:
            return track.prompt[start:end]
        tail: Seq[int] = self.output
        if end > n + len(self.output) and self.draft:
            tail = [*self.output, *self.draft.tokens]
        if start >= n:
            return tail[start - n : end - n]
        return [*track.prompt[start:], *tail[: end - n]]

    def target(self, track: Track) -> int:
        """Absolute position of `next_row` in `track`: everything before it may be computed at any time."""
        return len(track.prompt) + self.next_row

    def known(self, track: Track) -> int:
        """Positions of `track` whose ids are settled."""
        return len(track.prompt) + len(self.output)


@dataclass(slots=True, eq=False)
class Group:
    """A request inside the engine: its sequences and what it has cost so far.

    `seed` keys the noise: the request's own, or one drawn for a rule that needs keyed noise; None for none.
    """

    request: Request
    serial: int
    policy: Policy  # without terms that count for nothing
    term_tracks: tuple[int, ...]  # the track of each term
    width: int  # of the mixed row: the model's own for one model, else the shared vocabulary
    max_output: int
    seed: int | None = None
    sequences: list[Sequence] = field(default_factory=list)
    unforked: list[Sequence] = field(default_factory=list)  # wait for their root's prefill
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None once they are sent, or if nobody asks
    forwards: dict[str, int] = field(default_factory=dict)
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    last_tick: int = -1


@dataclass(slots=True, eq=False)
class Span:
    """Positions `start .. start + count` of one track to be computed in this tick; the last `rows` give logits."""

    sequence: Sequence
    track: Track
    start: int
    count: int
    rows: int


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
    def draws(self) -> bool:
        """Whether its last rows predict the next token (others only score the prompt)."""
        ends = self.first + self.count - self.drafts == len(self.sequence.output)
        return ends and self.sequence.group.max_output > 0

    def token_after(self, i: int) -> int | None:
        """The token that follows its i-th row, if that is part of the output or a draft."""
        at, output = self.first + i + 1, self.sequence.output
        if 0 <= at < len(output):
            return output[at]
        drafts = self.sequence.draft.tokens if self.sequence.draft else []
        return drafts[at - len(output)] if 0 <= at - len(output) < len(drafts) else None


@dataclass(slots=True)
class Plan:
    """One tick: spans per model, in packing order, and the rows that are mixed and sampled."""

    spans: dict[str, list[Span]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    pending: dict[str, set[bytes]] = field(default_factory=dict)  # prefix keys that this tick computes, per model
    drafting: list[Sequence] = field(default_factory=list)
    tokens: float = 0.0  # budgets that are left; tokens in units of the dearest model's
    rows: int = 0

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
        place: dict[int, int] = {}
        for spans in self.spans.values():
            row = 0
            for span in spans:
                place[id(span)] = row
                row += span.rows
        for sample in self.samples:
            sample.offsets = [place[id(span)] for span in sample.spans]
