"""Lookups against a plain search, and drafts from a prediction."""

from __future__ import annotations

import random

from decoding.lookup import Lookup, Source


def search(text: list[int], longest: int, count: int) -> list[int]:
    """What followed the last earlier occurrence of the longest recent run, found the slow way; copies go on."""
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == tail:
                whole = list(text)
                for i in range(count):
                    whole.append(whole[start + size + i])
                return whole[len(text) :]
    return []


def test_ngrams_are_what_a_plain_search_finds() -> None:
    rng = random.Random(0)
    for _ in range(30):
        longest = rng.randint(1, 4)
        text = [rng.randrange(4) for _ in range(rng.randint(1, 12))]
        lookup = Lookup(list(text), Source(list(text)), longest)
        for _ in range(40):
            assert lookup.propose(5) == search(text, longest, 5)
            text.append(rng.randrange(4))
            lookup.push(text[-1])


def test_repetitions_go_on() -> None:
    assert Lookup([1, 2, 3, 1], Source([1, 2, 3, 1]), 3).propose(7) == [2, 3, 1, 2, 3, 1, 2]
    assert Lookup([7] * 5, Source([7] * 5), 3).propose(4) == [7] * 4


def test_a_prediction_is_followed_left_and_found_again() -> None:
    lookup = Lookup([9, 9], Source([1, 2, 3, 4, 5, 6]), 3, predicted=True)
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
    assert Lookup([1, 2, 3, 1, 2], Source([8]), 3, predicted=True).propose(3) == [8]
    assert Lookup([], Source([]), 2).propose(3) == []


def test_choices_share_one_index_and_keep_their_own_texts() -> None:
    source = Source([1, 2, 3])
    one, two = (Lookup([1, 2, 3], source, 2) for _ in range(2))
    one.push(1)
    two.push(2)
    assert one.propose(2) == [2, 3]
    assert two.propose(2) == [3, 2]
