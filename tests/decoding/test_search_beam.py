"""Beam search over steps, as subtrees, with a look ahead: the calls it makes, whom it keeps, how it ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.scorers.spec import Hypothesis
from decoding.search.beam import BEAM, DVTS, LOOKAHEAD, Beam, Lookahead, run, run_subtrees
from decoding.search.common import distinct
from decoding.search.verbs import Branch, Outcome
from tests.scripted import Script, ScriptedSearch


def beam(n: int, width: int, **params: Any) -> Beam:
    return Beam("prm", n, width, **{"separator": "|", **params})


def searching(go: Callable[..., str], scores: Any, **search: Any) -> ScriptedSearch:
    """Scores: a text's number, or one per step."""

    def score(hypothesis: Hypothesis, scorer: Any) -> list[float]:
        assert scorer == "prm"
        found = scores(hypothesis.text) if callable(scores) else scores[hypothesis.text]
        return found if isinstance(found, list) else [found]

    return ScriptedSearch(Script(go=go, scores=score), **search)


def drive(search: ScriptedSearch, params: Beam, how: Any = run) -> Outcome:
    outcome = search.drive(how(search, params))
    assert search.live == {each.branch for each in outcome.candidates}, "what is not returned is dropped"
    return outcome


def texts(outcome: Outcome) -> list[str]:
    return [each.branch.text for each in outcome.candidates]


def letters(text: str, index: int, greedy: bool) -> str:
    """A step of a letter by its index, then an end by its index."""
    return "abcdefgh"[index] + "|" if not text else "stuvwxyz"[index] + "$"


def test_the_calls_and_survivors_of_two_steps() -> None:
    scores = {"a|": 0.1, "b|": 0.9, "c|": 0.5, "d|": 0.3, "b|s": 0.4, "b|t": 0.7, "c|s": 0.8, "c|t": 0.2}
    search = searching(letters, scores)
    outcome = drive(search, beam(4, 2))
    assert search.calls == [
        [("fork", "", 4)],
        [("drop", "")],
        [("run", "", "a|"), ("run", "", "b|"), ("run", "", "c|"), ("run", "", "d|")],
        [("score", "a|", 0.1), ("score", "b|", 0.9), ("score", "c|", 0.5), ("score", "d|", 0.3)],
        [("drop", "a|"), ("drop", "d|")],
        [("fork", "b|", 2), ("fork", "c|", 2)],
        [("drop", "b|"), ("drop", "c|")],
        [("run", "b|", "s"), ("run", "b|", "t"), ("run", "c|", "s"), ("run", "c|", "t")],
        [("score", "b|s", 0.4), ("score", "b|t", 0.7), ("score", "c|s", 0.8), ("score", "c|t", 0.2)],
    ]
    assert texts(outcome) == ["c|s", "b|t", "b|s", "c|t"]
    assert [each.branch.path for each in outcome.candidates] == [(2, 0), (1, 1), (1, 0), (2, 1)]
    assert [each.score for each in outcome.candidates] == [0.8, 0.7, 0.4, 0.2]
    assert outcome.reason == ""
    assert search.messages == ["step 1: 0 completed, 2 kept", "step 2: 4 completed, 0 kept"]


# -- against a plain reference ----------------------------------------------------------------------------------------


def world(seed: int) -> tuple[Callable[..., str], Callable[[str], float]]:
    """Steps of one of three letters, texts that end now and then, scores with ties: all by the text and the index."""

    def go(text: str, index: int, greedy: bool) -> str:
        rng = random.Random(f"{seed} {text} {index} {greedy}")
        return rng.choice("abc") + ("$" if text.count("|") and rng.random() < 0.3 else "|")

    def score(text: str) -> float:
        return random.Random(f"{seed} {text}").randrange(5) / 4

    return go, score


Found = list[tuple[str, bool, float]]


