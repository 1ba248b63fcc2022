"""Beam search over tokens: vLLM's rule, against a plain reference of it, and what is computed for it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch

from decoding.core import BadRequest, Policy, Program, Role, Sampling, SearchPlan, Term
from decoding.search.token_beam import KIND, BeamSearch, run
from decoding.search.verbs import Outcome
from tests.fakes import TableModel, random_table, table_engine
from tests.scripted import Script, ScriptedSearch

Top = Callable[[str], Sequence[tuple[str, float]]]
Found = list[tuple[str, bool, float]]


def searching(top: Top, limit: int | None = 6, prompt: str = "Q", **search: Any) -> ScriptedSearch:
    script = Script(top=top, lp=lambda text, char: dict(top(text))[char])
    return ScriptedSearch(script, prompt, Sampling(max_tokens=limit), **search)


def drive(search: ScriptedSearch, params: BeamSearch) -> Outcome:
    outcome = search.drive(run(search, params))
    assert search.live == {each.branch for each in outcome.candidates}, "what is not returned is dropped"
    return outcome


def found_by(outcome: Outcome) -> Found:
    return [(e.branch.text, e.branch.finished == "stop", pytest.approx(e.score)) for e in outcome.candidates]


def vllm(top: Top, params: BeamSearch, prompt: int, limit: int, keep: int | None = None) -> Found:
    """vLLM's loop: `limit` steps, whatever happens; then complete and live beams are sorted together."""

    def score(text: str, logprob: float) -> float:
        return float(logprob / (prompt + len(text)) ** params.length_penalty)

    beams, completed = [("", 0.0)], []
    for _ in range(limit):
        new = []
        for text, logprob in beams:
            for char, lp in sorted(top(text), key=lambda e: (-e[1], e[0]))[: 2 * params.width]:
                if char == "$":
                    completed.append((text, True, score(text, logprob + lp)))
                else:
                    new.append((text + char, logprob + lp))
        beams = sorted(new, key=lambda beam: -beam[1])[: params.width]
    found = completed + [(text, False, score(text, logprob)) for text, logprob in beams]
    return sorted(found, key=lambda each: -each[2])[: keep or params.width]


def rows(seed: int, letters: str = "abc$", scale: float = 1.0) -> Top:
    """A row by the text: log-probs of all letters, normalised."""

    def top(text: str) -> list[tuple[str, float]]:
        rng = random.Random(f"{seed} {text}")
        logits = [scale * rng.gauss(0.0, 1.0) for _ in letters]
        total = math.log(sum(map(math.exp, logits)))
        return [(char, z - total) for char, z in zip(letters, logits, strict=True)]

    return top


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
def test_it_is_vllms(seed: int, penalty: float) -> None:
    """Texts, order and scores, for several widths; it also ends sooner, which must change nothing."""
    top, prompt = rows(seed, scale=2.0), "Q" * (1 + seed % 3 * 5)
    for width in (1, 2, 3):
        params = BeamSearch(width, penalty)
        assert vllm(top, params, len(prompt), 6) == found_by(drive(searching(top, prompt=prompt), params))


def test_the_reference_sees_wrong_rules() -> None:
    """Without the prompt in the length, or with another power, outcomes differ."""
    lengths = powers = 0
    for seed in range(25):
        top = rows(seed, scale=2.0)
        right = vllm(top, BeamSearch(3, 1.0), 6, 6)
        lengths += [e[:2] for e in right] != [e[:2] for e in vllm(top, BeamSearch(3, 1.0), 1, 6)]
        powers += [e[:2] for e in right] != [e[:2] for e in vllm(top, BeamSearch(3, 0.0), 6, 6)]
    assert lengths > 3
    assert powers > 3


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_likeliest_text(seed: int) -> None:
    """Against all texts of up to four letters."""
    top = rows(seed)

    def logprob(text: str) -> float:
        return sum(dict(top(text[:i]))[char] for i, char in enumerate(text))

    complete = ["".join(text) + "$" for n in range(4) for text in product("abc", repeat=n)]
    every = complete + ["".join(text) for text in product("abc", repeat=4)]
    outcome = drive(searching(top, limit=4), BeamSearch(64, 0.0))
    best = max(every, key=logprob)
    assert outcome.candidates[0].branch.text == best.rstrip("$")
    assert outcome.candidates[0].score == pytest.approx(logprob(best))


FEW = {
    "": [("a", -0.5), ("b", -1.2), ("$", -3.0)],
    "a": [("a", -1.0), ("b", -1.5), ("$", -2.0)],
    "b": [("$", -0.1), ("a", -3.0), ("b", -3.5)],
}


def few(text: str) -> Sequence[tuple[str, float]]:
    return FEW.get(text, [("$", -0.2), ("a", -2.0), ("b", -3.0)])


def test_the_calls_of_a_short_search() -> None:
    """A beam's first continuation takes its branch, others take forks; what cannot win any more is not grown."""
    search = searching(few)
    outcome = drive(search, BeamSearch(2, 0.0))
    assert search.calls == [
        [("top", "", 4)],
        [("fork", "", 2)],
        [("feed", "", "a"), ("feed", "", "b"), ("feed", "", "$")],  # -0.5 and -1.2 go on, -3.0 is complete
        [("top", "a", 4), ("top", "b", 4)],
        [("fork", "a", 2)],
        [("feed", "a", "a"), ("feed", "a", "b"), ("feed", "a", "$"), ("feed", "b", "$")],  # -1.5, -2.0; -2.5, -1.3
        [("drop", "")],
        [("top", "aa", 4), ("top", "ab", 4)],
        [("drop", "ab")],
        [("feed", "aa", "$")],  # -1.7; "ab" would have -2.2, and letters -3.5 at best
        [("drop", "a")],
    ]
    assert [(e.branch.text, e.branch.finished) for e in outcome.candidates] == [("b", "stop"), ("aa", "stop")]
    assert [e.score for e in outcome.candidates] == pytest.approx([-1.3, -1.7])
    assert outcome.reason == ""
    assert search.messages == ["1 tokens, 1 complete", "2 tokens, 2 complete", "3 tokens, 2 complete"]


