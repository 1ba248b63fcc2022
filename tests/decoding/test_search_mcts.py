"""Monte-Carlo tree search: selection, expansion, roll-out and backing up, by hand and against a plain reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.scorers.spec import Hypothesis
from decoding.search.mcts import KIND, Mcts, Node, run
from decoding.search.verbs import Branch, Outcome
from tests.scripted import Script, ScriptedSearch

Go = Callable[[str, int, bool], str]


def mcts(**params: Any) -> Mcts:
    return Mcts("prm", **{"separator": "|", **params})


def searching(go: Go, scores: Any, **search: Any) -> ScriptedSearch:
    def score(hypothesis: Hypothesis, scorer: Any) -> list[float]:
        assert scorer == "prm"
        found = scores(hypothesis.text) if callable(scores) else scores[hypothesis.text]
        return found if isinstance(found, list) else [found]

    return ScriptedSearch(Script(go=go, scores=score), **search)


def drive(search: ScriptedSearch, params: Mcts) -> Outcome:
    outcome = search.drive(run(search, params))
    assert search.live == {each.branch for each in outcome.candidates}, "what is not returned is dropped"
    return outcome


def texts(outcome: Outcome) -> list[str]:
    return [each.branch.text for each in outcome.candidates]


def letters(text: str, index: int, greedy: bool) -> str:
    return "g|" if greedy else "abcdef"[index] + "|"


def test_two_iterations_by_hand() -> None:
    """The first rolls out from b, 0.6 -> 0.5 * 0.6 + 0.5 * 0.8 = 0.7, and the root becomes 0.7.

    Then UCT: a is unvisited, 0.5 + 1; b has 0.7 + 0.4 sqrt(2 ln 1 / 1) = 0.7. So a is expanded; its child aa is rolled
    out, 0.3 -> 0.5 * 0.3 + 0.5 * 0.1 = 0.2; a becomes 0.2, the root (0.2 + 0.7) / 2.
    """
    scores = {"a|": 0.5, "b|": 0.6, "b|g|": 0.8, "b|g|g|": 0.4}
    scores |= {"a|a|": 0.3, "a|b|": 0.25, "a|a|g|": 0.05, "a|a|g|g|": 0.1}
    search = searching(letters, scores)
    outcome = drive(search, mcts(branch=2, iterations=2))
    assert search.calls == [
        [("fork", "", 2)],
        [("drop", "")],
        [("run", "", "a|"), ("run", "", "b|")],
        [("score", "a|", 0.5), ("score", "b|", 0.6)],
        [("fork", "b|", 1)],
        [("greedy", "b|", "g|")],
        [("score", "b|g|", 0.8)],
        [("greedy", "b|g|", "g|")],
        [("score", "b|g|g|", 0.4)],
        [("drop", "b|g|g|")],
        [("fork", "a|", 2)],
        [("drop", "a|")],
        [("run", "a|", "a|"), ("run", "a|", "b|")],
        [("score", "a|a|", 0.3), ("score", "a|b|", 0.25)],
        [("fork", "a|a|", 1)],
        [("greedy", "a|a|", "g|")],
        [("score", "a|a|g|", 0.05)],
        [("greedy", "a|a|g|", "g|")],
        [("score", "a|a|g|g|", 0.1)],
        [("drop", "a|a|g|g|")],
    ]
    assert texts(outcome) == ["b|", "a|b|", "a|a|"]
    assert [each.score for each in outcome.candidates] == pytest.approx([0.7, 0.25, 0.2])
    assert outcome.reason.startswith("No hypothesis reached its end: 'iterations' is 2.")
    assert search.messages == ["iteration 1 of 2", "iteration 2 of 2"]
    assert outcome.details == {"iterations": 2}


def test_uct_is_its_formula() -> None:
    parent = Node(Branch(), visits=5)
    assert Node(Branch(), parent, value=0.25).uct(0.4) == 1.25
    assert Node(Branch(), parent, value=0.25, visits=2).uct(0.4) == pytest.approx(0.25 + 0.4 * math.sqrt(math.log(5)))
    assert Node(Branch(), parent, value=0.25, visits=2).uct(0.0) == 0.25


# -- against a plain reference ----------------------------------------------------------------------------------------


def world(seed: int) -> tuple[Go, Callable[[str], float]]:
    """Steps of one of three letters, texts that end now and then, values with ties."""

    def go(text: str, index: int, greedy: bool) -> str:
        rng = random.Random(f"{seed} {text} {index if not greedy else 'greedy'}")
        return rng.choice("abc") + ("$" if text.count("|") and rng.random() < 0.35 else "|")

    def score(text: str) -> float:
        return random.Random(f"{seed} {text}").randrange(8) / 8

    return go, score


def reference(go: Go, score: Callable[[str], float], params: Mcts) -> list[tuple[str, float]]:
    """ReST-MCTS* on plain texts: dicts of value, visits, children, parent. Finished texts end with $."""
    value, visits, children = {"": 0.0}, {"": 0}, dict[str, list[str]]()
    parent: dict[str, str | None] = {"": None}
    rolled: dict[str, float] = {}
    forks: dict[str, int] = {}  # a roll-out is a child, too, and takes an index

    def uct(text: str) -> float:
        if visits[text] == 0:
            return value[text] + 1.0
        above = visits[parent[text] or ""]
        return value[text] + params.c * math.sqrt(2 * math.log(above) / visits[text])

    for _ in range(params.iterations):
        node = ""
        while children.get(node):
            node = max(children[node], key=uct)
        if not node.endswith("$"):
            sampled = [node + go(node, i + forks.get(node, 0), False) for i in range(params.branch)]
            children[node] = list(dict.fromkeys(sampled))
            for child in children[node]:
                value[child], visits[child], parent[child] = score(child.rstrip("$")), 0, node
            best = max(children[node], key=value.__getitem__)
            text, seen = best, []
            while len(seen) < params.rollout_steps and not text.endswith("$"):
                text += go(text, 0, True)
                seen.append(score(text.rstrip("$")))
            forks[best] = len(seen[:1])
            if seen and text.endswith("$"):
                rolled.setdefault(text, seen[-1])
            value[best] = (1 - params.alpha) * value[best] + params.alpha * max(seen, default=value[best])
            visits[best] += 1
        up: str | None = node
        while up is not None:
            visits[up] += 1
            below = [child for child in children.get(up, ()) if visits[child]]
            if below:
                total = sum(visits[child] for child in below)
                value[up] = sum(value[child] * visits[child] for child in below) / total
            up = parent[up]
        ended = [value[text] for text in value if text.endswith("$")]
        if max([*ended, *rolled.values()], default=0.0) >= params.end_value:
            break
    found = {text: each for text, each in value.items() if text not in children}
    for text, each in rolled.items():
        found[text] = max(each, found.get(text, 0.0))
    return sorted(found.items(), key=lambda each: (not each[0].endswith("$"), -each[1], each[0]))


@pytest.mark.parametrize("seed", range(40))
def test_it_is_its_definition(seed: int) -> None:
    go, score = world(seed)
    for params in (mcts(iterations=12, branch=3), mcts(iterations=8, branch=2, c=1.5, alpha=0.2, rollout_steps=3)):
        outcome = drive(searching(go, score), params)
        found = [(each.branch.text + "$" * (each.branch.finished == "stop"), each.score) for each in outcome.candidates]
        found.sort(key=lambda each: (not each[0].endswith("$"), -(each[1] or 0.0), each[0]))
        assert found == [(text, pytest.approx(value)) for text, value in reference(go, score, params)]


def test_the_reference_sees_wrong_rules() -> None:
    """Were c, alpha or the roll-outs others, most trees would differ."""
    params = mcts(iterations=12, end_value=2.0)
    for change in ({"c": 0.0}, {"alpha": 0.0}, {"rollout_steps": 1}):
        differ = 0
        for seed in range(20):
            go, score = world(seed)
            other = mcts(iterations=12, end_value=2.0, **change)
            differ += reference(go, score, params) != reference(go, score, other)
        assert differ >= 10, change


# -- rules ------------------------------------------------------------------------------------------------------------


def ending(text: str, index: int, greedy: bool) -> str:
    """a ends at once; b and c go on."""
    return "g|" if greedy else ["a$", "b|", "c|"][index % 3]


def test_it_stops_at_an_answer_that_is_good_enough() -> None:
    search = searching(ending, lambda text: 0.95 if text == "a" else 0.1)
    outcome = drive(search, mcts(iterations=50))
    assert texts(outcome)[0] == "a"
    assert outcome.details == {"iterations": 1}
    assert outcome.reason == ""


@pytest.mark.parametrize(("end_value", "rounds"), [(0.5, 1), (0.51, 4)])
def test_the_value_that_is_good_enough_is_a_bound(end_value: float, rounds: int) -> None:
    search = searching(ending, lambda text: 0.5 if text == "a" else 0.1)
    outcome = drive(search, mcts(iterations=4, end_value=end_value))
    assert outcome.details == {"iterations": rounds}


def test_a_roll_out_that_is_good_enough_ends_it() -> None:
    by = lambda text: 0.95 if "z" in text else 0.4  # noqa: E731
    outcome = drive(searching(lambda text, i, greedy: "z$" if greedy else "ab"[i] + "|", by), mcts(branch=2))
    assert texts(outcome)[0] == "a|z"
    assert outcome.details == {"iterations": 1}


def test_a_good_step_is_no_answer() -> None:
    """However high its value, a text that goes on does not end the search."""
    search = searching(lambda text, i, greedy: "g|" if text.count("|") < 3 else "z$", lambda text: 0.99)
    outcome = drive(search, mcts(iterations=9, rollout_steps=0))
    assert texts(outcome)[0] == "g|g|g|z"


def test_a_chosen_answer_is_visited_once_more_and_nothing_else() -> None:
    """Without exploration a is chosen again and again once b and c were visited; nothing is forked for it."""
    search = searching(ending, lambda text: 0.5 if text == "a" else 0.1)
    outcome = drive(search, mcts(iterations=9, c=0.0))
    assert outcome.details == {"iterations": 9}
    forked = [call[1] for batch in search.calls for call in batch if call[0] == "fork" and call[2] == 3]
    assert forked == ["", "b|", "c|"]
    assert (texts(outcome)[0], outcome.candidates[0].score) == ("a", 0.5)


def test_the_best_answer_wins_over_better_steps() -> None:
    search = searching(ending, lambda text: 0.2 if text == "a" else 0.8)
    outcome = drive(search, mcts(iterations=1))
    assert texts(outcome)[0] == "a"
    assert outcome.reason == ""
    assert [each.note for each in outcome.candidates] == ["", "unfinished", "unfinished"]


def test_a_roll_out_that_ends_is_an_answer() -> None:
    by = lambda text: 0.7 if "z" in text else 0.4  # noqa: E731
    search = searching(lambda text, i, greedy: "z$" if greedy else "ab"[i] + "|", by)
    outcome = drive(search, mcts(iterations=1, branch=2))
    assert texts(outcome) == ["a|z", "a|", "b|"]
    assert [each.score for each in outcome.candidates] == pytest.approx([0.7, 0.55, 0.4])
    assert sum(batch[0][0] == "greedy" for batch in search.calls) == 1


def test_an_answer_that_was_found_twice_is_told_once() -> None:
    """By a roll-out of a, and by its expansion: the leaf is told, the roll-out is dropped."""
    search = searching(lambda text, i, greedy: "ab"[i] + "|" if not text else "z$", lambda text: 0.5)
    outcome = drive(search, mcts(iterations=3, branch=2))
    assert [(e.branch.text, e.branch.path) for e in outcome.candidates] == [("a|z", (0, 1)), ("b|z", (1, 0))]
    assert search.calls[-1] == [("drop", "a|z")]


def test_equal_steps_are_one_child() -> None:
    search = searching(lambda text, i, greedy: "g|" if greedy else "aab"[i] + "|", lambda text: 0.5)
    outcome = drive(search, mcts(iterations=1))
    assert texts(outcome) == ["a|", "b|"]
    assert search.calls[3] == [("drop", "a|")]


def test_scores_of_steps_are_aggregated() -> None:
    steps = {"a|": [0.1, 0.9], "b|": [0.5, 0.6], "c|": [0.2, 0.3]}
    by = lambda text: steps.get(text, [0.0])  # noqa: E731
    for how, best in (("last", "a|"), ("min", "b|")):
        search = searching(letters, by)
        drive(search, mcts(iterations=1, aggregate=how))
        assert search.calls[4] == [("fork", best, 1)]


def test_a_step_without_a_score_has_the_value_0() -> None:
    search = searching(ending, lambda text: [] if text == "a" else 0.1)
    assert drive(search, mcts(iterations=1, rollout_steps=0)).candidates[0].score == 0.0


def test_where_all_are_cut_the_best_is_given_with_a_reason() -> None:
    search = searching(lambda text, i, _: "abc"[i] * 9, lambda text: text[0] == "b", sampling=Sampling(max_tokens=5))
    outcome = drive(search, mcts(iterations=3))
    assert texts(outcome) == ["bbbbb", "aaaaa", "ccccc"]
    assert "all of them were cut by 'max_tokens'" in outcome.reason


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_without_candidates_it_ends_with_what_there_is() -> None:
    search = searching(letters, lambda text: 0.5, max_candidates=2)
    outcome = drive(search, mcts(iterations=5))
    assert texts(outcome) == ["a|", "b|"]
    assert "'max_candidates' is used up" in outcome.reason
    search = searching(letters, lambda text: 0.5, max_candidates=0)
    assert [each.branch for each in drive(search, mcts()).candidates] == [search.root]


def test_a_budget_of_tokens_ends_it_with_what_there_is() -> None:
    search = searching(letters, lambda text: 0.5, max_tokens=7)
    outcome = drive(search, mcts(iterations=5))
    assert texts(outcome) == ["a|", "b|", "c|"]
    assert outcome.details == {"iterations": 1}
    assert {each.note for each in outcome.candidates} == {"cut by max_total_tokens"}
    assert "'max_total_tokens' is used up" in outcome.reason


def test_a_deep_tree_is_no_trouble() -> None:
    search = searching(lambda text, i, greedy: "a|", lambda text: 0.5, sampling=Sampling(max_tokens=10_000))
    outcome = drive(search, mcts(iterations=1500, branch=1, rollout_steps=0))
    assert texts(outcome) == ["a|" * 1500]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (mcts(iterations=0), "iterations"),
        (mcts(branch=0), "branch"),
        (mcts(branch=65), "branch"),
        (mcts(c=-0.1), "c"),
        (mcts(alpha=1.1), "alpha"),
        (mcts(rollout_steps=-1), "rollout_steps"),
        (mcts(end_value=math.nan), "end_value"),
        (mcts(separator=""), "separator"),
        (mcts(step_tokens=0), "step_tokens"),
    ],
)
def test_parameters_out_of_range_are_refused(params: Mcts, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        KIND.check(params, Sampling())
    assert refused.value.param == param


def test_the_kind_says_what_it_takes() -> None:
    params = Mcts("prm")
    KIND.check(params, Sampling())
    assert (params.iterations, params.branch, params.c, params.alpha) == (20, 3, 0.4, 0.5)
    assert (params.rollout_steps, params.end_value) == (2, 0.9)
    assert KIND.temperature == 0.7
    assert KIND.independent(params) == 3
    assert KIND.scorers(params) == ("prm",)