def reference(go: Callable[..., str], score: Callable[[str], float], params: Beam, first: int = 0) -> Found:
    """Beam search on plain texts: (text, whether it ended, score), best first."""
    pool = [("", first + i) for i in range(params.n)]
    done: Found = []
    for step in range(params.max_steps):
        grown = list(dict.fromkeys(text + go(text, index, False) for text, index in pool))
        done += [(text[:-1], True, score(text[:-1])) for text in grown if text.endswith("$")]
        rest = sorted((text for text in grown if not text.endswith("$")), key=lambda text: -score(text))
        kept = rest[: params.n // params.width] if len(done) < params.n else []
        if not kept or step == params.max_steps - 1:
            break
        pool = [(text, i) for text in kept for i in range(params.width)]
    return sorted(done, key=lambda each: -each[2]) + [(text, False, score(text)) for text in kept]


def found_by(outcome: Outcome) -> Found:
    return [(each.branch.text, each.branch.finished == "stop", each.score or 0.0) for each in outcome.candidates]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_its_definition(seed: int) -> None:
    go, score = world(seed)
    for params in (beam(6, 2, max_steps=5), beam(4, 4, max_steps=5), beam(3, 1, max_steps=4)):
        assert found_by(drive(searching(go, score), params)) == reference(go, score, params)


def test_the_reference_sees_wrong_rules() -> None:
    """Were the worst kept, or one too few, most outcomes would differ."""
    params = beam(6, 2, max_steps=5)
    worst = fewer = 0
    for seed in range(40):
        go, score = world(seed)
        right = reference(go, score, params)
        worst += right != [(t, s, score(t)) for t, s, _ in reference(go, lambda text, f=score: -f(text), params)]
        fewer += right != found_by(drive(searching(go, score), beam(6, 3, max_steps=5)))
    assert worst > 30
    assert fewer > 30


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lookahead", [0, 1])
def test_subtrees_are_separate_beam_searches(seed: int, lookahead: int) -> None:
    """n / width runs of beam search with n = width, whose first branches have the same paths."""
    go, score = world(seed)
    params = beam(6, 2, max_steps=4, lookahead=lookahead)
    together = searching(go, score)
    outcome = drive(together, params, run_subtrees)
    apart: list[Any] = []
    calls: list[Any] = []
    for k in range(3):
        alone = searching(go, score, root=Branch(children=2 * k))
        apart += drive(alone, beam(2, 2, max_steps=4, lookahead=lookahead)).candidates
        calls += [call for batch in alone.calls[2:] for call in batch]
    apart.sort(key=lambda each: (each.branch.finished != "stop", -(each.score or 0.0)))

    def told(candidates: Any) -> list[Any]:
        return [(e.branch.path, e.branch.text, e.branch.finished, e.score, e.note) for e in candidates]

    assert told(outcome.candidates) == told(apart)
    assert sorted(calls, key=repr) == sorted((call for batch in together.calls[2:] for call in batch), key=repr)


def test_subtrees_do_not_compete() -> None:
    """The two best first steps are in one subtree: beam search keeps both, subtrees keep one each."""
    scores = {"a|": 0.9, "b|": 0.8, "c|": 0.2, "d|": 0.1}
    go = letters
    by = lambda text: scores.get(text, 0.5)  # noqa: E731
    assert {text[0] for text in texts(drive(searching(go, by), beam(4, 2)))} == {"a", "b"}
    assert {text[0] for text in texts(drive(searching(go, by), beam(4, 2), run_subtrees))} == {"a", "c"}


def test_the_best_of_all_subtrees_wins() -> None:
    by = lambda text: {"c|t": 0.9}.get(text, 0.5)  # noqa: E731
    outcome = drive(searching(letters, by), beam(4, 2), run_subtrees)
    assert texts(outcome) == ["c|t", "a|s", "a|t", "c|s"]


# -- rules ------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_index() -> None:
    search = searching(letters, lambda text: 0.5)
    assert texts(drive(search, beam(4, 2))) == ["a|s", "a|t", "b|s", "b|t"]


@pytest.mark.parametrize(("how", "kept"), [("last", "a"), ("min", "b"), ("prod", "c"), ("mean", "d")])
def test_scores_of_steps_are_aggregated(how: Any, kept: str) -> None:
    steps = {"a": [0.1, 0.2, 0.95], "b": [0.6, 0.6, 0.6], "c": [0.5, 0.7, 0.9], "d": [0.34, 0.95, 0.94]}
    outcome = drive(searching(letters, lambda text: steps[text[0]]), beam(4, 4, aggregate=how))
    assert texts(outcome)[0] == kept + "|s"
    assert list(outcome.candidates[0].scores) == steps[kept]


def test_equal_texts_are_merged_before_they_are_scored_and_kept() -> None:
    """Three of four are the same and best: two different ones are kept, not the same one twice."""
    search = searching(lambda text, i, _: "aaba"[i] + "|" if not text else "stuv"[i] + "$", lambda text: text < "b")
    outcome = drive(search, beam(4, 2))
    assert search.calls[3] == [("drop", "a|"), ("drop", "a|")]
    assert search.calls[4] == [("score", "a|", True), ("score", "b|", False)]
    assert {text[0] for text in texts(outcome)} == {"a", "b"}


def test_an_ended_text_is_no_duplicate_of_one_that_goes_on() -> None:
    branches = [Branch(text="a"), Branch(text="a", finished="stop"), Branch(text="b"), Branch(text="a")]
    assert distinct(branches) == (branches[:3], branches[3:])


def test_what_has_ended_leaves_the_pool_with_its_score() -> None:
    """The ended one is best, and the next best is kept all the same; in the end the ended one wins."""
    go = lambda text, i, _: ["a$", "b|", "c|", "d|"][i] if not text else "z$"  # noqa: E731
    search = searching(go, {"a": 0.9, "b|": 0.8, "c|": 0.1, "d|": 0.7, "b|z": 0.3, "d|z": 0.2})
    outcome = drive(search, beam(4, 2))
    assert [call for batch in search.calls for call in batch if call[0] == "fork"][1:] == [
        ("fork", "b|", 2),
        ("fork", "d|", 2),
    ]
    assert texts(outcome) == ["a", "b|z", "d|z"]


def test_it_ends_once_n_are_complete() -> None:
    """One of two goes on for ever; with two complete it is dropped."""
    search = searching(lambda text, i, _: "ab"[i] + ("$" if i else "|"), lambda text: 0.5)
    outcome = drive(search, beam(2, 2))
    assert texts(outcome) == ["b", "a|b"]
    assert outcome.details == {"steps": 2}


def test_a_cut_beam_cannot_win_over_one_that_ended() -> None:
    go = lambda text, i, _: ["aaaaaaaa", "b$"][i]  # noqa: E731
    search = searching(go, {"aaaaa": 0.9, "b": 0.1}, sampling=Sampling(max_tokens=5))
    outcome = drive(search, beam(2, 2))
    assert texts(outcome) == ["b", "aaaaa"]
    assert outcome.candidates[1].note == "cut by max_tokens or the context"
    assert outcome.reason == ""


def test_a_cut_beam_takes_nobodys_place() -> None:
    """Of three, the best is cut; the next best is still kept."""
    go = lambda text, i, _: ["aaaaaaaa", "b|", "c|"][i] if not text else "z$"  # noqa: E731
    search = searching(go, {"aaaaa": 0.9, "b|": 0.5, "c|": 0.6, "c|z": 0.1}, sampling=Sampling(max_tokens=5))
    assert texts(drive(search, beam(3, 3))) == ["c|z", "aaaaa"]


def test_where_all_are_cut_the_best_is_given_with_a_reason() -> None:
    search = searching(lambda text, i, _: "ab"[i] * 9, lambda text: text[0] == "b", sampling=Sampling(max_tokens=5))
    outcome = drive(search, beam(2, 1))
    assert texts(outcome) == ["bbbbb", "aaaaa"]
    assert "all of them were cut by 'max_tokens'" in outcome.reason


def test_where_none_ends_in_time_the_best_is_given_with_a_reason() -> None:
    search = searching(lambda text, i, _: "ab"[i] + "|", lambda text: text.count("b"))
    outcome = drive(search, beam(2, 2, max_steps=3))
    assert texts(outcome) == ["b|b|b|"]
    assert outcome.candidates[0].note == "unfinished"
    assert outcome.reason == ("No hypothesis reached its end: 'max_steps' is 3. The answer is the best unfinished one.")
    assert sum(batch[0][0] == "fork" for batch in search.calls) == 3, "after the last step nothing is forked"


def test_steps_of_so_many_tokens() -> None:
    search = searching(lambda text, i, _: "a|bcd$"[len(text) :], lambda text: 0.5)
    drive(search, beam(1, 1, step_tokens=2))
    assert [call[2] for batch in search.calls for call in batch if call[0] == "run"] == ["a|", "bc", "d"]


def test_a_text_without_a_score_is_kept_last() -> None:
    search = searching(letters, lambda text: [] if text == "a|" else 0.1 if text == "b|" else 0.5)
    assert texts(drive(search, beam(2, 2)))[0] == "b|s"


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_without_candidates_left_those_kept_go_on_alone() -> None:
    """4 + 1 branches: the best one is continued once by a fork, the next by itself."""
    scores = {"a|": 0.1, "b|": 0.9, "c|": 0.5, "d|": 0.3}
    search = searching(letters, lambda text: scores.get(text, 0.5), max_candidates=5)
    outcome = drive(search, beam(4, 2))
    assert [(e.branch.text, e.branch.path) for e in outcome.candidates] == [("b|s", (1, 0)), ("c|u", (2,))]
    assert outcome.reason == "The search was cut short: 'max_candidates' is used up."


def test_fewer_first_branches_than_asked() -> None:
    search = searching(letters, lambda text: 0.5, max_candidates=3)
    assert texts(drive(search, beam(4, 2), run_subtrees)) == ["a|s", "c|u"]
    search = searching(letters, lambda text: 0.5, max_candidates=0)
    outcome = drive(search, beam(4, 2))
    assert texts(outcome) == ["a|s"]
    assert outcome.candidates[0].branch is search.root


def test_a_budget_of_tokens_ends_it_with_what_there_is() -> None:
    """Eight tokens are the first step; the second is cut in its first branch."""
    scores = {"a|": 0.1, "b|": 0.9, "c|": 0.5, "d|": 0.3}
    search = searching(
        lambda text, i, _: "abcd"[i] + "|" if not text else "xyz|", lambda text: scores.get(text, 0.95), max_tokens=10
    )
    outcome = drive(search, beam(4, 2))
    assert texts(outcome)[0] == "b|xy"
    assert {each.note for each in outcome.candidates} == {"cut by max_total_tokens"}
    assert outcome.reason.startswith("No hypothesis reached its end: 'max_total_tokens' is used up.")
    assert sum(batch[0][0] == "run" for batch in search.calls) == 2


# -- look ahead -------------------------------------------------------------------------------------------------------


def trap(text: str, index: int, greedy: bool) -> str:
    """`a` looks better now, and leads to x; `b` leads to y."""
    if greedy:
        return {"a|": "x|", "b|": "y|"}.get(text, "g|")
    return "ab"[index] + "|" if not text else "z$"


AHEAD = {"a|": 0.9, "b|": 0.1, "a|x|": 0.2, "b|y|": 0.8, "a|x|g|": 0.7, "b|y|g|": 0.3}


@pytest.mark.parametrize(("lookahead", "kept"), [(0, "a"), (1, "b"), (2, "a")])
def test_a_look_ahead_changes_the_choice(lookahead: int, kept: str) -> None:
    search = searching(trap, lambda text: AHEAD.get(text, 0.5))
    assert texts(drive(search, beam(2, 2, lookahead=lookahead))) == [kept + "|z"]


def test_a_look_ahead_is_a_fork_that_is_dropped() -> None:
    search = searching(trap, lambda text: AHEAD.get(text, 0.5))
    drive(search, Lookahead("prm", 2, 2, separator="|"))
    assert search.calls[2:9] == [
        [("run", "", "a|"), ("run", "", "b|")],
        [("fork", "a|", 1), ("fork", "b|", 1)],
        [("greedy", "a|", "x|"), ("greedy", "b|", "y|")],
        [("score", "a|x|", 0.2), ("score", "b|y|", 0.8)],
        [("drop", "a|x|"), ("drop", "b|y|")],
        [("drop", "a|")],
        [("fork", "b|", 2)],
    ]


def test_a_look_ahead_ends_where_the_text_does() -> None:
    search = searching(
        lambda text, i, greedy: "x$" if greedy else "ab"[i] + "|" if not text else "z$", lambda text: 0.5
    )
    drive(search, beam(2, 2, lookahead=3))
    assert sum(batch[0][0] == "greedy" for batch in search.calls) == 1


def test_the_scores_of_what_was_only_looked_at_are_not_told() -> None:
    search = searching(trap, lambda text: [0.5] * text.count("|"))
    outcome = drive(search, beam(2, 2, lookahead=1, max_steps=1))
    assert outcome.candidates[0].scores == (0.5,)


def test_without_candidates_for_it_a_step_is_scored_as_it_is() -> None:
    search = searching(trap, lambda text: AHEAD.get(text, 0.5), max_candidates=2)
    assert texts(drive(search, beam(2, 2, lookahead=1))) == ["a|z"]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (beam(0, 1), "n"),
        (beam(65, 1), "n"),
        (beam(4, 0), "width"),
        (beam(6, 4), "n"),
        (beam(2, 4), "n"),
        (beam(4, 2, max_steps=0), "max_steps"),
        (beam(4, 2, lookahead=-1), "lookahead"),
        (beam(4, 2, separator=""), "separator"),
        (beam(4, 2, step_tokens=0), "step_tokens"),
    ],
)
def test_parameters_out_of_range_are_refused(params: Beam, param: str) -> None:
    for kind in (BEAM, DVTS, LOOKAHEAD):
        with pytest.raises(BadRequest) as refused:
            kind.check(params, Sampling())
        assert refused.value.param == param


def test_kinds_say_what_they_take() -> None:
    for kind in (BEAM, DVTS, LOOKAHEAD):
        params = kind.params("prm")
        kind.check(params, Sampling())
        assert (params.n, params.width, params.max_steps, params.separator) == (4, 4, 40, "\n\n")
        assert kind.temperature == 0.8
        assert kind.independent(params) == 4
        assert kind.scorers(params) == ("prm",)
    assert (Beam("prm").lookahead, Lookahead("prm").lookahead) == (0, 1)
    BEAM.check(Beam("prm", 64, 64, separator="", step_tokens=5), Sampling())
