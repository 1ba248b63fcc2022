"""Which positions are computed in a tick: admission, budgets, fairness, prefix hits, preemption, forks.

One rule covers prefill, chunked prefill, prefix hits, decode, drafts, preemption and forks: a track needs positions
`num_computed ..` of its prompt, output and drafts. Positions before the sequence's next wanted row are private to the
track and computed whenever there is budget; from that row on, all tracks of the sequence go in lockstep, because their
rows are mixed in the same tick. Drafts that were not accepted are rolled back by moving `num_computed`.

Drafting (`decoding.draftroom`) is optional: it takes what budgets and memory are left, and gives its memory back before
anyone is preempted.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping

from decoding.blocks import Blocks, Copy
from decoding.core import EngineConfig
from decoding.draftroom import DraftRoom
from decoding.kv import BlockPool
from decoding.plan import Plan, Sample, Span
from decoding.state import Group, Sequence, Stream, Track

PAUSE = 64  # ticks that a drafter rests after its memory was needed elsewhere


class Scheduler:
    """Waiting and running sequences over one block pool per model.

    `costs`: seconds a token of each model; only their ratios count. `limits`: positions that each model has.
    """

    def __init__(
        self,
        pools: Mapping[str, BlockPool],
        costs: Mapping[str, float],
        config: EngineConfig,
        limits: Mapping[str, int],
    ) -> None:
        self.pools, self.config = pools, config
        self.blocks = Blocks(pools, config.prefix_cache)
        dearest = max(costs.values())
        self._price = {model: cost / dearest for model, cost in costs.items()}
        self.drafts = DraftRoom(self.blocks, self._price, limits)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.resting: list[Sequence] = []  # a search's, between two goals; they hold blocks while nobody needs them
        self.tick = 0
        self.preemptions = 0

    # -- the queue ----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by age."""
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.running:
            self.running.remove(sequence)
            sequence.running = False
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.resting:
            self.resting.remove(sequence)
        self.blocks.free(sequence)

    def rest(self, sequence: Sequence) -> None:
        """A running or new sequence has nothing to do; it keeps its blocks as long as nobody needs them."""
        if sequence.running:
            self.running.remove(sequence)
            sequence.running = False
        self.resting.append(sequence)

    def resume(self, sequence: Sequence) -> list[Copy]:
        """A resting sequence has something to do again; returns blocks to copy before the next forward."""
        self.resting.remove(sequence)
        self.add(sequence)
        return [copy for track in sequence.tracks for copy in self.blocks.rewind(track, sequence.target(track))]

    def fork(self, root: Sequence, child: Sequence) -> list[Copy]:
        """Start `child` on `root`'s blocks up to its own next row; returns (model, source, target) blocks to copy.

        Full blocks are shared, the partial one is copied. A child that cannot run now waits without blocks and
        catches up through the prefix cache, so a fork never needs memory to succeed.
        """
        starts = {  # a drafter may be behind
            id(mine): min(child.target(mine), theirs.num_computed)
            for mine, theirs in zip(child.all_tracks, root.all_tracks, strict=True)
        }
        copies = self._share(root, child, starts) if len(self.running) < self.config.max_num_seqs else None
        if copies is None:
            self.add(child)
            return []
        self._run(child)
        return copies

    def branch(self, root: Sequence, child: Sequence) -> list[Copy]:
        """As `fork`, for a search: the child rests, on everything that `root` has computed of its text."""
        starts = {
            id(mine): min(child.known(mine), theirs.num_computed)
            for mine, theirs in zip(child.all_tracks, root.all_tracks, strict=True)
        }
        copies = self._share(root, child, starts) or []
        self.rest(child)
        return copies

    def _share(self, root: Sequence, child: Sequence, starts: Mapping[int, int]) -> list[Copy] | None:
        """Put `child` on `root`'s blocks up to `starts`; None if there is no memory for the partial blocks."""
        needs: dict[str, int] = {}
        for track in child.all_tracks:
            partial = starts[id(track)] % self.pools[track.model].block_size != 0
            needs[track.model] = needs.get(track.model, 0) + partial
        while short := self.blocks.short(needs):
            if not self._reclaim(short, keep=root):
                return None
        copies: list[Copy] = []
        for mine, theirs in zip(child.all_tracks, root.all_tracks, strict=True):
            copies += self.blocks.share(mine, theirs, starts[id(mine)])
        return copies

    def check(self) -> None:
        """Assert that pools and block tables agree."""
        everyone = [*self.running, *self.waiting, *self.resting]
        assert len(set(map(id, everyone))) == len(everyone), "a sequence is in two places"
        self.blocks.check(everyone)
        held = [s for s in self.waiting if s.goal is None and not isinstance(s, Stream)]
        assert all(not t.blocks for s in held for t in s.all_tracks), "a waiting sequence holds blocks"
        assert all(s.running for s in self.running)
        assert not any(s.running for s in [*self.waiting, *self.resting])

    # -- a tick -------------------------------------------------------------------------------------------------

    def plan(self, drafts: bool = True) -> Plan:
        """The spans and rows of the next tick. Allocates their blocks, preempting where memory is short.

        drafts: whether any sequence wants to draft.
        """
        self.tick += 1
        plan = Plan(self.tick, float(self.config.max_num_batched_tokens), self.config.max_logit_rows)
        ready: list[Sequence] = []
        behind: list[Sequence] = []
        for sequence in self.running:
            caught_up = all(track.num_computed == sequence.target(track) for track in sequence.tracks)
            (ready if caught_up else behind).append(sequence)
        kept = 0.0  # for scorers, which read on, however many hypotheses there are
        others = [sequence for sequence in ready if sequence.goal is None and not isinstance(sequence, Stream)]
        if self.config.max_search_tokens and others:
            plan.search = max(self.config.max_search_tokens, sum(map(self._cost, others)))
            kept = plan.search / 2 if any(isinstance(sequence, Stream) for sequence in behind) else 0.0
            plan.search -= kept
        for sequence in self._fair(ready, plan.search):
            if sequence.running:
                self._schedule(sequence, plan)
        plan.tokens = max(plan.tokens, float(self.config.block_size))  # decoding never starves prefill altogether
        plan.search = max(plan.search, 0.0) + kept
        for sequence in self._by_turns(behind) if others else sorted(behind, key=lambda s: s.order):
            if sequence.running:
                self._schedule(sequence, plan)
        if not drafts:
            return plan
        for sample in plan.samples:  # drafts take what is left when everyone has got what they need
            self.drafts.extend(sample, plan)
        for sequence in self.running:
            self.drafts.catch_up(sequence, plan)
        return plan

    def commit(self, plan: Plan) -> None:
        """The plan's positions are computed and its tokens appended: move the tracks on, publish their full blocks.

        Tracks that ran ahead of the text, with drafts that were not accepted, are rolled back.
        """
        for spans in plan.spans.values():
            for span in spans:
                draft = span.sequence.draft
                if draft is not None and draft.broken and span.track is draft.own:
                    continue  # it was retired meanwhile: its blocks are gone
                span.track.num_computed = span.start + span.count
                self._settle(span.sequence, span.track)
        for sequence in plan.drafting:
            draft = sequence.draft
            assert draft is not None
            if draft.broken:
                self.drafts.retire(draft)
            elif draft.own:
                self._settle(sequence, draft.own)
            draft.clear()

    def _settle(self, sequence: Sequence, track: Track) -> None:
        if sequence.running:  # else its request has failed meanwhile, and its blocks are gone
            self.blocks.settle(sequence, track)

    def _fair(self, ready: list[Sequence], search: float) -> list[Sequence]:
        """Oldest first; if a budget does not reach for all, one row per request in turn, the least served first.

        search: the budget of searches' hypotheses.
        """
        rows = sum(len(s.tracks) for s in ready)
        prices = [self._cost(sequence) for sequence in ready]
        searched = sum(price for s, price in zip(ready, prices, strict=True) if s.goal is not None)
        fits = rows <= self.config.max_logit_rows and sum(prices) <= self.config.max_num_batched_tokens
        if fits and searched <= search:
            return sorted(ready, key=lambda s: s.order)
        turn: dict[Group, int] = {}
        ranked: list[tuple[int, int, int, Sequence]] = []
        for sequence in sorted(ready, key=lambda s: (s.last_tick, s.order)):
            group = sequence.group.payer
            turn[group] = turn.get(group, -1) + 1
            ranked.append((turn[group], group.last_tick, group.serial, sequence))
        ranked.sort(key=lambda entry: entry[:3])
        return [entry[3] for entry in ranked]

    @staticmethod
    def _by_turns(behind: list[Sequence]) -> list[Sequence]:
        """Oldest first, but scorers' texts, whose budget does not reach for all, those of the least served request."""
        streams = [sequence for sequence in behind if isinstance(sequence, Stream)]
        turns = iter(sorted(streams, key=lambda s: (s.group.payer.last_tick, s.order)))
        ranked = sorted(behind, key=lambda s: s.order)
        return [next(turns) if isinstance(sequence, Stream) else sequence for sequence in ranked]

    def _cost(self, sequence: Sequence) -> float:
        """Of one row of it, in tokens of the dearest model."""
        return sum(self._price[track.model] for track in sequence.tracks)

    def admit(self) -> None:
        """Seat waiting sequences, as far as seats and memory go; before every `plan`."""
        if not self.waiting:
            return
        seats = Counter(sequence.group.payer for sequence in self.running)
        self._make_room(seats)
        promised: dict[str, int] = dict.fromkeys(self.pools, 0)
        for sequence in self.running:
            for model, blocks in self._missing(sequence):
                promised[model] += blocks
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            # Seats go round by request, so that one with many choices does not keep the others out.
            sequence = min(self.waiting, key=lambda s: (seats[s.group.payer], s.order))
            wanted = dict(promised)
            for model, blocks in self._missing(sequence):
                wanted[model] += blocks
            short = [model for model, pool in self.pools.items() if wanted[model] > pool.available]
            lent = self._lent(sequence) if short else {}
            enough = all(wanted[model] <= self.pools[model].available + lent.get(model, 0) for model in short)
            if short and enough and self._reclaim(short, keep=sequence):
                continue
            if short and self.running:
                return
            promised = wanted
            self.waiting.remove(sequence)
            seats[sequence.group.payer] += 1
            self._run(sequence)

    def _make_room(self, seats: Counter[Group]) -> None:
        """All seats are taken: requests that have none get one each from those that have several."""
        newcomers = {s.group.payer for s in self.waiting if not seats[s.group.payer]}
        for _ in range(len(newcomers) - (self.config.max_num_seqs - len(self.running))):
            group = max(seats, key=lambda g: seats[g], default=None)
            if group is None or seats[group] < 2:
                return
            self._preempt(max((s for s in self.running if s.group.payer is group), key=lambda s: s.order))
            seats[group] -= 1

    def _missing(self, sequence: Sequence) -> Iterable[tuple[str, int]]:
        """Blocks each track still lacks before its sequence's next token."""
        for track in sequence.tracks:
            pool = self.pools[track.model]
            yield track.model, max(0, pool.blocks_for(sequence.known(track)) - len(track.blocks))

    def _schedule(self, sequence: Sequence, plan: Plan) -> None:
        if isinstance(sequence, Stream):
            self._read(sequence, plan)
            return
        blocked = [self.blocks.hit_prefix(sequence, track, plan) for track in sequence.tracks]
        needs = [sequence.target(track) - track.num_computed for track in sequence.tracks]
        prices = [self._price[track.model] for track in sequence.tracks]
        spare = plan.tokens - sum(need * price for need, price in zip(needs, prices))
        rows = min(sequence.rows_wanted, plan.rows // len(sequence.tracks), int(spare / sum(prices)))
        if sequence.goal is not None:
            rows = min(rows, plan.searched(sum(prices)))
        if not plan.spans and not any(needs):
            rows = max(rows, 1)  # whoever comes first gets a row: no budget is so small that nothing goes on
        spans: list[Span] = []
        if rows > 0 and not any(blocked):
            for track, need in zip(sequence.tracks, needs):
                spans.append(Span(sequence, track, track.num_computed, need + rows, rows))
        else:
            left = plan.tokens
            for track, need, price, wait in zip(sequence.tracks, needs, prices, blocked):
                chunk = 0 if wait else min(need, int(left / price))
                if chunk > 0:
                    spans.append(Span(sequence, track, track.num_computed, chunk, 0))
                    left -= chunk * price
        if spans and self._reserve(sequence, spans):
            self._served(sequence)
            for span in spans:
                plan.put(span, self._price[span.track.model])
                self.blocks.announce(span, plan)
                if sequence.goal is not None:
                    plan.search -= span.rows * self._price[span.track.model]
            if spans[0].rows:
                plan.samples.append(Sample(sequence, sequence.next_row, spans[0].rows, spans))

    def _read(self, stream: Stream, plan: Plan) -> None:
        """The next chunk of a scorer's text, with as many of the wanted rows as the budget of rows has room for."""
        (track,) = stream.tracks
        if self.blocks.hit_prefix(stream, track, plan):
            return
        start, price = track.num_computed, self._price[track.model]
        most = min(int(plan.tokens / price), plan.searched(price))
        end = min(stream.known(track), start + max(most, not plan.spans))
        rows = max(plan.rows, not plan.spans)
        if len(stream.marks) > rows:
            end = min(end, stream.marks[rows])
        span = Span(stream, track, start, end - start, 0)
        if span.count > 0 and self._reserve(stream, [span]):
            span.marks = [mark for mark in stream.marks if mark < end]
            span.rows = len(span.marks)
            self._served(stream)
            plan.put(span, price)
            plan.search -= span.count * price
            self.blocks.announce(span, plan)

    def _served(self, sequence: Sequence) -> None:
        sequence.last_tick = sequence.group.payer.last_tick = self.tick

    # -- memory -------------------------------------------------------------------------------------------------

    def _idle(self, keep: Sequence | None) -> list[Sequence]:
        """Who holds blocks and does not run, the first to give them up first: resting ones, the youngest of them."""
        resting = sorted(self.resting, key=lambda s: s.order, reverse=True)
        waiting = sorted(self.waiting, key=lambda s: s.order, reverse=True)
        return [s for s in (*resting, *waiting) if s is not keep and any(t.blocks for t in s.all_tracks)]

    def _lent(self, keep: Sequence) -> dict[str, int]:
        """Blocks that drafters and idle sequences hold, at most, without those of `keep`; of each pool."""
        own = [s.draft.own for s in self.running if s.draft and s.draft.own]
        lent: dict[str, int] = {}
        for track in (*own, *(track for s in self._idle(keep) for track in s.all_tracks)):
            lent[track.model] = lent.get(track.model, 0) + len(track.blocks)
        return lent

    def _reclaim(self, short: Iterable[str], keep: Sequence | None = None) -> bool:
        """Take back the blocks of one drafter or idle sequence in a pool that is short; never those of `keep`."""
        models = set(short)
        for each in sorted(self.running, key=lambda s: s.order, reverse=True):
            own = each.draft.own if each.draft else None
            if each is keep or own is None or not own.blocks or own.model not in models:
                continue
            if not (each.draft and each.draft.planned):
                self.blocks.forget(own)
                assert each.draft is not None
                each.draft.paused_until = self.tick + PAUSE
                return True
        for each in self._idle(keep):
            if any(track.blocks and track.model in models for track in each.all_tracks):
                self.blocks.free(each)
                each.recomputes = True
                return True
        return False

    def _reserve(self, sequence: Sequence, spans: list[Span]) -> bool:
        """Allocate the spans' blocks. Where they lack, the idle go, then the youngest unscheduled, then `sequence`."""
        tracks, ends = [span.track for span in spans], {id(s.track): s.start + s.count for s in spans}
        while short := self.blocks.short(self.blocks.missing(tracks, ends)):
            if self._reclaim(short):
                continue
            younger = [s for s in self.running if s.order > sequence.order and s.last_tick != self.tick]
            victim = max(younger, key=lambda s: s.order, default=sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        for track in tracks:
            self.blocks.grow(track, ends[id(track)])
        return True

    def _run(self, sequence: Sequence) -> None:
        sequence.running = True
        self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue without blocks; what it had computed is recomputed, or hit in the prefix cache."""
        self.running.remove(sequence)
        sequence.running = False
        sequence.recomputes = True
        self.blocks.free(sequence)
        self.add(sequence)
        self.preemptions += 1
        sequence.group.payer.preemptions += 1
