"""Draft lengths from measured costs and acceptance; the clock's estimates."""

from __future__ import annotations

import pytest

from decoding.core import Speculation
from decoding.pace import HOLD, MAX_TOKENS, STRETCH, Clock, Pace
from decoding.state import Sequence
from tests.decoding.test_accept import Sampling as Drawing
from tests.decoding.test_accept import sequence


def running(count: int, tokens: int | str = "auto") -> list[Sequence]:
    members = [sequence(Drawing(), Speculation("d", tokens, "rejection"), i) for i in range(count)]  # type: ignore[arg-type]
    for member in members:
        member.running = True
    return members


def clocked(target: float, draft: float, per_token: float = 0.0) -> Clock:
    """A target that takes `target` seconds and `per_token` for each token after the first, and a drafter."""
    clock = Clock()
    for size in (1, 2, 4, 8, 16, 64, 256):
        clock.saw(("forward", "m"), size, target + per_token * (size - 1))
        clock.saw(("draft", "d"), size, draft)
    return clock


def settle(pace: Pace, members: list[Sequence], acceptance: float, passes: int = 60) -> list[int]:
    """Lengths after passes in which each draft is accepted up to a fixed share of its tokens."""
    credit = [(i + 0.5) / len(members) for i in range(len(members))]
    for _ in range(passes):
        pace.assign(members)
        for i, member in enumerate(members):
            assert member.draft is not None
            wanted = member.draft.wanted // STRETCH  # drafts that nothing ends early would be too long
            if not wanted:
                continue
            accepted = 0
            for _ in range(wanted):
                credit[i] += acceptance
                if credit[i] < 1:
                    break
                credit[i] -= 1
                accepted += 1
            pace.learn(member, wanted, accepted)
    pace.assign(members)
    return [member.draft.wanted // STRETCH for member in members if member.draft]


def best_length(acceptance: float, target: float, draft: float, per_token: float) -> int:
    def rate(k: int) -> float:
        expected = sum(acceptance**i for i in range(k + 1))
        return expected / (k * draft + target + per_token * k)

    return max(range(MAX_TOKENS + 1), key=rate)


@pytest.mark.parametrize(
    ("acceptance", "target", "draft", "per_token"),
    [(0.9, 1.0, 0.05, 0.0), (0.8, 1.0, 0.1, 0.02), (0.7, 1.0, 0.3, 0.0), (0.2, 1.0, 0.6, 0.3)],
)
def test_one_stream_drafts_about_as_much_as_pays_most(
    acceptance: float, target: float, draft: float, per_token: float
) -> None:
    pace = Pace(clocked(target, draft, per_token))
    (length,) = settle(pace, running(1), acceptance)
    wanted = best_length(acceptance, target, draft, per_token)
    assert abs(length - min(wanted, MAX_TOKENS // STRETCH)) <= 1 + wanted // 3


def test_nothing_is_drafted_where_the_batch_keeps_the_machine_busy() -> None:
    """Every row costs as much as a pass of its own: drafts that may be refused can only lose."""
    assert settle(Pace(clocked(1.0, 0.2, per_token=1.0)), running(16), 0.8) == [0] * 16
    assert min(settle(Pace(clocked(1.0, 0.2, per_token=0.0)), running(16), 0.8)) > 0


def test_a_drafter_that_is_never_right_is_left_alone_but_for_rare_trials() -> None:
    pace, members = Pace(clocked(1.0, 0.1)), running(1)
    drafted = 0
    for _ in range(1000):
        pace.assign(members)
        draft = members[0].draft
        assert draft is not None
        if draft.wanted:
            drafted += draft.wanted
            pace.learn(members[0], draft.wanted, 0)
    assert 2 <= drafted <= 40


def test_sequences_that_accept_more_draft_more() -> None:
    pace, members = Pace(clocked(1.0, 0.05)), running(2)
    for _ in range(4 * HOLD):
        pace.assign(members)
        for member, share in zip(members, (1.0, 0.0), strict=True):
            assert member.draft is not None
            pace.learn(member, member.draft.wanted, round(share * member.draft.wanted))
    pace.assign(members)
    good, bad = (member.draft.wanted for member in members if member.draft)
    assert good > bad


def test_a_fixed_length_stays() -> None:
    pace, members = Pace(Clock()), running(3, tokens=5)
    settle(pace, members, 0.0)
    assert [member.draft.wanted for member in members if member.draft] == [5, 5, 5]


def test_a_draft_ends_where_the_next_token_would_hardly_be_reached() -> None:
    """Confident drafts nearly always pass, doubtful ones rarely: the chance is learned by confidence."""
    pace, (member,) = Pace(clocked(1.0, 0.05, 0.05)), running(1)
    assert member.draft is not None
    for _ in range(60):
        pace.assign([member])
        member.draft.confidence = [0.95, 0.95, 0.15, 0.95]
        pace.learn(member, 4, 2)
    pace.assign([member])
    assert pace.chance(member, 0.95) > 0.95
    assert pace.chance(member, 0.15) < 0.05
    assert pace.chance(member, 0.15) < member.draft.worth[3] < pace.chance(member, 0.95) ** 2


def test_the_clock_takes_the_least_of_the_last_and_draws_lines_between_sizes() -> None:
    clock = Clock()
    assert clock.estimate("x", 3) == 0.0
    for seconds in (9.0, 1.0, 2.0):
        clock.saw("x", 1, seconds)
    clock.saw("x", 5, 3.0)
    assert clock.estimate("x", 1) == 1.0
    assert clock.estimate("x", 3) == 2.0
    assert clock.estimate("x", 9) == 5.0
    for _ in range(4):
        clock.saw("x", 1, 4.0)
    assert clock.estimate("x", 1) == 4.0  # what was quick once, and is not any more, is forgotten
