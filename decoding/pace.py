"""How many tokens to draft: from measured acceptance and measured cost, per sequence and aware of the batch.

A tick with k drafts costs k draft steps and one pass of the policy over k + 1 rows a sequence; it gives
1 + a + .. + a^k tokens when each draft passes with probability a. Of all k, the one with the most tokens a second is
taken: 0 where drafting does not pay, as in a batch that already keeps the machine busy.

Drafts are not equally likely to pass, and the drafter's own probability of a token tells which: how often drafts of
each confidence passed is counted, and a draft ends where the next token would be reached too rarely to be worth its
cost. That decision looks at drafted tokens only, never at what the policy will say, so exact rules stay exact.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from decoding.events import DraftStats
from decoding.state import Draft
from decoding.state import Sequence as Hypothesis

MAX_TOKENS = 16  # what `auto` goes up to
PRIOR = 0.5  # acceptance that is assumed of a pair before anything is known
STRENGTH = 2.0  # drafts that this assumption counts for
MEMORY = 0.9  # weight of older passes in a sequence's own acceptance
SHARED_MEMORY = 0.98  # the same for a pair of drafter and model
REACH = 0.1  # a draft that is reached less often than this is not worth its row
STRETCH = 3  # drafts that end by confidence may be this many times as long as the best even length
BUCKETS = 10  # of confidence
HOLD = 16  # ticks for which a decision stands, unless the batch changes
IDLE_HOLD = 64  # the same where nothing is drafted: trials bring news
GAIN = 1.05  # drafting must promise at least this much: estimates are not that good
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
        """Seconds at `size`: straight lines between measured sizes, and beyond the largest as from the smallest to it.

        What was never tried thus looks as cheap as it can be, is tried, and is known then. 0 if nothing was measured.
        """
        points = self._seen.get(what)
        if not points or size <= 0:
            return 0.0
        if size in points:
            return min(points[size])
        below = max((s for s in points if s < size), default=None)
        above = min((s for s in points if s > size), default=None)
        if below is None:
            return min(points[min(points)])
        if above is None:
            least = min(points)
            slope = (min(points[below]) - min(points[least])) / (below - least) if below > least else 0.0
            return min(points[below]) + max(0.0, slope) * (size - below)
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
    passed: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)  # decayed counts by confidence
    failed: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)

    def chance(self, confidence: float) -> float:
        """How often a draft of this confidence passes; before any has been seen, as often as any draft."""
        i = min(BUCKETS - 1, int(confidence * BUCKETS))
        return (self.passed[i] + STRENGTH * self.acceptance) / (self.passed[i] + self.failed[i] + STRENGTH)

    @property
    def acceptance(self) -> float:
        """Estimated chance that a draft whose forerunners passed passes too."""
        return (self.hits + STRENGTH * PRIOR) / (self.hits + self.misses + STRENGTH)


class Pace:
    """Sets `level`, `wanted` and `worth` of every draft before a tick, and learns from what was accepted."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pairs: dict[tuple[str, str, str], Pair] = {}
        self._held = 0
        self._members: list[tuple[int, int]] = []
        self._resting: list[tuple[Pair, Draft]] = []

    def assign(self, running: Sequence[Hypothesis]) -> bool:
        """How many tokens each sequence should draft next; whether any is to draft at all."""
        adaptive: list[Hypothesis] = []
        for sequence in running:
            draft = sequence.draft
            if draft is None:
                continue
            if draft.broken:
                draft.level = 0
            elif draft.spec.tokens == "auto":
                adaptive.append(sequence)
            else:
                draft.level = draft.spec.tokens
        if adaptive:
            self._held -= 1
            members = [(sequence.group.serial, sequence.index) for sequence in running]
            if self._held < 0 or members != self._members:
                self._members = members
                self._held = HOLD if self._adapt(adaptive, running) else IDLE_HOLD
            self._try_again()
        some = False
        for sequence in running:
            draft = sequence.draft
            if draft is not None:
                draft.wanted = draft.level
                if draft.wanted and draft.lookup is not None:
                    draft.wanted = len(draft.lookup.propose(draft.level))
                some = some or draft.wanted > 0
        return some

    def chance(self, sequence: Hypothesis, confidence: float) -> float:
        """How likely a draft of `sequence` passes that its drafter gave this probability."""
        return self._pair(sequence).chance(confidence)

    def acceptance(self, sequence: Hypothesis) -> float:
        """How likely any draft of `sequence` passes whose forerunners have."""
        return self._pair(sequence).acceptance

    def learn(self, sequence: Hypothesis, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` tokens passed, in a pass of `sequence`."""
        draft = sequence.draft
        assert draft is not None
        pair = self._pair(sequence)
        if draft.probing or not accepted:
            self._held = 0  # news: decide anew
        draft.probing = False
        missed = accepted < drafted
        draft.hits, draft.misses = draft.hits * MEMORY + accepted, draft.misses * MEMORY + missed
        pair.hits, pair.misses = pair.hits * SHARED_MEMORY + accepted, pair.misses * SHARED_MEMORY + missed
        for i, confidence in enumerate(draft.confidence[: accepted + missed]):
            bucket = min(BUCKETS - 1, int(confidence * BUCKETS))
            counts, others = (pair.passed, pair.failed) if i < accepted else (pair.failed, pair.passed)
            counts[bucket] = counts[bucket] * SHARED_MEMORY + 1
            others[bucket] *= SHARED_MEMORY
        for counts_at, reached in ((pair.drafted, drafted), (pair.accepted, accepted)):
            counts_at += [0] * (drafted - len(counts_at))
            for i in range(reached):
                counts_at[i] += 1

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

    def _own_acceptance(self, sequence: Hypothesis) -> float:
        """The sequence's own acceptance, leaning on its pair's while it has drafted little."""
        draft = sequence.draft
        assert draft is not None
        shared = self._pair(sequence).acceptance
        return (draft.hits + STRENGTH * shared) / (draft.hits + draft.misses + STRENGTH)

    def _adapt(self, adaptive: Sequence[Hypothesis], running: Sequence[Hypothesis]) -> bool:
        """Decide anew how far each adaptive sequence drafts; whether any does."""
        rates = {id(s): self._own_acceptance(s) for s in adaptive}
        reach = {key: MAX_TOKENS if a >= 1 else max(1, int(math.log(REACH) / math.log(a))) for key, a in rates.items()}
        decoding = [s for s in running if s.next_row == len(s.output) - 1]
        cost = self._costs(decoding)
        plain = cost(0, reach)
        best, best_rate = 0, len(decoding) / max(plain, 1e-9)
        needed = best_rate * GAIN
        for level in range(1, MAX_TOKENS + 1):
            gain = sum(_expected(rates[id(s)], min(level, reach[id(s)])) - 1 for s in adaptive)
            rate = (len(decoding) + gain) / max(cost(level, reach), 1e-9)
            if rate > max(best_rate, needed):
                best, best_rate = level, rate
        # What one more draft of each sequence costs, in tokens that the same time would give.
        free = dict.fromkeys(reach, MAX_TOKENS)
        spent = [cost(level, free) for level in range(MAX_TOKENS + 1)] if best else []
        worth = [(more - less) * best_rate / len(adaptive) for less, more in pairwise(spent)]
        for sequence in adaptive:
            draft = sequence.draft
            assert draft is not None
            length = min(best, reach[id(sequence)])
            draft.level = length if draft.lookup else min(MAX_TOKENS, STRETCH * length)
            draft.worth = worth
            if draft.probing:
                draft.level, draft.worth = max(draft.level, PROBE), []
        self._rest(adaptive)
        return best > 0

    def _rest(self, adaptive: Sequence[Hypothesis]) -> None:
        """Which pairs do not pay now; the first of a pair's drafts is the one that may try."""
        members: dict[int, list[Draft]] = {}
        pairs: dict[int, Pair] = {}
        for sequence in adaptive:
            if sequence.draft:
                pair = self._pair(sequence)
                pairs[id(pair)] = pair
                members.setdefault(id(pair), []).append(sequence.draft)
        self._resting = []
        for key, drafts in members.items():
            if any(draft.level for draft in drafts):
                if not any(draft.probing for draft in drafts):
                    pairs[key].idle, pairs[key].patience = 0, max(PATIENCE, pairs[key].patience // 2)
            else:
                self._resting.append((pairs[key], drafts[0]))

    def _try_again(self) -> None:
        """A pair that does not pay is given another chance now and then, in one sequence, more and more rarely."""
        for pair, draft in self._resting:
            pair.idle += 1
            if pair.idle >= pair.patience and not draft.broken:
                draft.level, draft.worth, draft.probing = PROBE, [], True
                pair.idle, pair.patience = 0, min(2 * pair.patience, MAX_PATIENCE)

    def _costs(self, decoding: Sequence[Hypothesis]) -> Callable[[int, Mapping[int, int]], float]:
        """Seconds of a tick whose adaptive sequences draft up to a level, each as far as its reach."""
        clock = self._clock

        def seconds(level: int, reach: Mapping[int, int]) -> float:
            # Sequences that cost the same are counted together: most batches are of few kinds.
            kinds = Counter(
                (tuple(track.model for track in s.tracks), _drafter(s), min(level, reach.get(id(s), 0)))
                for s in decoding
            )
            tokens: Counter[str] = Counter()
            steps: Counter[tuple[str, int]] = Counter()
            rows = 0
            for (models, (role, drafter), mine), count in kinds.items():
                rows += (mine + 1) * count
                for j, model in enumerate(models):
                    tokens[model] += (1 if j == role and mine else mine + 1) * count
                if drafter is not None:
                    steps.update({(drafter, step): count for step in range(mine)})
            spent = sum(clock.estimate(("draft", model), count) for (model, _), count in steps.items())
            spent += sum(clock.estimate(("forward", model), count) for model, count in tokens.items())
            return spent + clock.estimate("decide", rows)

        return seconds


def _drafter(sequence: Hypothesis) -> tuple[int | None, str | None]:
    """The track that drafts, if it is a role's, and the model that does."""
    draft = sequence.draft
    return (None, None) if draft is None else (draft.role, draft.track.model if draft.track else None)


def _expected(acceptance: float, count: int) -> float:
    """Tokens a pass gives with `count` drafts: 1 + a + .. + a^count."""
    return count + 1.0 if acceptance >= 1 else (1 - acceptance ** (count + 1)) / (1 - acceptance)
