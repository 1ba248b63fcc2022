"""How many tokens to draft: from measured acceptance and measured cost, per sequence and aware of the batch.

A tick with k drafts costs k draft steps and one pass of the policy over k + 1 rows a sequence; it gives
1 + a + .. + a^k tokens when each draft passes with probability a. Of all k, the one with the most tokens a second is
taken: 0 where drafting does not pay, as in a batch that already keeps the machine busy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from decoding.core import DraftStats
from decoding.state import Sequence as Hypothesis

MAX_TOKENS = 16  # what `auto` goes up to
PRIOR = 0.5  # acceptance that is assumed of a pair before anything is known
STRENGTH = 2.0  # drafts that this assumption counts for
MEMORY = 0.9  # weight of older passes in a sequence's own acceptance
SHARED_MEMORY = 0.98  # the same for a pair of drafter and model
REACH = 0.1  # a draft that is reached less often than this is not worth its row
GAIN = 1.02  # drafting must promise at least this much: estimates are not that good
PROBE = 2  # drafts of a trial
PATIENCE = 32  # ticks after which a pair that did not pay is tried again; doubles up to MAX_PATIENCE
MAX_PATIENCE = 1024


class Clock:
    """Measured seconds of an operation by its size, and estimates for sizes in between.

    The least of the last few measurements counts: what disturbs only makes things slower.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, dict[int, deque[float]]] = {}

    def saw(self, what: Hashable, size: int, seconds: float) -> None:
        """`what` took that long at this size."""
        self._seen.setdefault(what, {}).setdefault(size, deque(maxlen=4)).append(seconds)

    def estimate(self, what: Hashable, size: int) -> float:
        """Seconds at `size`: between measured sizes a straight line, beyond the largest one what it took.

        So what was never tried looks cheap, is tried, and is known then. 0 if nothing was measured.
        """
        points = self._seen.get(what)
        if not points or size <= 0:
            return 0.0
        below = max((s for s in points if s <= size), default=None)
        above = min((s for s in points if s >= size), default=None)
        if below is None or above is None or below == above:
            return min(points[above if below is None else below])  # type: ignore[index]
        low, high = min(points[below]), min(points[above])
        return low + (high - low) * (size - below) / (above - below)