def test_ties_go_to_the_first_beam_and_the_lower_id() -> None:
    top = lambda text: [("b", -1.0), ("a", -1.0)]  # noqa: E731
    assert [e.branch.text for e in drive(searching(top, 2), BeamSearch(2)).candidates] == ["aa", "ab"]


def test_a_text_that_max_tokens_cuts_may_win() -> None:
    """As in vLLM: it is ranked with the others."""
    outcome = drive(searching(lambda text: [("a", -0.1), ("$", -2.5)], 3), BeamSearch(1, 0.0))
    assert [(e.branch.text, e.branch.finished) for e in outcome.candidates] == [("aaa", "length")]
    assert outcome.candidates[0].note == "cut by max_tokens or the context"
    outcome = drive(searching(lambda text: [("a", -0.1), ("$", -2.5)], 3), BeamSearch(2, 0.0))
    assert outcome.candidates[1].branch.finished == "stop"
    assert outcome.reason == "", "some ended"


def test_a_token_that_ends_the_text_unforeseen_completes_it() -> None:
    """As one does that completes a stop string: no end is known beforehand."""
    search = searching(lambda text: [("a", -0.5), ("b", -0.9)], 3)
    search.stops = "b"
    outcome = drive(search, BeamSearch(2, 0.0))
    assert [(e.branch.text, e.branch.finished) for e in outcome.candidates] == [("b", "stop"), ("ab", "stop")]
    assert [e.score for e in outcome.candidates] == pytest.approx([-0.9, -1.4])


def test_as_many_texts_as_the_client_wants() -> None:
    top = rows(3)
    outcome = drive(searching(top, n=4), BeamSearch(2, 1.0))
    assert found_by(outcome) == vllm(top, BeamSearch(2, 1.0), 1, 6, keep=4)


def test_an_end_at_once() -> None:
    outcome = drive(searching(lambda text: [("$", -0.1), ("a", -5.0)], prompt=""), BeamSearch(1, 1.0))
    assert [(e.branch.text, e.score) for e in outcome.candidates] == [("", -0.1)]


@pytest.mark.parametrize("impossible", [[], [("a", -math.inf)]])
def test_where_nothing_is_possible_there_is_still_an_answer(impossible: list[tuple[str, float]]) -> None:
    search = searching(lambda text: impossible)
    assert [each.branch for each in search.drive(run(search, BeamSearch(2))).candidates] == [search.root]


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_without_candidates_the_best_goes_on_alone() -> None:
    search = searching(few, max_candidates=0)
    outcome = drive(search, BeamSearch(2, 0.0))
    assert outcome.candidates[0].branch is search.root
    assert len(outcome.candidates) == 1
    assert outcome.candidates[0].branch.text == "aaaaaa"
    assert outcome.reason.startswith("No hypothesis reached its end: 'max_candidates' is used up.")


def test_a_spent_budget_ends_it_with_what_there_is() -> None:
    search: ScriptedSearch

    def top(text: str) -> Sequence[tuple[str, float]]:
        if len(text) == 2:
            search.exhausted = "max_seconds"
        return few(text)

    search = searching(top)
    outcome = drive(search, BeamSearch(2, 0.0))
    assert [(e.branch.text, e.note) for e in outcome.candidates] == [("b", ""), ("aa", "")]
    assert outcome.reason == "The search was cut short: 'max_seconds' is used up."


# -- on the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_it_is_vllms_on_the_engine(seed: int, penalty: float) -> None:
    """Texts and order of the engine's choices, against the reference over the model's own rows."""
    table = random_table(seed, width=257, scale=2.0)
    table[:, :256] -= 40.0 * ((torch.arange(256) - 99).abs() > 2)  # letters a to e, and the end
    prompt = "prompt"
    model = TableModel("base", table, memory=3)

    def top(text: str) -> Sequence[tuple[str, float]]:
        lps = model.row([*prompt.encode(), *map(ord, text)]).double().log_softmax(0)
        return [("$" if i == 256 else chr(i), float(lp)) for i, lp in enumerate(lps)]

    params = BeamSearch(3, penalty)
    plain = Policy((Term("base", Role("base")),))
    program = Program("plain", plain, search=SearchPlan(KIND.name, params))
    engine = table_engine({"base": TableModel("base", table, memory=3)}, blocks=512)
    made = engine.generate(prompt, program, Sampling(max_tokens=5), n=3)
    engine.check()
    wanted = vllm(lambda text: [each for each in top(text) if each[1] > -20], params, len(prompt), 5)
    assert [(each.text, each.finish_reason == "stop") for each in made] == [each[:2] for each in wanted]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (BeamSearch(0), "width"),
        (BeamSearch(65), "width"),
        (BeamSearch(2, math.nan), "length_penalty"),
        (BeamSearch(2, 11.0), "length_penalty"),
    ],
)
def test_parameters_out_of_range_are_refused(params: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        KIND.check(params, Sampling())
    assert refused.value.param == param


def test_the_kind_says_what_it_takes() -> None:
    KIND.check(BeamSearch(), Sampling(temperature=0.0))
    assert BeamSearch() == BeamSearch(4, 1.0)
    assert KIND.independent(BeamSearch()) == 1
