"""Best of n, votes and sharpening: the calls they make, and whom they choose."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.scorers.spec import Hypothesis
from decoding.search import SEARCHES
from decoding.search.best_of_n import KIND, SHARPEN, BestOfN, Sharpen, run, run_sharpen
from decoding.search.verbs import Outcome
from decoding.search.voting import squashed, weighted
from tests.scripted import Script, ScriptedSearch


def searching(texts: list[str], scores: dict[str, float | list[float]] | None = None, **search: Any) -> ScriptedSearch:
    """The i-th sample is the i-th text; scores by what is written, without the end."""

    def score(hypothesis: Any, scorer: Any) -> list[float]:
        assert scorer == "rm"
        found = (scores or {})[hypothesis.text]
        return found if isinstance(found, list) else [found]

    return ScriptedSearch(Script(go=lambda text, index, greedy: texts[index], scores=score), **search)


def chosen(outcome: Outcome) -> list[str]:
    return [each.branch.text for each in outcome.candidates]


def vote(texts: list[str], scores: list[float] | None = None, **params: Any) -> Outcome:
    """The outcome of a vote over samples (which are all different texts)."""
    search = searching(
        texts, None if scores is None else {t.rstrip("$"): s for t, s in zip(texts, scores, strict=True)}
    )
    scorer = None if scores is None else "rm"
    outcome = search.drive(run(search, BestOfN(len(texts), scorer, **params)))
    assert search.live == {each.branch for each in outcome.candidates}
    return outcome


def test_samples_are_run_and_scored_in_one_batch_each() -> None:
    search = searching(["a$", "b$", "c$"], {"a": 0.2, "b": 0.9, "c": 0.5})
    outcome = search.drive(run(search, BestOfN(3, "rm")))
    assert search.calls == [
        [("fork", "", 3)],
        [("drop", "")],
        [("run", "", "a"), ("run", "", "b"), ("run", "", "c")],
        [("judge", "a"), ("judge", "b"), ("judge", "c")],
    ]
    assert chosen(outcome) == ["b", "c", "a"]
    assert [each.score for each in outcome.candidates] == [0.9, 0.5, 0.2]
    assert outcome.reason == ""
    assert search.live == {each.branch for each in outcome.candidates}
    assert search.messages == ["3 samples"]


def test_ties_go_to_the_first_sample() -> None:
    search = searching(["a$", "b$", "c$"], {"a": 0.5, "b": 0.7, "c": 0.7})
    assert chosen(search.drive(run(search, BestOfN(3, "rm")))) == ["b", "c", "a"]


@pytest.mark.parametrize(("how", "best"), [("last", "a"), ("min", "b"), ("prod", "c"), ("mean", "d")])
def test_scores_of_steps_are_aggregated(how: Any, best: str) -> None:
    steps = {"a": [0.1, 0.2, 0.95], "b": [0.6, 0.6, 0.6], "c": [0.5, 0.7, 0.9], "d": [0.34, 0.95, 0.94]}
    search = searching(["a$", "b$", "c$", "d$"], dict(steps))
    outcome = search.drive(run(search, BestOfN(4, "rm", aggregate=how)))
    assert chosen(outcome)[0] == best
    assert list(outcome.candidates[0].scores) == steps[best]


@pytest.mark.parametrize(
    ("text", "steps"),
    [("a|b", ("a|", "b")), ("a|b|", ("a|", "b|")), ("a||b", ("a|", "|", "b")), ("a", ("a",)), ("", ())],
)
def test_samples_are_scored_step_by_step(text: str, steps: tuple[str, ...]) -> None:
    seen = []

    def score(hypothesis: Hypothesis, scorer: Any) -> list[float]:
        seen.append(hypothesis)
        return [0.5]

    search = ScriptedSearch(Script(go=lambda *_: text + "$", scores=score))
    search.drive(run(search, BestOfN(1, "rm", separator="|")))
    assert seen == [Hypothesis("Q", steps, True, -float(len(text)), len(text))]


def test_a_cut_sample_cannot_win_over_one_that_ended() -> None:
    search = searching(["aaaaaa$", "b$"], {"aaaaa": 0.9, "b": 0.1}, sampling=Sampling(max_tokens=5))
    outcome = search.drive(run(search, BestOfN(2, "rm")))
    assert chosen(outcome) == ["b", "aaaaa"]
    assert [each.note for each in outcome.candidates] == ["", "cut by max_tokens or the context"]
    assert outcome.reason == ""


def test_where_nothing_ends_the_best_is_given_with_a_reason() -> None:
    search = searching(["aaaaaa$", "bbbbbb$"], {"aaaaa": 0.1, "bbbbb": 0.9}, sampling=Sampling(max_tokens=5))
    outcome = search.drive(run(search, BestOfN(2, "rm")))
    assert chosen(outcome)[0] == "bbbbb"
    assert "all of them were cut by 'max_tokens'" in outcome.reason


def test_fewer_candidates_are_all_run() -> None:
    search = searching(["a$", "b$", "c$"], {"a": 0.2, "b": 0.9, "c": 1.0}, max_candidates=2)
    outcome = search.drive(run(search, BestOfN(3, "rm")))
    assert chosen(outcome) == ["b", "a"]
    assert "'max_candidates' is used up" in outcome.reason


def test_without_any_candidate_the_root_is_run() -> None:
    search = searching(["a$"], {"a": 0.2}, max_candidates=0)
    outcome = search.drive(run(search, BestOfN(3, "rm")))
    assert outcome.candidates[0].branch is search.root
    assert chosen(outcome) == ["a"]


def test_a_budget_of_tokens_ends_it_with_what_there_is() -> None:
    search = searching(["aa$", "bbbb$"], {"aa": 0.2, "bb": 0.9}, max_tokens=4)
    outcome = search.drive(run(search, BestOfN(2, "rm")))
    assert chosen(outcome) == ["aa", "bb"]
    assert outcome.candidates[1].note == "cut by max_total_tokens"
    assert outcome.reason == "The search was cut short: 'max_total_tokens' is used up."


def test_a_text_without_a_score_comes_last() -> None:
    search = searching(["$", "b$"], {"": [], "b": 0.1})
    outcome = search.drive(run(search, BestOfN(2, "rm")))
    assert chosen(outcome) == ["b", ""]
    assert outcome.candidates[1].score is None


# -- votes ------------------------------------------------------------------------------------------------------------


def test_a_majority_needs_no_scorer() -> None:
    outcome = vote(["a 7$", "a 8$", "b 8.0$", "c 9$"], vote="majority")
    assert chosen(outcome) == ["a 8", "b 8.0", "a 7", "c 9"]
    assert outcome.candidates[0].answer == "8"
    assert outcome.candidates[0].score is None
    assert outcome.details == {"votes": {"8": 2.0, "8.0": 2.0, "7": 1.0, "9": 1.0}}


def test_equal_votes_go_to_the_answer_that_came_first() -> None:
    assert chosen(vote(["a 7$", "a 8$", "b 8$", "b 7$"], vote="majority")) == ["a 7", "b 7", "a 8", "b 8"]


def test_within_the_winning_answer_the_best_score_wins() -> None:
    texts = ["a 7$", "b 7$", "c 7$", "d 8$"]
    assert chosen(vote(texts, [0.1, 0.3, 0.3, 0.9], vote="majority")) == ["b 7", "c 7", "a 7", "d 8"]


def test_weights_are_summed_by_answer() -> None:
    """0.5 + 0.5 against 0.9: the sum wins, which neither the best score nor, with 0.3 + 0.3, the majority gives."""
    assert chosen(vote(["a 7$", "b 7$", "c 8$"], [0.5, 0.45, 0.9], vote="weighted")) == ["a 7", "b 7", "c 8"]
    outcome = vote(["a 7$", "b 7$", "c 8$"], [0.3, 0.3, 0.9], vote="weighted")
    assert chosen(outcome) == ["c 8", "a 7", "b 7"]
    assert outcome.details["votes"] == {"8": 0.9, "7": 0.6}


def test_scores_without_a_zero_go_through_a_sigmoid() -> None:
    """Summed raw, two bad answers would lose to one that is worse; squashed, they add up."""
    texts, scores = ["a 7$", "b 7$", "c 8$"], [-1.0, -1.0, -1.5]
    assert chosen(vote(texts, scores, vote="weighted", squash="none"))[0] == "c 8"
    for squash in ("auto", "sigmoid"):
        outcome = vote(texts, scores, vote="weighted", squash=squash)
        assert chosen(outcome)[0] == "a 7"
        assert outcome.details["votes"]["7"] == pytest.approx(2 / (1 + math.e))
    # within 0..1 auto leaves them alone: 1.0 against 0.4 + 0.4, whose sigmoids would win
    assert chosen(vote(texts, [0.4, 0.4, 1.0], vote="weighted"))[0] == "c 8"
    assert chosen(vote(texts, [0.4, 0.4, 1.0], vote="weighted", squash="sigmoid"))[0] == "a 7"


@pytest.mark.parametrize(("scores", "squashes"), [([-0.1, 0.5], True), ([0.5, 1.1], True), ([0.0, 1.0], False)])
def test_any_score_outside_0_to_1_calls_for_the_sigmoid(scores: list[float], squashes: bool) -> None:
    votes = vote(["a 7$", "b 8$"], scores, vote="weighted").details["votes"]
    assert votes == pytest.approx(dict(zip("78", squashed(scores) if squashes else scores, strict=True)))


def test_a_sigmoid_of_any_score_is_finite() -> None:
    assert squashed([-1e9, -math.inf, 0.0, 1e9]) == [0.0, 0.0, 0.5, 1.0]


def test_a_cut_sample_and_one_without_an_answer_do_not_vote() -> None:
    texts = ["none$", "x 7777$", "y 7777$", "z 8$"]
    search = searching(texts, sampling=Sampling(max_tokens=5))
    outcome = search.drive(run(search, BestOfN(4, vote="majority", answer="last_number")))
    assert chosen(outcome) == ["z 8", "none", "x 777", "y 777"]
    assert [each.answer for each in outcome.candidates] == ["8", None, "777", "777"]


def test_cut_samples_vote_where_none_ended() -> None:
    search = searching(["x 8888$", "y 7777$", "z 7777$"], sampling=Sampling(max_tokens=5))
    outcome = search.drive(run(search, BestOfN(3, vote="majority")))
    assert chosen(outcome)[0] == "y 777"
    assert outcome.reason != ""


def test_without_any_answer_the_first_sample_stands() -> None:
    outcome = vote(["no$", "nor$"], vote="majority", answer="last_number")
    assert chosen(outcome) == ["no", "nor"]


def test_the_answer_may_be_boxed_or_a_pattern() -> None:
    texts = [r"\boxed{1} 5$", r"\boxed{2} 6$", r"\boxed{2} 5$"]
    assert chosen(vote(texts, vote="majority", answer="boxed"))[0] == r"\boxed{2} 6"
    assert chosen(vote(texts, vote="majority", answer="last_number"))[0] == r"\boxed{1} 5"
    assert chosen(vote(texts, vote="majority", answer_regex=r"boxed\{(\d)\}"))[0] == r"\boxed{2} 6"


def test_votes_alone() -> None:
    order, votes = weighted(["1", "2", "1", "3"], [0.2, 0.5, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0])
    assert order == [2, 0, 1, 3]
    assert votes == [0.5, 0.5, 0.5, 0.4]


# -- sharpening -------------------------------------------------------------------------------------------------------


def test_sharpening_takes_the_likeliest_text_whatever_its_length() -> None:
    """-0.9 for one character beats -0.3 each for four, which per token would win."""
    lp = {"a": -1.0, "b": -0.3, "c": -0.9}
    search = searching(["a$", "bbbb$", "c$"])
    search.script.lp = lambda text, char: lp[char]
    outcome = search.drive(run_sharpen(search, Sharpen(3)))
    assert chosen(outcome) == ["c", "a", "bbbb"]
    assert outcome.candidates[0].score == -0.9
    assert search.live == {each.branch for each in outcome.candidates}
    assert not any(call[0] == "judge" for batch in search.calls for call in batch)


def test_sharpening_prefers_what_ended() -> None:
    search = searching(["a$", "bbbb$"], sampling=Sampling(max_tokens=3))
    search.script.lp = lambda text, char: -5.0 if char == "a" else -0.1
    assert chosen(search.drive(run_sharpen(search, Sharpen(2)))) == ["a", "bbb"]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (BestOfN(0, "rm"), "n"),
        (BestOfN(65, "rm"), "n"),
        (BestOfN(4, "rm", separator=""), "separator"),
        (BestOfN(4), "scorer"),
        (BestOfN(4, vote="weighted"), "scorer"),
        (BestOfN(4, vote="majority", answer_regex="("), "answer_regex"),
        (BestOfN(4, vote="majority", answer_regex="(a)(b)"), "answer_regex"),
        (Sharpen(0), "n"),
    ],
)
def test_parameters_out_of_range_are_refused(params: Any, param: str) -> None:
    kind = SHARPEN if isinstance(params, Sharpen) else KIND
    with pytest.raises(BadRequest) as refused:
        kind.check(params, Sampling())
    assert refused.value.param == param


def test_kinds_say_what_they_take() -> None:
    KIND.check(BestOfN(64, "rm"), Sampling())
    KIND.check(BestOfN(vote="majority"), Sampling())
    SHARPEN.check(Sharpen(), Sampling())
    assert KIND.independent(BestOfN(7, "rm")) == 7
    assert SHARPEN.independent(Sharpen(3)) == 3
    assert KIND.scorers(BestOfN(7, "rm")) == ("rm",)
    assert KIND.temperature == 0.8
    assert SHARPEN.temperature == 1.0
    assert replace(BestOfN(), n=2).n == 2
    for name, kind in SEARCHES.items():
        assert kind.name == name
        assert kind.summary
        assert kind.paper
