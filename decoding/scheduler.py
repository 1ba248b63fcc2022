"""Which positions are computed in a tick: admission, budgets, fairness, prefix hits, preemption, forks.

One rule covers prefill, chunked prefill, prefix hits, decode, drafts, preemption and forks: a track needs positions
`num_computed ..` of its prompt, output and drafts. Positions before the sequence's next wanted row are private to the
track and computed whenever there is budget; from that row on, all tracks of the sequence go in lockstep, because their
rows are mixed in the same tick. Drafts that were not accepted are rolled back by moving `num_computed`.

Drafting is optional: it takes what budgets and memory are left, and gives its memory back before anyone is preempted.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping

from decoding.core import EngineConfig
from decoding.kv import BlockPool, chain_key
from decoding.state import Draft, Group, Plan, Sample, Sequence, Span, Track

CATCH_UP = 32  # positions that a drafter may compute in the forward of its first draft
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
        self.pools, self.config, self.limits = pools, config, limits
        dearest = max(costs.values())
        self._price = {model: cost / dearest for model, cost in costs.items()}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
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
        self._free(sequence)

    def fork(self, root: Sequence, child: Sequence) -> list[tuple[str, int, int]]:
        """Start `child` on `root`'s blocks up to its own next row; returns (model, source, target) blocks to copy.

        Full blocks are shared, the partial one is copied. A child that cannot run now waits without blocks and
        catches up through the prefix cache, so a fork never needs memory to succeed.
        """
        copies: list[tuple[str, int, int]] = []
        needs: dict[str, int] = {}
        starts = {  # a drafter may be behind
            id(mine): min(child.target(mine), theirs.num_computed)
            for mine, theirs in zip(child.all_tracks, root.all_tracks, strict=True)
        }
        for track in child.all_tracks:
            partial = starts[id(track)] % self.pools[track.model].block_size != 0
            needs[track.model] = needs.get(track.model, 0) + partial
        while short := [model for model, need in needs.items() if self.pools[model].available < need]:
            if not self._reclaim(short, keep=root):
                break
        if short or len(self.running) >= self.config.max_num_seqs:
            self.add(child)
            return []
        for mine, theirs in zip(child.all_tracks, root.all_tracks, strict=True):
            pool = self.pools[mine.model]
            position = starts[id(mine)]
            full = position // pool.block_size
            mine.blocks = [pool.share(block) for block in theirs.blocks[:full]]
            mine.keys, mine.published = theirs.keys[:full], min(theirs.published, full)
            if position % pool.block_size:
                mine.blocks.append(pool.allocate())
                copies.append((mine.model, theirs.blocks[full], mine.blocks[-1]))
            mine.num_computed = position
        self._run(child)
        return copies

    def check(self) -> None:
        """Assert that pools and block tables agree."""
        for model, pool in self.pools.items():
            tracks = [t for s in [*self.running, *self.waiting] for t in s.all_tracks if t.model == model]
            pool.check([t.blocks for t in tracks])
            assert all(len(t.blocks) >= pool.blocks_for(t.num_computed) for t in tracks)
        assert all(not t.blocks for s in self.waiting for t in s.all_tracks), "a waiting sequence holds blocks"
        assert all(s.running for s in self.running)
        assert not any(s.running for s in self.waiting)

    # -- a tick -------------------------------------------------------------------------------------------------

    def plan(self, drafts: bool = True) -> Plan:
        """The spans and rows of the next tick. Allocates their blocks, preempting where memory is short.

        drafts: whether any sequence wants to draft.
        """
        self.tick += 1
        plan = Plan(tokens=float(self.config.max_num_batched_tokens), rows=self.config.max_logit_rows)
        ready: list[Sequence] = []
        behind: list[Sequence] = []
        for sequence in self.running:
            caught_up = all(track.num_computed == sequence.target(track) for track in sequence.tracks)
            (ready if caught_up else behind).append(sequence)
        for sequence in self._fair(ready):
            if sequence.running:
                self._schedule(sequence, plan)
        plan.tokens = max(plan.tokens, float(self.config.block_size))  # decoding never starves prefill altogether
        for sequence in sorted(behind, key=lambda s: s.order):
            if sequence.running:
                self._schedule(sequence, plan)
        if not drafts:
            return plan
        for sample in plan.samples:  # drafts take what is left when everyone has got what they need
            self._extend(sample, plan)
        for sequence in self.running:
            if sequence.draft and sequence.draft.own and not sequence.draft.planned:
                self._feed(sequence, sequence.draft, sequence.draft.own, plan)
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
                self.retire(draft)
            elif draft.own:
                self._settle(sequence, draft.own)
            draft.clear()

    def _settle(self, sequence: Sequence, track: Track) -> None:
        if not sequence.running:
            return  # its request has failed meanwhile: its blocks are gone
        pool = self.pools[track.model]
        track.num_computed = min(track.num_computed, sequence.known(track) - 1)
        needed = pool.blocks_for(track.num_computed)
        if len(track.blocks) > needed:
            pool.release(track.blocks[needed:])
            del track.blocks[needed:]
        if self.config.prefix_cache:
            while (track.published + 1) * pool.block_size <= track.num_computed:
                pool.publish(track.blocks[track.published], self._key(sequence, track, track.published))
                track.published += 1

    def _fair(self, ready: list[Sequence]) -> list[Sequence]:
        """Oldest first; if a budget does not reach for all, one row per request in turn, the least served first."""
        rows = sum(len(s.tracks) for s in ready)
        price = sum(self._price[track.model] for s in ready for track in s.tracks)
        if rows <= self.config.max_logit_rows and price <= self.config.max_num_batched_tokens:
            return sorted(ready, key=lambda s: s.order)
        turn: dict[Group, int] = {}
        ranked: list[tuple[int, int, int, Sequence]] = []
        for sequence in sorted(ready, key=lambda s: (s.last_tick, s.order)):
            group = sequence.group
            turn[group] = turn.get(group, -1) + 1
            ranked.append((turn[group], group.last_tick, group.serial, sequence))
        ranked.sort(key=lambda entry: entry[:3])
        return [entry[3] for entry in ranked]

    def admit(self) -> None:
        """Seat waiting sequences, as far as seats and memory go; before every `plan`."""
        if not self.waiting:
            return
        seats = Counter(sequence.group for sequence in self.running)
        self._make_room(seats)
        promised: dict[str, int] = dict.fromkeys(self.pools, 0)
        for sequence in self.running:
            for model, blocks in self._missing(sequence):
                promised[model] += blocks
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            # Seats go round by request, so that one with many choices does not keep the others out.
            sequence = min(self.waiting, key=lambda s: (seats[s.group], s.order))
            wanted = dict(promised)
            for model, blocks in self._missing(sequence):
                wanted[model] += blocks
            short = [model for model, pool in self.pools.items() if wanted[model] > pool.available]
            lent = self._lent() if short else {}
            enough = all(wanted[model] <= self.pools[model].available + lent.get(model, 0) for model in short)
            if short and enough and self._reclaim(short):
                continue
            if short and self.running:
                return
            promised = wanted
            self.waiting.remove(sequence)
            seats[sequence.group] += 1
            self._run(sequence)

    def _make_room(self, seats: Counter[Group]) -> None:
        """All seats are taken: requests that have none get one each from those that have several."""
        newcomers = {s.group for s in self.waiting if not seats[s.group]}
        for _ in range(len(newcomers) - (self.config.max_num_seqs - len(self.running))):
            group = max(seats, key=lambda g: seats[g], default=None)
            if group is None or seats[group] < 2:
                return
            self._preempt(max((s for s in self.running if s.group is group), key=lambda s: s.order))
            seats[group] -= 1

    def _missing(self, sequence: Sequence) -> Iterable[tuple[str, int]]:
        """Blocks each track still lacks before its sequence's next token."""
        for track in sequence.tracks:
            pool = self.pools[track.model]
            known = len(track.prompt) + len(sequence.output)
            yield track.model, max(0, pool.blocks_for(known) - len(track.blocks))

    def _schedule(self, sequence: Sequence, plan: Plan) -> None:
        blocked = [self._hit_prefix(sequence, track, plan) for track in sequence.tracks]
        needs = [sequence.target(track) - track.num_computed for track in sequence.tracks]
        prices = [self._price[track.model] for track in sequence.tracks]
        spare = plan.tokens - sum(need * price for need, price in zip(needs, prices))
        rows = min(sequence.rows_wanted, plan.rows // len(sequence.tracks), int(spare / sum(prices)))
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
            sequence.last_tick = sequence.group.last_tick = self.tick
            for span in spans:
                self._put(span, plan)
            if spans[0].rows:
                plan.samples.append(Sample(sequence, sequence.next_row, spans[0].rows, spans))

    def _put(self, span: Span, plan: Plan) -> None:
        sequence, track, model = span.sequence, span.track, span.track.model
        plan.spans.setdefault(model, []).append(span)
        plan.tokens -= span.count * self._price[model]
        plan.rows -= span.rows
        if self.config.prefix_cache:
            size = self.pools[model].block_size
            first, last = span.start // size, min(span.start + span.count, sequence.known(track)) // size
            if last > first:
                pending = plan.pending.setdefault(model, set())
                pending.update(self._key(sequence, track, i) for i in range(first, last))

    # -- drafts -------------------------------------------------------------------------------------------------

    def _extend(self, sample: Sample, plan: Plan) -> None:
        """Let a sequence that has its next row draft as far as budgets, lengths and free memory go."""
        sequence = sample.sequence
        count = self._drafts(sequence, plan) if sample.draws and sample.count == 1 else 0
        draft = sequence.draft
        if count <= 0 or draft is None:
            return
        draft.planned = sample.drafts = count
        sample.count += count
        plan.drafting.append(sequence)
        plan.rows -= count * len(sequence.tracks)
        plan.tokens -= count * sum(self._price[track.model] for track in sequence.all_tracks)
        for span in sample.spans:
            span.count += count
            span.rows += count
        for track in sequence.all_tracks:
            pool = self.pools[track.model]
            while len(track.blocks) < pool.blocks_for(sequence.known(track) + count):
                track.blocks.append(pool.allocate())

    def _drafts(self, sequence: Sequence, plan: Plan) -> int:
        """How many tokens `sequence` may draft: what is wanted, within the budgets, lengths and free memory."""
        draft = sequence.draft
        if draft is None or draft.wanted <= 0:
            return 0
        count = min(draft.wanted, sequence.group.max_output - len(sequence.output) - draft.bonus)
        track = draft.track
        if track is not None:
            # The first draft's forward catches up too; what is long goes with the packed forwards, as prefill does.
            if sequence.known(track) - track.num_computed > CATCH_UP or draft.paused_until > self.tick:
                return 0
            count = min(count, self.limits[track.model] - sequence.known(track))
        price = sum(self._price[track.model] for track in sequence.all_tracks)
        count = min(count, plan.rows // len(sequence.tracks), int(plan.tokens / price))
        return count if count > 0 and self._room(sequence, count) else 0

    def _room(self, sequence: Sequence, count: int) -> bool:
        """Whether memory is free for `count` drafts: without preempting anyone."""
        wanted: dict[str, int] = {}
        for track in sequence.all_tracks:
            pool = self.pools[track.model]
            lack = pool.blocks_for(sequence.known(track) + count) - len(track.blocks)
            wanted[track.model] = wanted.get(track.model, 0) + max(0, lack)
        return all(self.pools[model].available >= blocks for model, blocks in wanted.items())

    def _feed(self, sequence: Sequence, draft: Draft, track: Track, plan: Plan) -> None:
        """A drafter that has fallen behind, or joins late, catches up with what budget and memory are left."""
        pool, known = self.pools[track.model], sequence.known(track)
        if known >= self.limits[track.model] or pool.blocks_for(known) > pool.num_blocks:
            self.retire(draft)
        if draft.broken or draft.wanted <= 0 or draft.paused_until > self.tick:
            return
        if self._hit_prefix(sequence, track, plan):
            return
        need = sequence.target(track) - track.num_computed
        room = (pool.available + len(track.blocks)) * pool.block_size - track.num_computed
        chunk = min(need, int(plan.tokens / self._price[track.model]), room)
        if need <= CATCH_UP // 2 or chunk <= 0:
            return
        while len(track.blocks) < pool.blocks_for(track.num_computed + chunk):
            track.blocks.append(pool.allocate())
        self._put(Span(sequence, track, track.num_computed, chunk, 0), plan)

    def retire(self, draft: Draft) -> None:
        """The drafter drafts no more: its memory is free."""
        draft.broken = True
        if draft.own is not None:
            self._forget(draft.own)

    def _lent(self) -> dict[str, int]:
        """Blocks that drafters hold, at most; of each pool."""
        lent: dict[str, int] = {}
        for sequence in self.running:
            own = sequence.draft.own if sequence.draft else None
            if own is not None:
                lent[own.model] = lent.get(own.model, 0) + len(own.blocks)
        return lent

    def _reclaim(self, short: Iterable[str], keep: Sequence | None = None) -> bool:
        """Take back the blocks of one drafter in a pool that is short, the youngest one's first, but not `keep`'s."""
        models = set(short)
        for each in sorted(self.running, key=lambda s: s.order, reverse=True):
            own = each.draft.own if each.draft else None
            if each is keep or own is None or not own.blocks or own.model not in models:
                continue
            if not (each.draft and each.draft.planned):
                self._forget(own)
                assert each.draft is not None
                each.draft.paused_until = self.tick + PAUSE
                return True
        return False

    def _hit_prefix(self, sequence: Sequence, track: Track, plan: Plan) -> bool:
        """Take cached blocks while there are any; True if the next block is being computed by another span now."""
        pool = self.pools[track.model]
        size, target = pool.block_size, sequence.target(track)
        pending = plan.pending.get(track.model, ())
        while (
            self.config.prefix_cache
            and len(track.blocks) * size == track.num_computed
            and track.num_computed + size <= target
        ):
            key = self._key(sequence, track, len(track.blocks))
            if key in pending:
                return True
            block = pool.find(key)
            if block is None:
                return False
            track.blocks.append(pool.share(block))
            track.num_computed += size
            track.published = len(track.blocks)
            if track in sequence.tracks and not sequence.group.preemptions and not sequence.output:
                sequence.group.cached_tokens += size
        return False

    # -- memory -------------------------------------------------------------------------------------------------

    def _reserve(self, sequence: Sequence, spans: list[Span]) -> bool:
        """Allocate the spans' blocks. Where they lack, drafters go, then the youngest unscheduled, then `sequence`."""
        while True:
            needs: dict[str, int] = {}
            for span in spans:
                pool, track = self.pools[span.track.model], span.track
                lack = pool.blocks_for(span.start + span.count) - len(track.blocks)
                needs[track.model] = needs.get(track.model, 0) + max(0, lack)
            short = {model for model, need in needs.items() if self.pools[model].available < need}
            if not short:
                break
            if self._reclaim(short):
                continue
            younger = [s for s in self.running if s.order > sequence.order and s.last_tick != self.tick]
            victim = max(younger, key=lambda s: s.order, default=sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        for span in spans:
            pool, track = self.pools[span.track.model], span.track
            while len(track.blocks) < pool.blocks_for(span.start + span.count):
                track.blocks.append(pool.allocate())
        return True

    def _run(self, sequence: Sequence) -> None:
        sequence.running = True
        self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue without blocks; what it had computed is recomputed, or hit in the prefix cache."""
        self.running.remove(sequence)
        sequence.running = False
        self._free(sequence)
        self.add(sequence)
        self.preemptions += 1
        sequence.group.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        for track in sequence.all_tracks:
            self._forget(track)

    def _forget(self, track: Track) -> None:
        self.pools[track.model].release(track.blocks)
        track.blocks = []
        track.num_computed = track.published = 0

    def _key(self, sequence: Sequence, track: Track, index: int) -> bytes:
        size = self.pools[track.model].block_size
        while len(track.keys) <= index:
            i = len(track.keys)
            parent = track.keys[-1] if track.keys else track.root
            track.keys.append(chain_key(parent, sequence.ids(track, i * size, (i + 1) * size)))
        return track.keys[index]
