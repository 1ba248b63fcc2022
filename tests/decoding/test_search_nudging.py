"""Nudging across tokenizers: who speaks when, where a word ends, how a text ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.search import nudging_search
from decoding.search.nudging_search import NudgingSearch, likeliest
from decoding.search.verbs import Feed, Verb
from decoding.text import Prompt
from tests.scripted import Script, ScriptedSearch

GREEDY = Sampling(temperature=0.0, max_tokens=60)
PARAMS = NudgingSearch("nudger", threshold=0.5)


def tables(base: Callable[[str], tuple[str, float]], nudger: str | Callable[[str], str]) -> Script:
    """base: its likeliest next token, how probable. nudger: the text that it has in mind, or what comes next."""

    def of(model: str, prompt: Prompt) -> Script:
        if model == "nudger":
            return Script(go=lambda text, *_: nudger[len(text) :] + "$" if isinstance(nudger, str) else nudger(text))
        return Script(top=lambda text: [(base(text)[0], math.log(base(text)[1]))], go=lambda text, *_: base(text)[0])

    return Script(of=of)


def test_the_nudger_gives_a_word_where_the_base_is_unsure() -> None:
    """Base "Yes it has so", unsure of the first word and the third; nudger "Yes it was so"."""
    said, unsure = "Yes it has so$", ("", "Yes it")
    base = tables(lambda text: (said[len(text)], 0.49 if text in unsure else 0.5), "Yes it was so")
    search = ScriptedSearch(base, sampling=GREEDY)
    outcome = search.drive(nudging_search.run(search, PARAMS))
    (only,) = outcome.candidates
    assert (only.branch.text, only.branch.finished) == ("Yes it was so", "stop")
    assert outcome.details["nudges"] == 2
    search = ScriptedSearch(base, sampling=GREEDY)
    outcome = search.drive(nudging_search.run(search, replace(PARAMS, threshold=0.48)))
    assert (outcome.candidates[0].branch.text, outcome.details["nudges"]) == ("Yes it has so", 0)


def test_words_go_over_as_text_and_the_nudger_is_told_what_the_base_said() -> None:
    """The nudger says "Hi", the base "b", the nudger " go", and the base ends it."""
    script = tables(
        lambda text: ("$", 0.9) if len(text) > 4 else ("b", 0.3 if text in ("", "Hib") else 0.9),
        lambda text: {"": "Hi you", "H": "i you", "Hi": " you"}.get(text, " go on"[len(text) - 3 :]),
    )
    search = ScriptedSearch(script, sampling=GREEDY)
    outcome = search.drive(nudging_search.run(search, PARAMS))
    assert search.calls == [
        [("open", "nudger", "Q")],
        [("top", "", 1)],
        [("fork", "", 1)],
        [("greedy", "", "H")],
        [("greedy", "H", "i")],
        [("greedy", "Hi", " ")],
        [("drop", "Hi ")],
        [("feed", "", "Hi")],
        [("top", "Hi", 1)],
        [("feed", "Hi", "b")],
        [("top", "Hib", 1)],
        [("feed", "", "Hib")],  # what the nudger has not heard of yet
        [("fork", "Hib", 1)],
        [("greedy", "Hib", " ")],  # a word may begin with its space
        [("greedy", "Hib ", "g")],
        [("greedy", "Hib g", "o")],
        [("greedy", "Hib go", " ")],
        [("drop", "Hib go ")],
        [("feed", "Hib", " go")],
        [("top", "Hib go", 1)],
        [("feed", "Hib go", "$")],
        [("drop", "Hib")],
    ]
    (only,) = outcome.candidates
    assert (only.branch.text, only.branch.finished) == ("Hib go", "stop")
    assert outcome.details == {"nudges": 2}
    assert search.live == {only.branch}


def test_the_nudger_is_told_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose texts lose the space that they begin with: the base says " b" and " c"."""
    script = tables(
        lambda text: (" b c$"[len(text)], 0.1 if text in (" b", " b c") else 0.9),
        lambda text: {"b": " c d", "b c": "$"}.get(text, text[3:] + " d"),
    )
    search = ScriptedSearch(script, sampling=GREEDY)
    done = search._do

    def do(verb: Verb) -> Any:
        if isinstance(verb, Feed) and verb.branch.model == "nudger" and not verb.branch.text:
            verb = replace(verb, tokens=str(verb.tokens).lstrip())
        return done(verb)

    monkeypatch.setattr(search, "_do", do)
    search.drive(nudging_search.run(search, PARAMS))
    told = [call for batch in search.calls for call in batch if call[0] == "feed" and call[1] in ("", "b")]
    assert told[-2:] == [("feed", "", "b"), ("feed", "b", " c")]


