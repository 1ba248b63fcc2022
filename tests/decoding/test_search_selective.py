"""Searches that may not answer themselves: declining, and handing over to a larger model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.search import cascade, selective
from decoding.search.cascade import Cascade, Reference, vote
from decoding.search.selective import Selective
from decoding.text import Chat, Prompt
from tests.scripted import Script, ScriptedSearch


@pytest.mark.parametrize(("threshold", "declined"), [(6.0, False), (6.5, False), (6.6, True)])
def test_an_answer_below_the_threshold_is_declined(threshold: float, declined: bool) -> None:
    search = ScriptedSearch(Script(go=lambda *_: "forty$", scores=lambda h, s: [9.0, 6.5]))
    outcome = search.drive(selective.run(search, Selective("judge", threshold, decline="No.")))
    assert search.calls == [[("run", "", "forty")], [("score", "forty", 9.0, 6.5)]]
    (only,) = outcome.candidates
    assert (only.text, only.note) == (("No.", "declined") if declined else (None, ""))
    assert (only.score, only.scores, only.branch.text) == (6.5, (9.0, 6.5), "forty")
    assert outcome.details == ({"declined": True, "answer": "forty"} if declined else {"declined": False})
    assert search.live == {only.branch}


def test_the_threshold_is_a_number() -> None:
    with pytest.raises(BadRequest) as refused:
        selective.check(Selective("judge", math.nan), Sampling())
    assert refused.value.param == "threshold"
    assert selective.KIND.scorers(Selective("judge", 5.0)) == ("judge",)


@pytest.mark.parametrize(
    ("reliable", "verdict", "value"),
    [(True, 1, 1.0), (True, 0, 0.5), (True, -1, 0.0), (False, 1, 0.0), (False, 0, -0.5), (False, -1, -1.0)],
)
def test_only_what_could_not_be_expected_is_a_vote(reliable: bool, verdict: int, value: float) -> None:
    assert vote(reliable, verdict) == value


REFERENCES = (Reference("1 + 1?", "2", True), Reference("2 + 2?", "5", False), Reference("3 + 3?", "6", True))
WORSE, BETTER, LIKE = [-0.1, -3.0, -3.0], [-3.0, -0.1, -3.0], [-3.0, -3.0, -0.1]  # of A, B, C


def tables(verdicts: list[list[float]]) -> Script:
    """Small says 4, large says 5; the small model's verdicts by reference."""

    def of(model: str, prompt: Prompt) -> Script:
        text = prompt if isinstance(prompt, str) else prompt.messages[0]["content"]
        asked = [i for i, each in enumerate(REFERENCES) if each.query in text]
        said = {"small": "4", "base": "5"}[model]
        return Script(
            go=lambda *_: said + "$", probe=lambda text, suffix, choices: verdicts[asked[0]] if asked else [0.0]
        )

    return Script(of=of)


def test_a_reliable_answer_of_the_small_model_is_taken() -> None:
    """Votes 1/2, 0 and 0: above 0."""
    search = ScriptedSearch(tables([LIKE, BETTER, WORSE]), prompt="Sum?")
    params = Cascade("small", REFERENCES, compare="{reference_query} {reference_answer} | {query} {answer}")
    outcome = search.drive(cascade.run(search, params))
    assert search.calls == [
        [("open", "small", "Sum?")],
        [("run", "", "4")],
        [("open", "small", f"{r.query} {r.answer} | Sum? 4") for r in REFERENCES],
        [("probe", "", "(")] * 3,
        [("drop", "")] * 3,
        [("drop", "")],
    ]
    (only,) = outcome.candidates
    assert (only.branch.text, only.score, only.scores) == ("4", pytest.approx(1 / 6), (0.5, 0.0, 0.0))
    assert outcome.details == {"votes": [0.5, 0.0, 0.0], "model": "small"}
    assert search.live == {only.branch}
    assert cascade.KIND.models(params) == ("small",)


@pytest.mark.parametrize("verdicts", [[WORSE, BETTER, WORSE], [LIKE, WORSE, LIKE], [WORSE, LIKE, WORSE]])
def test_an_unreliable_one_goes_to_the_requests_model(verdicts: list[list[float]]) -> None:
    """Mean votes 0, 0 and below 0: none is above 0."""
    search = ScriptedSearch(tables(verdicts), prompt=Chat(({"role": "user", "content": "Sum?"},)))
    outcome = search.drive(cascade.run(search, Cascade("small", REFERENCES)))
    assert [(c.branch.text, c.note) for c in outcome.candidates] == [("5", ""), ("4", "unreliable")]
    assert outcome.details["model"] == "base"
    assert search.live == {c.branch for c in outcome.candidates}


def test_without_a_budget_the_small_models_answer_stays() -> None:
    search = ScriptedSearch(tables([WORSE] * 3), max_tokens=1)
    outcome = search.drive(cascade.run(search, Cascade("small", REFERENCES)))
    assert [c.branch.text for c in outcome.candidates] == ["4"]
    assert outcome.details["votes"] == []
    assert search.live == {outcome.candidates[0].branch}


@pytest.mark.parametrize(("budget", "limit"), [(2, 100), (None, 2)])
def test_a_large_answer_that_was_cut_does_not_win_over_a_small_one_that_ended(budget: int | None, limit: int) -> None:
    """The large model says "5 and so on": all tokens are spent after its first one, or it is longer than max_tokens."""
    small, large = Script(go=lambda *_: "4$", probe=lambda *_: WORSE), Script(go=lambda *_: "5 and so on$")
    script = Script(of=lambda model, prompt: small if model == "small" else large)
    search = ScriptedSearch(script, prompt="Sum?", sampling=Sampling(max_tokens=limit), max_tokens=budget)
    outcome = search.drive(cascade.run(search, Cascade("small", REFERENCES)))
    assert [c.branch.text for c in outcome.candidates] == ["4", "5" if budget else "5 "]
    assert outcome.candidates[0].note == "unreliable"
    assert outcome.details["model"] == "small"


def test_an_unreliable_answer_is_not_taken_for_want_of_candidates() -> None:
    """The comparisons are opened beyond the bound; the large model needs none of it."""
    search = ScriptedSearch(tables([]), prompt="Sum?")

    def worse() -> list[float]:
        search.exhausted = "max_candidates"
        return WORSE

    tables_of = search.script.of
    assert tables_of is not None
    search.script = Script(of=lambda model, prompt: replace(tables_of(model, prompt), probe=lambda *_: worse()))
    outcome = search.drive(cascade.run(search, Cascade("small", REFERENCES)))
    assert [c.branch.text for c in outcome.candidates] == ["5", "4"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"references": ()}, "references"),
        ({"references": REFERENCES * 11}, "references"),
        ({"threshold": -1.5}, "threshold"),
        ({"compare": "{query} {answer}"}, "compare"),
    ],
)
def test_cascades_refuse(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        cascade.check(Cascade(**{"small": "small", "references": REFERENCES, **change}), Sampling())
    assert refused.value.param == param
    cascade.check(Cascade("small", REFERENCES), Sampling())
