"""What changes while a request runs: tracks, sequences, groups, and the plan of one tick. Inside the engine only."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from decoding.core import Policy, Request, TokenLogprob
from decoding.output import OutputText


@dataclass(slots=True, eq=False)
class Track:
    """A model looking at one hypothesis through one view: its own prompt, block table and progress.

    Terms of one model that are shown the same prompt share a track.

    Positions count from the prompt's first id; position `len(prompt) + i` is output token i. `keys` are the chained
    prefix-cache keys of the leading full blocks, made when first needed and kept over a preemption.
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

    def ids(self, track: Track, start: int, end: int) -> Seq[int]:
        """Ids at positions start .. end of `track`."""
        n = len(track.prompt)
        if start >= n:
            return self.output[start - n : end - n]
        if end <= n:
            return track.prompt[start:end]
        return [*track.prompt[start:], *self.output[: end - n]]

    def target(self, track: Track) -> int:
        """Absolute position of `next_row` in `track`: everything before it may be computed at any time."""
        return len(track.prompt) + self.next_row


@dataclass(slots=True, eq=False)
class Group:
    """A request inside the engine: its sequences and what it has cost so far."""

    request: Request
    serial: int
    policy: Policy  # without terms that count for nothing
    term_tracks: tuple[int, ...]  # the track of each term
    width: int  # of the mixed row: the model's own for one model, else the shared vocabulary
    max_output: int
    sequences: list[Sequence] = field(default_factory=list)
    unforked: list[Sequence] = field(default_factory=list)  # wait for their root's prefill
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None once they are sent, or if nobody asks
    forwards: dict[str, int] = field(default_factory=dict)
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    last_tick: int = -1


@dataclass(slots=True)
class Span:
    """Positions `start .. start + count` of one track to be computed in this tick; the last `rows` give logits."""

    sequence: Sequence
    track: Track
    start: int
    count: int
    rows: int


@dataclass(slots=True)
class Sample:
    """Rows of one sequence in this tick: `count` mixed rows from shared position `first` on.

    `offsets[j]` is the first row of track j in its model's `Rows` of this tick.
    """

    sequence: Sequence
    first: int
    count: int
    offsets: list[int]


@dataclass(slots=True)
class Plan:
    """One tick: spans per model, in packing order, and the rows that are mixed and sampled."""

    spans: dict[str, list[Span]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    pending: dict[str, set[bytes]] = field(default_factory=dict)  # prefix keys that this tick computes, per model
    tokens: float = 0.0  # budgets that are left; tokens in units of the dearest model's
    rows: int = 0