def test_a_word_ends_with_the_nudgers_text() -> None:
    search = ScriptedSearch(
        tables(lambda text: ("$", 0.9) if text else ("x", 0.1), lambda text: "Hi$"[len(text) :]), sampling=GREEDY
    )
    outcome = search.drive(nudging_search.run(search, PARAMS))
    assert outcome.candidates[0].branch.text == "Hi"
    assert outcome.candidates[0].branch.model == "base"


@pytest.mark.parametrize(("said", "word"), [("Hi\nyou", "Hi"), ("\nHi you", "\nHi"), ("Hi\tyou", "Hi\tyou")])
def test_words_begin_with_a_space_or_a_newline(said: str, word: str) -> None:
    script = tables(lambda text: ("$", 0.9) if text else ("x", 0.1), lambda text: said[len(text) :] + "$")
    search = ScriptedSearch(script, sampling=GREEDY)
    assert search.drive(nudging_search.run(search, PARAMS)).candidates[0].branch.text == word


def test_the_nudger_may_end_the_text() -> None:
    search = ScriptedSearch(
        tables(lambda text: ("x", 0.9 if len(text) < 2 else 0.1), lambda text: "$"), sampling=GREEDY
    )
    (only,) = search.drive(nudging_search.run(search, PARAMS)).candidates
    assert (only.branch.text, only.branch.model, only.branch.finished) == ("xx", "nudger", "stop")
    assert search.live == {only.branch}


def test_sampled_tokens_of_the_base_are_run() -> None:
    search = ScriptedSearch(tables(lambda text: ("x$"[len(text)], 0.9), "?"))
    (only,) = search.drive(nudging_search.run(search, PARAMS)).candidates
    assert search.calls[1:] == [
        [("top", "", 1)],
        [("run", "", "x")],
        [("top", "x", 1)],
        [("run", "x", "")],
        [("drop", "")],
    ]
    assert only.branch.text == "x"


def test_budgets() -> None:
    """Without forks nobody nudges; without tokens it ends."""
    script = tables(lambda text: ("xx$"[len(text)], 0.1), lambda text: "Hi Hi")
    search = ScriptedSearch(script, sampling=GREEDY, max_candidates=0)
    outcome = search.drive(nudging_search.run(search, PARAMS))
    assert (outcome.candidates[0].branch.text, outcome.details["nudges"]) == ("xx", 0)
    search = ScriptedSearch(script, sampling=GREEDY, max_tokens=2)
    (only,) = search.drive(nudging_search.run(search, PARAMS)).candidates
    assert (only.branch.text, only.note) == ("HH", "cut by max_total_tokens")
    assert search.live == {only.branch}
    search = ScriptedSearch(script, sampling=replace(GREEDY, max_tokens=1))
    (only,) = search.drive(nudging_search.run(search, PARAMS)).candidates
    assert only.branch.finished == "length"


@pytest.mark.parametrize(
    ("change", "certain"),
    [
        ({}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": ((3, 1.0),)}, False),
        ({"min_tokens": 2}, False),
        ({"allowed_token_ids": (3,)}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_when_the_likeliest_token_is_sure_to_come(change: dict[str, object], certain: bool) -> None:
    assert likeliest(replace(GREEDY, **change)) is certain  # type: ignore[arg-type]


def test_it_refuses_what_is_no_probability() -> None:
    with pytest.raises(BadRequest) as refused:
        nudging_search.check(NudgingSearch("nudger", 1.5), Sampling())
    assert refused.value.param == "threshold"
    assert nudging_search.KIND.models(PARAMS) == ("nudger",)
