"""Room for drafts: what budgets, lengths and free memory are left when everyone has got what they need."""

from __future__ import annotations

from collections.abc import Mapping

from decoding.blocks import Blocks
from decoding.plan import Plan, Sample, Span
from decoding.state import Draft, Sequence

CATCH_UP = 32  # positions that a drafter may compute in the forward of its first draft


class DraftRoom:
    """What is drafted in a tick. `prices`: of a token of each model; `limits`: positions that each model has."""

    def __init__(self, blocks: Blocks, prices: Mapping[str, float], limits: Mapping[str, int]) -> None:
        self._blocks, self._price, self.limits = blocks, prices, limits

    def extend(self, sample: Sample, plan: Plan) -> None:
        """Let a sequence that has its next row draft as far as budgets, lengths and free memory go."""
        sequence = sample.sequence
        count = self._count(sequence, plan) if sample.draws and sample.count == 1 else 0
        draft = sequence.draft
        if count <= 0 or draft is None:
            return
        draft.planned = sample.drafts = count
        sample.count += count
        plan.drafting.append(sequence)
        cost = count * self._cost(sequence)
        plan.rows -= count * len(sequence.tracks)
        plan.tokens -= cost
        if sequence.goal is not None:
            plan.search -= cost
        for span in sample.spans:
            span.count += count
            span.rows += count
        for track in sequence.all_tracks:
            self._blocks.grow(track, sequence.known(track) + count)

    def _cost(self, sequence: Sequence) -> float:
        return sum(self._price[track.model] for track in sequence.all_tracks)

    def _count(self, sequence: Sequence, plan: Plan) -> int:
        """How many tokens `sequence` may draft: what is wanted, within the budgets, lengths and free memory."""
        draft = sequence.draft
        if draft is None or draft.wanted <= 0:
            return 0
        count = min(draft.wanted, sequence.most_output - len(sequence.output) - draft.bonus)
        track = draft.track
        if track is not None:
            # The first draft's forward catches up too; what is long goes with the packed forwards, as prefill does.
            if sequence.known(track) - track.num_computed > CATCH_UP or draft.paused_until > plan.tick:
                return 0
            count = min(count, self.limits[track.model] - sequence.known(track))
        price = self._cost(sequence)
        count = min(count, plan.rows // len(sequence.tracks), int(plan.tokens / price))
        if sequence.goal is not None:
            count = min(count, plan.searched(price))
        return count if count > 0 and self._free(sequence, count) else 0

    def _free(self, sequence: Sequence, count: int) -> bool:
        """Whether memory is free for `count` drafts: without preempting anyone."""
        ends = {id(track): sequence.known(track) + count for track in sequence.all_tracks}
        return not self._blocks.short(self._blocks.missing(sequence.all_tracks, ends))

    def catch_up(self, sequence: Sequence, plan: Plan) -> None:
        """A drafter that has fallen behind, or joins late, catches up with what budget and memory are left."""
        draft = sequence.draft
        track = draft.own if draft else None
        if draft is None or track is None or draft.planned:
            return
        pool, known = self._blocks.pools[track.model], sequence.known(track)
        if known >= self.limits[track.model] or pool.blocks_for(known) > pool.num_blocks:
            self.retire(draft)
        if draft.broken or draft.wanted <= 0 or draft.paused_until > plan.tick:
            return
        if self._blocks.hit_prefix(sequence, track, plan):
            return
        need = sequence.target(track) - track.num_computed
        room = (pool.available + len(track.blocks)) * pool.block_size - track.num_computed
        price = self._price[track.model]
        chunk = min(need, int(plan.tokens / price), room)
        if need <= CATCH_UP // 2 or chunk <= 0:
            return
        self._blocks.grow(track, track.num_computed + chunk)
        span = Span(sequence, track, track.num_computed, chunk, 0)
        plan.put(span, price)
        self._blocks.announce(span, plan)

    def retire(self, draft: Draft) -> None:
        """The drafter drafts no more: its memory is free."""
        draft.broken = True
        if draft.own is not None:
            self._blocks.forget(draft.own)
