"""Paged KV blocks of one model: reference counts, prefix cache, eviction. Knows nothing about tensors.

A block is free (nobody's), held (reference count > 0), or cached (published under a prefix key, count 0, evictable
in least-recently-used order). Keys chain: key(i) = sha256(key(i - 1), ids of block i), so equal keys mean equal
prefixes from the root on (vLLM's automatic prefix caching works the same way).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence


def chain_key(parent: bytes, ids: Sequence[int]) -> bytes:
    """Prefix-cache key of a full block that holds `ids` and follows the block with key `parent`."""
    return hashlib.sha256(parent + array("q", ids).tobytes()).digest()


def root_key(*parts: str) -> bytes:
    """Key before the first block: whatever must never share a cache (weights, adapter, salt) goes in here."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


class OutOfBlocks(Exception):
    """The pool has neither a free nor an evictable block."""


class BlockPool:
    """`num_blocks` blocks of `block_size` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._counts = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self.hits = self.queries = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> float:
        """Share of blocks held by tracks, 0 to 1."""
        return 1.0 - self.available / max(1, self.num_blocks)

    def blocks_for(self, positions: int) -> int:
        """Blocks needed for that many positions."""
        return -(-positions // self.block_size)

    def allocate(self) -> int:
        """A block of one's own, evicting the least recently used cached one if need be."""
        if self._free:
            block = self._free.popleft()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        else:
            raise OutOfBlocks
        self._counts[block] = 1
        return block

    def private(self, block: int) -> bool:
        """Whether `block` has one holder and is not published, so that the holder may write to it."""
        return self._counts[block] == 1 and block not in self._key_of

    def share(self, block: int) -> int:
        """One more holder of `block`, which is held or cached."""
        if self._counts[block] == 0:
            del self._evictable[block]
        self._counts[block] += 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back; published ones stay cached, the last of a chain being evicted first."""
        for block in reversed(blocks):
            self._counts[block] -= 1
            assert self._counts[block] >= 0, f"block {block} released twice"
            if self._counts[block] == 0:
                if block in self._key_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def find(self, key: bytes) -> int | None:
        """The block published under `key`, not yet shared with the caller."""
        self.queries += 1
        block = self._block_of.get(key)
        self.hits += block is not None
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Offer a full block of committed tokens to later requests; the first one under a key stays."""
        assert self._counts[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def clear_cache(self) -> None:
        """Forget every cached block that nobody holds."""
        while self._evictable:
            block, _ = self._evictable.popitem()
            del self._block_of[self._key_of.pop(block)]
            self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that counts equal the holders in `tables` and that each block is free, held or cached, once."""
        held = Counter(block for table in tables for block in table)
        counts = [0] * self.num_blocks
        for block, holders in held.items():
            counts[block] = holders
        assert self._counts == counts, "reference counts are off"
        free, evictable = set(self._free), self._evictable.keys()
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(evictable)
        assert free.isdisjoint(held)
        assert evictable.isdisjoint(held)
        assert len(free) + len(evictable) + len(held) == self.num_blocks, "a block is lost"
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        assert evictable <= self._key_of.keys()
        assert free.isdisjoint(self._key_of)
