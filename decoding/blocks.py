"""Which KV blocks a track holds: growth, prefix hits, publishing, sharing between forks, roll-back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from decoding.kv import BlockPool, chain_key
from decoding.plan import Plan, Span
from decoding.state import Group, Sequence, Track

Copy = tuple[str, int, int]  # (model, source block, target block): to be done before the next forward


class Blocks:
    """The block tables of all tracks, over one pool per model. `prefix_cache`: whether full blocks are published."""

    def __init__(self, pools: Mapping[str, BlockPool], prefix_cache: bool) -> None:
        self.pools, self._cached = pools, prefix_cache

    def missing(self, tracks: Iterable[Track], ends: Mapping[int, int]) -> dict[str, int]:
        """Blocks by model that tracks lack to hold `ends[id(track)]` positions."""
        needs: dict[str, int] = {}
        for track in tracks:
            lack = self.pools[track.model].blocks_for(ends[id(track)]) - len(track.blocks)
            needs[track.model] = needs.get(track.model, 0) + max(0, lack)
        return needs

    def short(self, needs: Mapping[str, int]) -> list[str]:
        """Models whose pools have fewer blocks to give."""
        return [model for model, need in needs.items() if self.pools[model].available < need]

    def grow(self, track: Track, positions: int) -> None:
        """Allocate what `positions` take. Raises OutOfBlocks; look with `short` first."""
        pool = self.pools[track.model]
        while len(track.blocks) < pool.blocks_for(positions):
            track.blocks.append(pool.allocate())

    def free(self, sequence: Sequence) -> None:
        """Give back everything that `sequence` holds."""
        for track in sequence.all_tracks:
            self.forget(track)

    def forget(self, track: Track) -> None:
        """Give back a track's blocks; nothing of it is computed any more."""
        self.pools[track.model].release(track.blocks)
        track.blocks = []
        track.num_computed = track.published = 0

    def settle(self, sequence: Sequence, track: Track) -> None:
        """After a tick: roll back what ran ahead of the text, publish the blocks that are full of committed tokens."""
        pool = self.pools[track.model]
        track.num_computed = min(track.num_computed, sequence.settled(track))
        self._trim(track)
        if self._cached:
            while (track.published + 1) * pool.block_size <= track.num_computed:
                pool.publish(track.blocks[track.published], self.key(sequence, track, track.published))
                track.published += 1

    def rewind(self, track: Track, position: int) -> list[Copy]:
        """Compute `track` anew from `position` on; what others see of its blocks does not change.

        The block that is written next becomes the track's own: copied if it is shared or published, or, where no block
        is free, given up, so that it is computed again from its beginning.
        """
        if track.num_computed <= position:
            return []
        pool, copies = self.pools[track.model], []
        full, rest = divmod(position, pool.block_size)
        track.num_computed = position
        track.published = min(track.published, full)
        self._trim(track)
        if rest and not pool.private(track.blocks[full]):
            shared = track.blocks.pop()
            if pool.available:
                track.blocks.append(pool.allocate())
                copies.append((track.model, shared, track.blocks[full]))
            else:
                track.num_computed = full * pool.block_size
            pool.release([shared])
        return copies

    def cut(self, track: Track, position: int) -> list[Copy]:
        """As `rewind`, and the ids from `position` on are going to be others."""
        copies = self.rewind(track, position)
        del track.keys[position // self.pools[track.model].block_size :]
        return copies

    def share(self, mine: Track, theirs: Track, position: int) -> list[Copy]:
        """`mine`, empty, starts with the first `position` positions of `theirs`; the partial block is copied."""
        pool = self.pools[mine.model]
        full, rest = divmod(position, pool.block_size)
        mine.blocks = [pool.share(block) for block in theirs.blocks[:full]]
        mine.keys, mine.published = theirs.keys[:full], min(theirs.published, full)
        mine.num_computed = position
        if not rest:
            return []
        mine.blocks.append(pool.allocate())
        return [(mine.model, theirs.blocks[full], mine.blocks[-1])]

    def hit_prefix(self, sequence: Sequence, track: Track, plan: Plan) -> bool:
        """Take cached blocks while there are any; True if the next block is being computed by another span now."""
        pool = self.pools[track.model]
        size, target = pool.block_size, sequence.hittable(track)
        pending = plan.pending.get(track.model, ())
        while self._cached and len(track.blocks) * size == track.num_computed and track.num_computed + size <= target:
            key = self.key(sequence, track, len(track.blocks))
            if key in pending:
                return True
            block = pool.find(key)
            if block is None:
                return False
            track.blocks.append(pool.share(block))
            track.num_computed += size
            track.published = len(track.blocks)
            if track in sequence.tracks and sequence.begins and not sequence.recomputes:
                _count_hit(sequence.group, size)
        return False

    def announce(self, span: Span, plan: Plan) -> None:
        """Blocks that this tick fills are not computed a second time in it."""
        if not self._cached:
            return
        sequence, track = span.sequence, span.track
        size = self.pools[track.model].block_size
        first, last = span.start // size, min(span.start + span.count, sequence.known(track)) // size
        if last > first:
            pending = plan.pending.setdefault(track.model, set())
            pending.update(self.key(sequence, track, i) for i in range(first, last))

    def key(self, sequence: Sequence, track: Track, index: int) -> bytes:
        """Prefix-cache key of the track's block `index`, full of settled ids."""
        size = self.pools[track.model].block_size
        while len(track.keys) <= index:
            i = len(track.keys)
            parent = track.keys[-1] if track.keys else track.root
            track.keys.append(chain_key(parent, sequence.ids(track, i * size, (i + 1) * size)))
        return track.keys[index]

    def check(self, sequences: Seq[Sequence]) -> None:
        """Assert that pools and the block tables of `sequences`, which are all there are, agree."""
        for model, pool in self.pools.items():
            tracks = [t for s in sequences for t in s.all_tracks if t.model == model]
            pool.check([t.blocks for t in tracks])
            assert all(len(t.blocks) >= pool.blocks_for(t.num_computed) for t in tracks)

    def _trim(self, track: Track) -> None:
        """Blocks behind what is computed go back."""
        pool = self.pools[track.model]
        needed = pool.blocks_for(track.num_computed)
        if len(track.blocks) > needed:
            pool.release(track.blocks[needed:])
            del track.blocks[needed:]


def _count_hit(group: Group, tokens: int) -> None:
    """The cache held `tokens` of the request's prompt, or of what its search opened."""
    if group.owner is None:
        group.cached_tokens += tokens
    else:
        group.owner.read_cached += tokens