@dataclass(slots=True)
class Pair:
    """What is known of a proposer for a model: decayed counts, patience after it did not pay, counts by position."""

    hits: float = 0.0
    misses: float = 0.0
    idle: int = 0
    patience: int = PATIENCE
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Estimated chance that a draft whose forerunners passed passes too."""
        return (self.hits + STRENGTH * PRIOR) / (self.hits + self.misses + STRENGTH)


class Pace:
    """Sets `wanted` of every draft before a tick, and learns from what was accepted."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pairs: dict[tuple[str, str, str], Pair] = {}

    def assign(self, running: Sequence[Hypothesis]) -> None:
        """How many tokens each sequence should draft next."""
        adaptive: list[Hypothesis] = []
        for sequence in running:
            draft = sequence.draft
            if draft is None or draft.broken:
                if draft is not None:
                    draft.wanted = 0
                continue
            if draft.spec.tokens == "auto":
                draft.wanted = 0
                if draft.lookup is None or draft.lookup.propose(1):
                    adaptive.append(sequence)
            else:
                draft.wanted = draft.spec.tokens
            if draft.lookup is not None:
                draft.wanted = min(draft.wanted, len(draft.lookup.propose(draft.wanted)))
        if adaptive:
            self._adapt(adaptive, running)

    def learn(self, sequence: Hypothesis, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` tokens passed, in a pass of `sequence`."""
        draft = sequence.draft
        assert draft is not None
        pair = self._pair(sequence)
        draft.probing = False
        missed = accepted < drafted
        draft.hits, draft.misses = draft.hits * MEMORY + accepted, draft.misses * MEMORY + missed
        pair.hits, pair.misses = pair.hits * SHARED_MEMORY + accepted, pair.misses * SHARED_MEMORY + missed
        for counts, reached in ((pair.drafted, drafted), (pair.accepted, accepted)):
            counts += [0] * (drafted - len(counts))
            for i in range(reached):
                counts[i] += 1

    def stats(self) -> tuple[DraftStats, ...]:
        """Counts by proposer and model since start."""
        merged: dict[tuple[str, str], Pair] = {}
        for (draft, target, _), pair in self._pairs.items():
            total = merged.setdefault((draft, target), Pair())
            for mine, more in ((total.drafted, pair.drafted), (total.accepted, pair.accepted)):
                mine += [0] * (len(more) - len(mine))
                for i, count in enumerate(more):
                    mine[i] += count
        return tuple(DraftStats(*key, tuple(p.drafted), tuple(p.accepted)) for key, p in merged.items())

    def _pair(self, sequence: Hypothesis) -> Pair:
        spec = sequence.draft.spec if sequence.draft else None
        assert spec is not None
        key = (spec.draft, sequence.tracks[0].model, spec.accept or "rejection")
        return self._pairs.setdefault(key, Pair())

    def _acceptance(self, sequence: Hypothesis) -> float:
        """The sequence's own acceptance, leaning on its pair's while it has drafted little."""
        draft = sequence.draft
        assert draft is not None
        shared = self._pair(sequence).acceptance
        return (draft.hits + STRENGTH * shared) / (draft.hits + draft.misses + STRENGTH)

    def _adapt(self, adaptive: Sequence[Hypothesis], running: Sequence[Hypothesis]) -> None:
        rates = {id(s): self._acceptance(s) for s in adaptive}
        reach = {key: MAX_TOKENS if a >= 1 else max(1, int(math.log(REACH) / math.log(a))) for key, a in rates.items()}
        decoding = [s for s in running if s.next_row == len(s.output) - 1]
        cost = self._costs(decoding)
        best, best_rate = 0, len(decoding) / max(cost(0, reach), 1e-9) * GAIN
        for level in range(1, MAX_TOKENS + 1):
            gain = sum(_expected(rates[id(s)], min(level, reach[id(s)])) - 1 for s in adaptive)
            rate = (len(decoding) + gain) / max(cost(level, reach), 1e-9)
            if rate > best_rate:
                best, best_rate = level, rate
        for sequence in adaptive:
            draft = sequence.draft
            assert draft is not None
            draft.wanted = max(min(best, reach[id(sequence)]), PROBE if draft.probing else 0)
        self._try_again(adaptive)
        for sequence in adaptive:
            draft = sequence.draft
            assert draft is not None
            if draft.lookup is not None:
                draft.wanted = len(draft.lookup.propose(draft.wanted))

    def _try_again(self, adaptive: Sequence[Hypothesis]) -> None:
        """A pair that does not pay is given another chance now and then, in one sequence, more and more rarely."""
        members: dict[int, list[Hypothesis]] = {}
        for sequence in adaptive:
            members.setdefault(id(self._pair(sequence)), []).append(sequence)
        for sequences in members.values():
            pair = self._pair(sequences[0])
            drafts = [s.draft for s in sequences if s.draft]
            if any(draft.probing for draft in drafts):
                continue
            if any(draft.wanted for draft in drafts):
                pair.idle, pair.patience = 0, PATIENCE
                continue
            pair.idle += 1
            if pair.idle >= pair.patience:
                drafts[0].wanted, drafts[0].probing = PROBE, True
                pair.idle, pair.patience = 0, min(2 * pair.patience, MAX_PATIENCE)

    def _costs(self, decoding: Sequence[Hypothesis]) -> Callable[[int, Mapping[int, int]], float]:
        """Seconds of a tick whose adaptive sequences draft up to a level."""
        clock = self._clock

        def seconds(level: int, reach: Mapping[int, int]) -> float:
            tokens: dict[str, int] = {}
            rows = 0
            steps: dict[tuple[str, int], int] = {}
            for sequence in decoding:
                mine = min(level, reach.get(id(sequence), 0))
                draft = sequence.draft
                role = draft.role if draft and mine else None
                rows += mine + 1
                for j, track in enumerate(sequence.tracks):
                    tokens[track.model] = tokens.get(track.model, 0) + (1 if j == role else mine + 1)
                if draft and draft.track:
                    for step in range(mine):
                        key = (draft.track.model, step)
                        steps[key] = steps.get(key, 0) + 1
            spent = sum(clock.estimate(("draft", model), count) for (model, _), count in steps.items())
            spent += sum(clock.estimate(("forward", model), count) for model, count in tokens.items())
            return spent + clock.estimate("decide", rows)

        return seconds


def _expected(acceptance: float, count: int) -> float:
    """Tokens a pass gives with `count` drafts: 1 + a + .. + a^count."""
    return count + 1.0 if acceptance >= 1 else (1 - acceptance ** (count + 1)) / (1 - acceptance)
