"""Revisions: what each is shown, how one is picked, budgets."""

from __future__ import annotations

from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.scorers.spec import Hypothesis
from decoding.search import revise
from decoding.search.revise import Revise
from decoding.text import Chat, Prompt
from tests.scripted import Script, ScriptedSearch


def tables(scores: Any = None) -> Script:
    """First answers are those of `FIRST`; a revision counts how many answers it was shown."""
    base = Script(
        go=lambda text, index, greedy: ["It is 1.", "It is 2."][index] + "$",
        scores=scores or (lambda hypothesis, scorer: [0.0]),
    )

    def of(model: str, prompt: Prompt) -> Script:
        assert isinstance(prompt, str)
        shown = prompt.count("It is")
        return Script(go=lambda text, index, greedy: f"It is {4 + shown}.$", scores=base.scores) if shown else base

    base.of = of
    return base


def test_chains_run_side_by_side_and_show_their_own_answers() -> None:
    search = ScriptedSearch(tables())
    outcome = search.drive(revise.run(search, Revise(chains=2, length=3, context=1, request="Again.")))
    first, second = "It is 1.", "It is 2."
    assert search.calls == [
        [("fork", "", 2)],
        [("drop", "")],
        [("run", "", first), ("run", "", second)],
        [("open", None, f"Q{first}\n\nAgain.\n\n"), ("open", None, f"Q{second}\n\nAgain.\n\n")],
        [("run", "", "It is 5."), ("run", "", "It is 5.")],
        [("open", None, "QIt is 5.\n\nAgain.\n\n")] * 2,  # `context` 1: the last answer alone
        [("run", "", "It is 5."), ("run", "", "It is 5.")],
    ]
    assert outcome.details["chains"] == [[first, "It is 5.", "It is 5."], [second, "It is 5.", "It is 5."]]
    assert [(c.branch.text, c.score) for c in outcome.candidates] == [("It is 5.", 4.0)] * 4 + [
        (first, 1.0),
        (second, 1.0),
    ]
    assert [c.answer for c in outcome.candidates] == ["5"] * 4 + ["1", "2"]
    assert search.live == {c.branch for c in outcome.candidates}


def test_the_last_answers_are_shown_in_their_order() -> None:
    search = ScriptedSearch(tables())
    search.drive(revise.run(search, Revise(length=4, context=2, request="Again.")))
    opened = [call[2] for batch in search.calls for call in batch if call[0] == "open"]
    assert opened == [
        "QIt is 1.\n\nAgain.\n\n",
        "QIt is 1.\n\nAgain.\n\nIt is 5.\n\nAgain.\n\n",
        "QIt is 5.\n\nAgain.\n\nIt is 6.\n\nAgain.\n\n",
    ]


def test_a_scorer_reads_every_answer_as_one_to_the_request() -> None:
    prompts = []

    def scores(hypothesis: Hypothesis, scorer: Any) -> list[float]:
        prompts.append(hypothesis.prompt)
        assert hypothesis.done
        return [0.9, {"It is 1.": 0.2, "It is 5.": 0.8, "It is 6.": 0.5}[hypothesis.text]]

    search = ScriptedSearch(tables(scores))
    params = Revise(length=3, scorer="prm", aggregate="prod", request="Again.")
    outcome = search.drive(revise.run(search, params))
    assert prompts == ["Q"] * 3
    assert [(c.branch.text, c.score) for c in outcome.candidates] == [
        ("It is 5.", pytest.approx(0.72)),
        ("It is 6.", pytest.approx(0.45)),
        ("It is 1.", pytest.approx(0.18)),
    ]
    assert outcome.candidates[0].scores == (0.9, 0.8)
    assert revise.KIND.scorers(params) == ("prm",)


def test_a_chat_shows_answers_as_turns() -> None:
    user = {"role": "user", "content": "Q"}
    script = Script(go=lambda text, index, greedy: "x$")
    search = ScriptedSearch(script, prompt=Chat((user,)))
    search.drive(revise.run(search, Revise(length=2, request="Again.")))
    turns = ({"role": "assistant", "content": "x"}, {"role": "user", "content": "Again."})
    assert search.calls[3] == [("open", None, Chat((user, *turns)))]


def test_budgets_end_it_with_the_answers_that_there_are() -> None:
    search = ScriptedSearch(tables(), max_tokens=10)
    outcome = search.drive(revise.run(search, Revise(length=4)))
    assert [(c.branch.text, c.note) for c in outcome.candidates] == [
        ("It is 1.", ""),
        ("It", "cut by max_total_tokens"),
    ]


def test_a_chain_that_does_not_fit_any_more_ends_and_the_others_go_on() -> None:
    script = Script(of=lambda model, prompt: Script(go=lambda text, index, greedy: answers[(str(prompt), index)] + "$"))
    answers = {("Q", 0): "long 7", ("Q", 1): "3", ("Q3\n\nAgain.\n\n", 0): "7"}
    search = ScriptedSearch(script, context=14)
    outcome = search.drive(revise.run(search, Revise(chains=2, length=2, request="Again.")))
    assert outcome.details["chains"] == [["long 7"], ["3", "7"]]
    assert (outcome.candidates[0].branch.text, outcome.candidates[0].score) == ("long 7", 2.0)
    assert outcome.reason == revise.TOO_LONG
    search = ScriptedSearch(tables(), context=5)
    outcome = search.drive(revise.run(search, Revise(length=4)))
    assert (outcome.details["chains"], outcome.reason) == ([["It is 1."]], revise.TOO_LONG)
    assert len([call for batch in search.calls for call in batch if call[0] == "open"]) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"chains": 0}, "chains"),
        ({"length": 0}, "length"),
        ({"context": 0}, "context"),
        ({"chains": 9, "length": 9}, "length"),
        ({"request": " "}, "request"),
        ({"answer_regex": "("}, "answer_regex"),
    ],
)
def test_it_refuses(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        revise.check(Revise(**change), Sampling())
    assert refused.value.param == param
    assert revise.KIND.independent(Revise(chains=3, length=2)) == 3
