"""RSD and GSI: which steps stay, in numbers computed by hand; two branches with one text."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.search import step_speculative
from decoding.search.step_speculative import StepSpeculative, draw, tilt
from decoding.search.verbs import Feed, Open, Verb
from decoding.text import Prompt
from tests.scripted import Script, ScriptedSearch, spy

RSD = StepSpeculative("small", "prm", separator=".")
GSI = StepSpeculative("small", "prm", mode="gsi", n=2, beta=4.0, u=1.0, separator=".")


def tables(small: dict[str, Any], base: dict[str, Any], scores: Any) -> Script:
    """What each model writes next after each text: a string, or one per sibling."""

    def writer(table: dict[str, Any]) -> Any:
        return lambda text, index, greedy: table[text] if isinstance(table[text], str) else table[text][index]

    def of(model: str, prompt: Prompt) -> Script:
        lp = (lambda text, char: -2.0) if model == "small" else (lambda text, char: -0.5 if char == "a" else -1.0)
        return Script(go=writer(small if model == "small" else base), scores=lambda h, s: scores(h.steps), lp=lp)

    return Script(of=of)


@pytest.mark.parametrize("foreign", [(), ("small",)])
def test_rsd_keeps_steps_from_the_threshold_on(foreign: tuple[str, ...]) -> None:
    """Scores 0.7, 0.69 and 1: the base writes the second step only; both have the same text all along."""
    small = {"": "s1.", "s1.": "s2.", "s1.b2.": "s3$"}
    script = tables(small, {"s1.": "b2."}, lambda steps: [0.1, {"s1.": 0.7, "s2.": 0.69, "s3": 1.0}[steps[-1]]])
    search = ScriptedSearch(script, foreign=foreign)
    outcome = search.drive(step_speculative.run(search, RSD))
    assert search.calls == [
        [("open", "small", "Q")],
        [("fork", "", 1)],
        [("run", "", "s1.")],
        [("score", "s1.", 0.1, 0.7)],
        [("drop", ""), ("feed", "", "s1.")],
        [("fork", "s1.", 1)],
        [("run", "s1.", "s2.")],
        [("score", "s1.s2.", 0.1, 0.69)],
        [("drop", "s1.s2.")],
        [("run", "s1.", "b2.")],
        [("feed", "s1.", "b2.")],
        [("fork", "s1.b2.", 1)],
        [("run", "s1.b2.", "s3")],
        [("score", "s1.b2.s3", 0.1, 1.0)],
        [("drop", "s1.b2."), ("feed", "s1.b2.", "s3")],
        [("drop", "s1.b2.s3")],
    ]
    (only,) = outcome.candidates
    assert (only.branch.text, only.branch.steps, only.branch.model) == ("s1.b2.s3", ["s1.", "b2.", "s3"], "small")
    assert only.branch.finished == "stop"
    assert outcome.details == {"steps": 3, "drafted": 2, "scores": [0.7, 0.69, 1.0]}
    assert search.live == {only.branch}


@pytest.mark.parametrize("params", [RSD, GSI])
@pytest.mark.parametrize("foreign", [(), ("small",), ("base",)])
def test_another_tokenizer_is_told_the_text(params: StepSpeculative, foreign: tuple[str, ...]) -> None:
    seen: list[list[Verb]] = []
    small, base = defaultdict(lambda: "s."), defaultdict(lambda: "b.")
    script = tables(small, base, lambda steps: [float(len(steps) != 2)])
    search = ScriptedSearch(script, foreign=foreign)
    outcome = search.drive(spy(step_speculative.run(search, replace(params, max_steps=3, u=3.0)), seen))
    assert outcome.candidates[0].branch.text == "s.b.s."
    fed = [verb.tokens for batch in seen for verb in batch if isinstance(verb, Feed)]
    assert len(fed) >= 3
    assert all(isinstance(said, str) is bool(foreign) for said in fed)


def test_rsd_ends_where_the_base_does() -> None:
    search = ScriptedSearch(tables({"": "s."}, {"": "b$"}, lambda steps: [0.0]))
    (only,) = search.drive(step_speculative.run(search, RSD)).candidates
    assert (only.branch.text, only.branch.model, only.branch.finished) == ("b", "base", "stop")
    assert search.live == {only.branch}


def test_gsi_keeps_a_draft_whose_tilted_score_is_above_u() -> None:
    """Steps "a" and "c": lp_small -2 each, lp_base -0.5 and -1, so with r 0.9 and 0.1 tilted 5.1 and 1.4."""
    script = tables({"": ["a$", "c$"]}, {}, lambda steps: [{"a": 0.9, "c": 0.1}[steps[-1]]])
    counts: Counter[str] = Counter()
    for seed in range(300):
        search = ScriptedSearch(script, seed=seed)
        outcome = search.drive(step_speculative.run(search, GSI))
        (only,) = outcome.candidates
        text = only.branch.text
        counts[text] += 1
        assert outcome.details["scores"] == [pytest.approx({"a": 5.1, "c": 1.4}[text])]
        assert outcome.details["drafted"] == 1
        assert search.live == {only.branch}
        assert search.calls[:4] == [
            [("open", "small", "Q")],
            [("fork", "", 2), ("fork", "", 2)],
            [("run", "", "a"), ("run", "", "c")],
            [("feed", "", "a"), ("feed", "", "c"), ("score", "a", 0.9), ("score", "c", 0.1)],
        ]
        other = {"a": "c", "c": "a"}[text]
        assert sorted(search.calls[4]) == [("drop", ""), ("drop", ""), ("drop", other), ("drop", other)]
        assert search.calls[5:] == [[("drop", text)]]  # the base's, which has the same text
    share = 1 / (1 + math.exp(1.4 - 5.1))
    assert counts["a"] / 300 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 300))
    assert counts["c"] > 0


def test_gsi_leaves_a_step_to_the_base_otherwise() -> None:
    """Tilted scores 2.1 and 2.4 are not above u: two steps of the base, one chosen by softmax(beta r)."""
    small = {"": ["a.", "c."]}
    base = {"": [None, None, "x.", "y$"]}  # its first two children mirrored the drafts
    rewards = {"a.": -0.1, "c.": 0.1, "x.": 0.5, "y": 1.0}
    script = tables(small, base, lambda steps: [rewards[steps[-1]]])
    counts: Counter[str] = Counter()
    params = StepSpeculative("small", "prm", mode="gsi", n=2, beta=4.0, u=2.4, separator=".", max_steps=1)
    for seed in range(300):
        search = ScriptedSearch(script, seed=seed)
        outcome = search.drive(step_speculative.run(search, params))
        (only,) = outcome.candidates
        counts[only.branch.text] += 1
        assert outcome.details["drafted"] == 0
        assert round(outcome.details["scores"][0], 9) in (2.1, 2.4)
        assert search.live == {only.branch}
        assert search.calls[4] == [("drop", text) for text in ("a.", "a.", "c.", "c.")]
        assert search.calls[5:9] == [
            [("fork", "", 2)],
            [("run", "", "x."), ("run", "", "y")],
            [("score", "x.", 0.5), ("score", "y", 1.0)],
            [("feed", "", only.branch.text)],
        ]
    share = 1 / (1 + math.exp(4.0 * (0.5 - 1.0)))
    assert counts["y"] / 300 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 300))


def test_steps_end_the_search() -> None:
    script = tables({"": "s.", "s.": "s."}, {}, lambda steps: [1.0])
    search = ScriptedSearch(script)
    params = StepSpeculative("small", "prm", separator=".", max_steps=2)
    outcome = search.drive(step_speculative.run(search, params))
    assert outcome.candidates[0].branch.text == "s.s."
    assert "'max_steps' is 2" in outcome.reason
    assert search.live == {outcome.candidates[0].branch}
    search = ScriptedSearch(script, sampling=Sampling(max_tokens=3))
    outcome = search.drive(step_speculative.run(search, params))
    assert outcome.candidates[0].branch.text == "s.s"
    assert "max_tokens" in outcome.reason


@pytest.mark.parametrize("params", [RSD, GSI])
def test_where_the_small_model_has_no_room_left_the_base_goes_on(
    params: StepSpeculative, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small model's context ends after four tokens; the base's does not."""
    script = tables({"": "s1.", "s1.": "s2."}, {"s1.s": "b.$"}, lambda steps: [1.0])
    search = ScriptedSearch(script)
    steps = step_speculative.run(search, replace(params, n=1, u=-99.0))
    opened = search._do

    def do(verb: Verb) -> Any:
        if isinstance(verb, Open):
            verb = replace(verb, sampling=Sampling(temperature=0.7, max_tokens=4))
        return opened(verb)

    monkeypatch.setattr(search, "_do", do)
    outcome = search.drive(steps)
    (only,) = outcome.candidates
    assert (only.branch.text, only.branch.model, only.branch.finished) == ("s1.sb.", "base", "stop")
    assert outcome.reason == ""
    assert search.live == {only.branch}


