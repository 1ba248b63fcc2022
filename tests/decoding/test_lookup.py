"""Lookups against a plain search, and drafts from a prediction."""

from __future__ import annotations

import random

from decoding.lookup import Lookup


def search(text: list[int], longest: int, count: int) -> list[int]:
    """What followed the last earlier occurrence of the longest recent run, found the slow way."""
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == tail:
                return text[start + size : start + size + count]
    return []


def test_ngrams_are_what_a_plain_search_finds() -> None:
    rng = random.Random(0)
    for _ in range(30):
        longest = rng.randint(1, 4)
        text = [rng.randrange(4) for _ in range(rng.randint(1, 12))]
        lookup = Lookup(text, longest)
        for _ in range(40):
            assert lookup.propose(5) == search(text, longest, 5)
            text.append(rng.randrange(4))
            lookup.push(text[-1])


def test_a_prediction_is_followed_left_and_found_again() -> None:
    lookup = Lookup([9, 9], 3, [1, 2, 3, 4, 5, 6])
    assert lookup.propose(4) == [1, 2, 3, 4]
    lookup.push(1)
    lookup.push(2)
    assert lookup.propose(9) == [3, 4, 5, 6]
    lookup.push(7)  # not what was predicted
    assert lookup.propose(2) == []
    lookup.push(4)
    assert lookup.propose(9) == [5, 6]
    lookup.push(5)
    lookup.push(6)
    assert lookup.propose(3) == []


def test_a_prediction_never_proposes_the_prompt() -> None:
    assert Lookup([1, 2, 3, 1, 2], 3, [8]).propose(3) == [8]
    assert Lookup([1, 2, 3, 1, 2], 3).propose(3) == [3, 1, 2]
    assert Lookup([], 2).propose(3) == []
