"""The choice among searches: difficulty, rows, what is handed over, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.search import SEARCHES, auto
from decoding.search.auto import DEFAULT, Auto, AutoRow, build, pick, rate
from tests.scripted import Script, ScriptedSearch

TWO = AutoRow("best_of_n", {"n": "n", "vote": "majority"})


def tables(p: float) -> Script:
    """Greedy text "abc", every token of probability p; samples answer 1, 2, 2, 2, .."""
    return Script(
        go=lambda text, index, greedy: "abc$" if greedy else f"It is {min(index, 2)}.$",
        lp=lambda text, char: math.log(p),
        scores=lambda h, s: [0.25],
    )


@pytest.mark.parametrize(("p", "difficulty"), [(0.91, "easy"), (0.89, "medium"), (0.71, "medium"), (0.69, "hard")])
def test_a_short_greedy_text_says_how_hard_a_prompt_is(p: float, difficulty: str) -> None:
    search = ScriptedSearch(tables(p))
    outcome = search.drive(auto.run(search, Auto(n=3, probe_tokens=2, table=(TWO,))))
    assert search.calls == [
        [("fork", "", 1)],
        [("greedy", "", "ab")],
        [("drop", "ab")],
        [("fork", "", 3)],
        [("drop", "")],
        [("run", "", f"It is {i}.") for i in (1, 2, 2)],
    ]
    assert outcome.details["kind"] == "best_of_n"
    assert outcome.details["difficulty"] == difficulty
    assert outcome.details["measure"] == pytest.approx(p)
    assert [c.branch.text for c in outcome.candidates] == ["It is 2.", "It is 2.", "It is 1."]
    assert search.live == {c.branch for c in outcome.candidates}


def test_the_mean_is_geometric() -> None:
    script = replace_lp(tables(0.5), {"a": 0.9, "b": 0.4, "c": 0.6})
    search = ScriptedSearch(script)
    outcome = search.drive(auto.run(search, Auto(n=1, table=(TWO,))))
    assert outcome.details["measure"] == pytest.approx((0.9 * 0.4 * 0.6) ** (1 / 3))


def replace_lp(script: Script, p: dict[str, float]) -> Script:
    script.lp = lambda text, char: math.log(p.get(char, 0.5))
    return script


def test_or_a_scorer_says_it_of_the_whole_greedy_answer() -> None:
    search = ScriptedSearch(tables(0.99))
    outcome = search.drive(auto.run(search, Auto(n=2, scorer="rm", measure="score", hard=0.3, table=(TWO,))))
    assert search.calls[1:3] == [[("greedy", "", "abc")], [("score", "abc", 0.25)]]
    assert (outcome.details["measure"], outcome.details["difficulty"]) == (0.25, "hard")


def test_without_a_measure_it_is_medium() -> None:
    search = ScriptedSearch(tables(0.99), max_candidates=0)
    outcome = search.drive(auto.run(search, Auto(n=2, table=(TWO,))))
    assert outcome.details["difficulty"] == rate(Auto(), math.nan) == "medium"
    assert outcome.candidates[0].branch.text == "It is 0."
    assert (rate(Auto(), 0.9), rate(Auto(), 0.7)) == ("easy", "medium")


def test_the_first_row_whose_conditions_hold_is_used() -> None:
    rows = (
        AutoRow("sharpen", difficulty="easy", size="large"),
        AutoRow("beam", judges="steps", min_n=4),
        AutoRow("best_of_n", judges="nothing"),
        AutoRow("mcts"),
    )
    params = Auto(n=4, scorer="prm", table=rows)
    assert pick(params, "easy").kind == "beam"
    assert pick(replace(params, size="large"), "easy").kind == "sharpen"
    assert pick(replace(params, size="large"), "hard").kind == "beam"
    assert pick(replace(params, n=3), "hard").kind == "mcts"
    assert pick(replace(params, judges="answers"), "hard").kind == "mcts"
    assert pick(replace(params, scorer=None), "hard").kind == "best_of_n"
    with pytest.raises(BadRequest, match="size small, judges answers, n 4") as refused:
        pick(replace(params, judges="answers", table=rows[:3]), "hard")
    assert refused.value.param == "table"


def test_budget_and_scorer_are_put_in() -> None:
    kind, chosen = build(AutoRow("beam", {"n": "n", "width": 2}), Auto(n=6, scorer="prm"))
    assert (kind.name, chosen.n, chosen.width, chosen.scorer) == ("beam", 6, 2, "prm")
    _, own = build(AutoRow("beam", {"n": 4, "scorer": "other"}), Auto(scorer="prm"))
    assert (own.n, own.scorer) == (4, "other")


@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize(("scorer", "judges"), [(None, "steps"), ("prm", "steps"), ("rm", "answers")])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 64])
def test_the_default_table_serves_every_case(size: Any, scorer: str | None, judges: Any, n: int) -> None:
    params = Auto(n=n, scorer=scorer, judges=judges, size=size)
    auto.check(params, Sampling(temperature=0.8))
    assert set(auto.KIND.scorers(params)) <= {scorer, None}
    assert auto.KIND.independent(params) in (n, 1)
    assert not any(auto.KIND.models(params))


def test_every_row_of_the_default_table_is_reached() -> None:
    reached = [
        pick(Auto(n=n, scorer=scorer, judges=judges, size=size), difficulty)  # type: ignore[arg-type]
        for n in (1, 8)
        for scorer in (None, "x")
        for judges in ("steps", "answers")
        for size in ("small", "medium", "large")
        for difficulty in ("easy", "medium", "hard")
    ]
    assert all(row in reached for row in DEFAULT)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"n": 0}, "n", "from 1"),
        ({"probe_tokens": 0}, "probe_tokens", "at least 1"),
        ({"hard": 0.95}, "hard", "at most 'easy'"),
        ({"measure": "score"}, "measure", "only with a 'scorer'"),
        ({"table": (AutoRow("nothing"),)}, "table", "names 'nothing'; it may name"),
        ({"table": (AutoRow("auto"),)}, "table", "names 'auto'"),
        ({"table": (AutoRow("best_of_n", {"m": 3}),)}, "table", "has no 'm', but"),
        ({"table": (AutoRow("best_of_n", {"n": "n"}),)}, "table", "needs a 'scorer'"),
        ({"table": (AutoRow("beam", {"n": "n"}),)}, "table", "lacks a parameter"),
        ({"table": (AutoRow("beam", {"n": "n"}),), "scorer": "prm", "n": 6}, "n", "multiple of 'width'"),
        ({"table": (AutoRow("best_of_n", {"n": [4], "vote": "majority"}),)}, "table", "wrong type"),
        ({"table": (AutoRow("best_of_n", {"vote": "majority"}, min_n=9),)}, "table", "needs a row for"),
    ],
)
def test_it_refuses(change: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as refused:
        auto.check(Auto(**change), Sampling())
    assert refused.value.param == param


def test_what_a_row_needs_is_told_beforehand() -> None:
    row = AutoRow("cascade", {"small": "tiny", "references": ()})
    params = Auto(table=(row,))
    assert list(auto.KIND.models(params)) == ["tiny"] * 3
    assert auto.KIND.name in SEARCHES