@pytest.mark.parametrize("params", [RSD, GSI])
def test_without_forks_the_base_goes_on_alone(params: StepSpeculative) -> None:
    search = ScriptedSearch(tables({}, {"": "b.b.$"}, lambda steps: [1.0]), max_candidates=0)
    outcome = search.drive(step_speculative.run(search, params))
    assert outcome.candidates[0].branch.text == "b.b."
    assert search.live == {outcome.candidates[0].branch}


def test_gsi_with_fewer_forks_takes_what_it_gets() -> None:
    """Three of four: a pair, and one of the small model's that has no mirror."""
    search = ScriptedSearch(tables({"": ["a$", "c$"]}, {}, lambda steps: [1.0]), max_candidates=3)
    outcome = search.drive(step_speculative.run(search, GSI))
    assert search.calls[1:5] == [
        [("fork", "", 2), ("fork", "", 2)],
        [("drop", "")],
        [("run", "", "a")],
        [("feed", "", "a"), ("score", "a", 1.0)],
    ]
    assert outcome.candidates[0].branch.text == "a"
    assert search.live == {outcome.candidates[0].branch}


@pytest.mark.parametrize("mode", ["rsd", "gsi"])
def test_tokens_used_up_end_it(mode: Any) -> None:
    always: dict[str, Any] = defaultdict(lambda: "a.")
    script = tables(always, always, lambda steps: [1.0])
    search = ScriptedSearch(script, max_tokens=5)
    params = StepSpeculative("small", "prm", mode=mode, n=2, u=-99.0, separator=".")
    outcome = search.drive(step_speculative.run(search, params))
    assert outcome.candidates[0].branch.text.startswith("a.")
    assert outcome.candidates[0].note == "cut by max_total_tokens"
    assert search.live == {outcome.candidates[0].branch}


