"""What changes while a request runs: tracks, sequences, groups. Inside the engine only."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.core import Constraint, Policy, Request, Sampling, Speculation
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


@dataclass(slots=True)
class Budget:
    """What is left of something that may be used up; None is without end."""

    left: int | None = None

    def take(self, count: int = 1) -> int:
        """Use up to `count`; how many there were."""
        if self.left is None:
            return count
        taken = min(count, self.left)
        self.left -= taken
        return taken


@dataclass(slots=True)
class Told:
    """What a goal wants to know of a row: the likeliest tokens with log-probs, best first; log-probs of its choices."""

    top: list[tuple[int, float]]
    choices: list[float]


@dataclass(slots=True, eq=False)
class Goal:
    """What a search wants of a hypothesis next; afterwards it rests, and keeps what it has computed.

    draws: tokens, until the output has `length` of them, holds `separator` in what was added, or ends; each is taken
    from `budget`. row: whether the row that predicts the next token is wanted, which drawing needs anyway; of that row
    (the first one, of several) the `top` likeliest tokens and those of `choices` are told with their log-probs. Tokens
    of the output at `next_row` and behind, which were fed, are told with theirs in any case.
    """

    draws: bool = False
    row: bool = False
    length: int | None = None
    separator: str | None = None
    budget: Budget = field(default_factory=Budget)
    top: int = 0
    choices: Seq[int] = ()
    tail: str = ""
    ended: bool = False
    told: Told | None = None
    fed: list[float] = field(default_factory=list)

    def sees(self, piece: str) -> bool:
        """`piece` was added; whether the separator is complete with it."""
        if self.separator is None:
            return False
        text = self.tail + piece
        self.tail = text[len(text) - len(self.separator) + 1 :] if len(self.separator) > 1 else ""
        return self.separator in text


@dataclass(slots=True, eq=False)
class Sequence:
    """One hypothesis: the unit that is admitted, preempted and freed. All its tracks share `output`.

    `next_row` counts on the shared axis where 0 is the first output token and -1 the last prompt position; it is the
    first position whose mixed row is still wanted (the row at position r predicts the token at r + 1). `sampling`: how
    its tokens are drawn now. `goal`: what a search wants of it, None for a hypothesis that goes on to its end.
    """

    group: Group
    index: int
    path: tuple[int, ...]
    tracks: list[Track]
    text: OutputText
    sampling: Sampling
    next_row: int = -1
    goal: Goal | None = None
    output: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)  # of output ids, for the penalties
    solver_state: Any = None
    draft: Draft | None = None
    constraint: Constraint | None = None
    running: bool = False
    finished: bool = False
    recomputes: bool = False  # its blocks were taken from it: what the prefix cache holds of it may be its own
    last_tick: int = -1

    @property
    def order(self) -> tuple[float, int, int]:
        """Age: the smaller, the earlier it is served and the later it is preempted."""
        return (self.group.request.arrival, self.group.serial, self.index)

    @property
    def rows_wanted(self) -> int:
        """Rows from `next_row` to the one that predicts the next token (which `max_tokens` 0 does not want)."""
        return len(self.output) - self.next_row - (not self.wants_next)

    @property
    def wants_next(self) -> bool:
        """Whether the row that predicts the next token is wanted."""
        return self.group.max_output > 0 if self.goal is None else self.goal.row or self.goal.draws

    @property
    def draws(self) -> bool:
        """Whether it is going to be longer."""
        return self.group.max_output > 0 if self.goal is None else self.goal.draws

    @property
    def all_tracks(self) -> list[Track]:
        """The policy's tracks, and the drafter's if it has one of its own."""
        own = self.draft.own if self.draft else None
        return self.tracks if own is None else [*self.tracks, own]

    @property
    def most_output(self) -> int:
        """Tokens that its output may have when its goal is reached."""
        most, goal = self.group.max_output, self.goal
        return most if goal is None or goal.length is None else min(most, goal.length)

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

    def hittable(self, track: Track) -> int:
        """Positions of `track` that may come from the prefix cache."""
        return self.target(track)

    @property
    def begins(self) -> bool:
        """Whether nothing was drawn or read yet: what the prefix cache holds of it is not what it computed itself."""
        return self.next_row < 0

    def known(self, track: Track) -> int:
        """Positions of `track` whose ids are settled."""
        return len(track.prompt) + len(self.output)

    def settled(self, track: Track) -> int:
        """Positions of `track` that are worth keeping after a tick: a token that was just drawn is not computed."""
        return self.known(track) - self.draws


@dataclass(slots=True, eq=False)
class Stream(Sequence):
    """A text as a scorer reads it: one track, whose `output` are the ids of the text so far; nothing is drawn.

    marks: positions, ascending, whose rows are still wanted. read: (row, hidden state) of those that have been read;
    wants_hidden: whether hidden states are.
    """

    marks: list[int] = field(default_factory=list)
    read: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    wants_hidden: bool = False

    def target(self, track: Track) -> int:
        """Everything may be computed at any time."""
        return self.known(track)

    def hittable(self, track: Track) -> int:
        """What is wanted of a position is not in the cache."""
        return self.marks[0] if self.marks else self.known(track)

    @property
    def begins(self) -> bool:
        """Whether nothing of it was computed yet."""
        return self.last_tick < 0 and not self.read

    def settled(self, track: Track) -> int:
        """Nothing runs ahead."""
        return self.known(track)


@dataclass(slots=True, eq=False)
class Group:
    """A request inside the engine: its sequences and what it has cost so far.

    `seed` keys the noise: the request's own, or one drawn for a rule that needs keyed noise; None for none. `owner`: of
    what a search opens besides its request's own hypotheses, the request. `read`: tokens of the prompts and the texts
    for scorers that a search opened, `read_cached` those that were in the prefix cache.
    """

    request: Request
    serial: int
    policy: Policy  # without terms that count for nothing
    term_tracks: tuple[int, ...]  # the track of each term
    width: int  # of the mixed row: the model's own for one model, else the shared vocabulary
    max_output: int
    seed: int | None = None
    owner: Group | None = None
    sequences: list[Sequence] = field(default_factory=list)
    unforked: list[Sequence] = field(default_factory=list)  # wait for their root's prefill
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None once they are sent, or if nobody asks
    forwards: dict[str, int] = field(default_factory=dict)
    completion_tokens: int = 0
    cached_tokens: int = 0
    read: int = 0
    read_cached: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    last_tick: int = -1

    @property
    def payer(self) -> Group:
        """Whose turn it takes, and whose usage it counts as."""
        return self.owner or self
