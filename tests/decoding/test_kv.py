"""The block pool: counts, cache, eviction order, and a check that sees damage."""

from __future__ import annotations

import random

import pytest

from decoding.kv import BlockPool, OutOfBlocks, chain_key, root_key


def test_blocks_are_shared_cached_and_evicted_least_recently_used_first() -> None:
    pool = BlockPool(3, 4)
    a, b, c = (pool.allocate() for _ in range(3))
    with pytest.raises(OutOfBlocks):
        pool.allocate()
    keys = [chain_key(root_key("m"), [i] * 4) for i in range(3)]
    for block, key in zip((a, b, c), keys):
        pool.publish(block, key)
    pool.release([a])
    pool.release([b])
    assert pool.find(keys[0]) == a
    pool.share(a)  # used again: b is the older one now
    pool.check([[a], [c]])
    assert pool.allocate() == b
    assert pool.find(keys[1]) is None
    assert pool.hits == 1
    assert pool.queries == 2
    pool.check([[a], [b], [c]])


def test_the_end_of_a_chain_goes_before_its_start() -> None:
    pool = BlockPool(2, 4)
    chain = [pool.allocate(), pool.allocate()]
    for i, block in enumerate(chain):
        pool.publish(block, bytes([i]))
    pool.release(chain)
    assert pool.allocate() == chain[1]


def test_the_first_block_under_a_key_stays() -> None:
    pool = BlockPool(2, 4)
    a, b = pool.allocate(), pool.allocate()
    pool.publish(a, b"k")
    pool.publish(b, b"k")
    pool.release([a, b])
    assert pool.find(b"k") == a
    pool.check([])
    pool.clear_cache()
    assert pool.find(b"k") is None
    assert pool.used == 0
    pool.check([])


def test_keys_chain() -> None:
    assert chain_key(root_key("a", "b"), [1, 2]) != chain_key(root_key("ab"), [1, 2])
    assert root_key("a", "bc") != root_key("ab", "c")
    assert chain_key(b"p", [1, 2]) != chain_key(b"q", [1, 2])
    assert chain_key(b"p", (1, 2)) == chain_key(b"p", [1, 2])


def test_check_sees_a_leak_and_a_double_release() -> None:
    pool = BlockPool(4, 4)
    block = pool.allocate()
    with pytest.raises(AssertionError):
        pool.check([])
    with pytest.raises(AssertionError):
        pool.check([[block], [block]])
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])


def test_a_random_life_keeps_the_pool_whole() -> None:
    rng = random.Random(1)
    pool = BlockPool(20, 4)
    tables: list[list[int]] = []
    for step in range(3000):
        what = rng.random()
        if what < 0.5 and pool.available:
            tables.append([pool.allocate() for _ in range(rng.randint(1, min(3, pool.available)))])
            if rng.random() < 0.5:
                pool.publish(tables[-1][0], bytes(str(step % 37), "ascii"))
        elif what < 0.7 and tables:
            tables.append([pool.share(b) for b in rng.choice(tables)])
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