def test_scores_that_are_none() -> None:
    assert tilt(0.0, []) == tilt(1.0, [math.nan]) == -math.inf
    assert tilt(2.0, [9.0, 0.5]) == 1.0
    search = ScriptedSearch(Script())
    assert draw(search, [-math.inf, -math.inf]) == 0
    assert draw(search, [-math.inf, 1000.0, -math.inf]) == 1
    assert tilt(0.0, [math.inf]) == -math.inf
    assert draw(search, [0.0, math.inf, math.nan]) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"max_steps": 0}, "max_steps"),
        ({"separator": ""}, "separator"),
        ({"step_tokens": 0}, "step_tokens"),
        ({"threshold": math.nan}, "threshold"),
        ({"beta": -1.0}, "beta"),
        ({"u": math.inf}, "u"),
    ],
)
def test_it_refuses(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        step_speculative.check(StepSpeculative("small", "prm", **change), Sampling())
    assert refused.value.param == param


def test_what_it_names() -> None:
    kind = step_speculative.KIND
    assert (kind.scorers(GSI), kind.models(GSI)) == (("prm",), ("small",))
    assert (kind.independent(GSI), kind.independent(RSD)) == (2, 1)


@pytest.mark.parametrize("params", [RSD, GSI])
def test_drafts_without_a_score_are_not_kept(params: StepSpeculative) -> None:
    script = tables(defaultdict(lambda: "s."), defaultdict(lambda: "b$"), lambda steps: [])
    search = ScriptedSearch(script)
    outcome = search.drive(step_speculative.run(search, params))
    assert outcome.candidates[0].branch.text == "b"
    assert outcome.details == {"steps": 1, "drafted": 0, "scores": [None]}
