"""DeAL and ARGS: against their definitions written out anew, what is kept from one token to the next, budgets."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.scorers.spec import Hypothesis, ScorerParams
from decoding.search import deal, reward_search
from decoding.search.deal import Deal
from decoding.search.reward_search import RewardSearch, choose
from decoding.search.verbs import Run, Verb
from tests.scripted import Script, ScriptedSearch, language, spy

Rows = Callable[[str], list[tuple[str, float]]]
Value = Callable[[str], float]


def random_rows(seed: int, end: float = 0.3) -> Rows:
    """A language of five letters whose rows depend on the last two; `end` weighs the end of the text."""

    def rows(text: str) -> list[tuple[str, float]]:
        noise = random.Random(f"{seed} {text[-2:]}")
        weights = {char: noise.random() ** 2 for char in "abcde"} | {"$": end * noise.random()}
        return [(char, math.log(weight / sum(weights.values()))) for char, weight in weights.items() if weight]

    return rows


def random_value(seed: int) -> Value:
    return lambda text: random.Random(f"{seed} {text}").random() * 2


def scored(value: Value) -> Callable[[Hypothesis, Any], list[float]]:
    return lambda hypothesis, scorer: [value(hypothesis.text)]


def best(rows: Rows, text: str, k: int) -> list[tuple[str, float]]:
    return sorted(rows(text), key=lambda entry: (-entry[1], ord(entry[0])))[:k]


def definition(rows: Rows, value: Value, params: Deal, max_tokens: int) -> list[tuple[str, float, bool]]:
    """DeAL without branches: (text, value, ended by itself), best first."""

    def ahead(text: str) -> str:
        for _ in range(params.lookahead):
            char = best(rows, text, 1)[0][0]
            if char == "$" or len(text) == max_tokens:
                break
            text += char
        return text

    live, ended = [("", 0.0)], list[tuple[str, float, bool]]()
    while live:
        options = []
        for text, lp in live:
            for char, more in best(rows, text, params.k):
                done = char == "$"
                whole = text if done else ahead(text + char)
                total = lp + more + params.weight * value(whole)
                options.append((total, char, text + char * (not done), lp + more, done))
        options.sort(key=lambda option: (-option[0], option[1]))
        kept = options[: params.beams - len(ended)]
        ended += [(text, total, done) for total, _, text, _, done in kept if done or len(text) == max_tokens]
        live = [(text, lp) for _, _, text, lp, done in kept if not done and len(text) < max_tokens]
    return sorted(ended, key=lambda each: (not each[2], -each[1]))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("beams", [1, 3])
def test_deal_is_its_definition(seed: int, beams: int) -> None:
    """Whatever is kept from one token to the next, the choices are those of starting anew at every token."""
    params = Deal(k=3 + seed % 3, lookahead=1 + seed % 4, weight=0.5 + seed % 2, scorer="rm", beams=beams)
    rows, value = random_rows(seed), random_value(seed)
    search = ScriptedSearch(language(rows, scores=scored(value)), sampling=Sampling(max_tokens=12))
    outcome = search.drive(deal.run(search, params))
    found = [(c.branch.text, c.score, c.branch.finished == "stop") for c in outcome.candidates]
    wanted = definition(rows, value, params, 12)
    assert [each[0::2] for each in found] == [each[0::2] for each in wanted]
    assert [each[1] for each in found] == pytest.approx([each[1] for each in wanted])
    assert search.live == {c.branch for c in outcome.candidates}


def halved(value: Value) -> Value:
    return lambda text: value(text) / 2


@pytest.mark.parametrize("weight", [0.7, -0.7])
def test_tokens_that_cannot_win_are_not_looked_at(weight: float) -> None:
    """A constraint gives 0 to 1: what is out by more than that is out at once, and the choice is the same."""
    tried = {"bounded": 0, "open": 0}
    for seed in range(20):
        rows, value = random_rows(seed), random_value(seed)
        results = []
        for name, how in (("bounded", {"constraint": ScorerParams(keywords=("x",))}), ("open", {"scorer": "rm"})):
            params = Deal(k=5, lookahead=2, weight=weight, beams=1 + seed % 2, **how)  # type: ignore[arg-type]
            within = language(rows, scores=scored(halved(value)))
            search = ScriptedSearch(within, sampling=Sampling(max_tokens=10))
            outcome = search.drive(deal.run(search, params))
            results.append([(c.branch.text, c.score) for c in outcome.candidates])
            tried[name] += sum(call[0] == "greedy" for batch in search.calls for call in batch)
        assert results[0] == results[1]
    assert tried["bounded"] < 0.8 * tried["open"]


def forwards(search: ScriptedSearch) -> int:
    """Passes of the policy that wait for each other: a run of n tokens is n, `Top` one, all else none."""
    total = 0
    for batch in search.calls:
        costs = [1 if call[0] == "top" else len(call[2]) if call[0] == "greedy" else 0 for call in batch]
        total += max(costs, default=0)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_deal_takes_as_many_passes_a_token_as_it_looks_ahead(seed: int) -> None:
    """l a token, behind one for the first candidates; starting anew would take l + 1."""
    rows = random_rows(seed, end=0.0)
    search = ScriptedSearch(language(rows, scores=scored(random_value(seed))), sampling=Sampling(max_tokens=40))
    outcome = search.drive(deal.run(search, Deal(lookahead=10, scorer="rm")))
    assert len(outcome.candidates[0].branch.tokens) == 40
    assert forwards(search) <= 1 + 10 * 40
    assert sum(call[0] == "top" for batch in search.calls[1:] for call in batch) <= 40


def chain(text: str) -> list[tuple[str, float]]:
    """Greedy is always the next letter; the second best is the letter after that."""
    last = ord(text[-1]) if text else ord("`")
    return [(chr(last + 1), -0.1), (chr(last + 2), -3.0)]


def test_deal_keeps_the_look_ahead_and_its_rows() -> None:
    """The greedy option grows by one token; the other starts anew, with what it may rejoin as drafts."""
    seen: list[list[Verb]] = []
    search = ScriptedSearch(language(chain), sampling=Sampling(max_tokens=2))
    outcome = search.drive(spy(deal.run(search, Deal(k=2, lookahead=3, scorer="rm")), seen))
    assert search.calls == [
        [("top", "", 2)],
        [("fork", "", 2)],
        [("feed", "", "a"), ("feed", "", "b")],
        [("greedy", "a", "b"), ("greedy", "b", "c")],  # cut by max_tokens
        [("score", "ab", 0.0), ("score", "bc", 0.0)],
        [("fork", "", 1)],
        [("feed", "", "a")],
        [("drop", ""), ("drop", "bc")],
        [("fork", "a", 2)],
        [("feed", "a", "b"), ("feed", "a", "c")],
        [("score", "ab", 0.0), ("score", "ac", 0.0)],
        [("drop", "a"), ("drop", "ab"), ("drop", "ac")],
    ]
    assert outcome.candidates[0].branch.text == "ab"

    seen.clear()
    search = ScriptedSearch(language(chain), sampling=Sampling(max_tokens=9))
    search.drive(spy(deal.run(search, Deal(k=2, lookahead=3, scorer="rm")), seen))
    second = search.calls.index([("feed", "a", "b"), ("feed", "a", "c")])
    assert search.calls[second + 1] == [("greedy", "ac", "def"), ("top", "ab", 2), ("greedy", "abcd", "e")]
    runs = [verb for verb in seen[second + 1] if isinstance(verb, Run)]
    assert [run.drafts for run in runs] == [[ord("d")], ()]  # "c" stands in "bcd": what comes after it there


def test_deal_looks_where_a_text_leads() -> None:
    """The likelier token leads nowhere: only the look-ahead shows it."""

    def rows(text: str) -> list[tuple[str, float]]:
        return [("a", -0.5), ("b", -1.0)] if not text else [("$", -0.1)] if len(text) > 2 else [(text[0], -0.1)]

    tables = language(rows, scores=lambda h, _: [float("bb" in h.text)])
    for weight, text in ((0.4, "aaa"), (0.6, "bbb")):  # b costs 0.5 and gains the weight
        search = ScriptedSearch(tables)
        params = Deal(k=2, lookahead=2, weight=weight, constraint=ScorerParams(keywords=("bb",)))
        assert search.drive(deal.run(search, params)).candidates[0].branch.text == text


TIED = [("b", -0.5), ("c", -1.0), ("a", -1.0)]  # with 0.5 more for a and c all are -0.5


@pytest.mark.parametrize("run", [deal.run, reward_search.run])
def test_ties_go_to_the_lower_id_and_what_has_no_score_comes_last(run: Any) -> None:
    params = Deal(k=3, lookahead=1, scorer="rm") if run is deal.run else RewardSearch("rm", k=3)
    for nothing, text in (("", "a"), ("a", "b"), ("ab", "c"), ("abc", "a")):
        tables = language(
            lambda text: [("$", -0.1)] if text else TIED,
            scores=lambda h, _, nothing=nothing: [math.nan if h.text in nothing else 0.5 * (h.text != "b")],
        )
        search = ScriptedSearch(tables)
        (only,) = search.drive(run(search, params)).candidates
        assert only.branch.text == text
        assert only.score is None if nothing == "abc" else math.isfinite(only.score or 0.0)


def test_deal_out_of_tokens_answers_with_what_it_looked_ahead() -> None:
    search = ScriptedSearch(language(chain), max_tokens=11, sampling=Sampling(max_tokens=9))
    outcome = search.drive(deal.run(search, Deal(k=2, lookahead=3, scorer="rm")))
    (only,) = outcome.candidates  # 6 tokens for "a", 4 for "ab", then one of the look-aheads of the third
    assert only.branch.text.startswith("abcde")
    assert only.note == "cut by max_total_tokens"
    assert outcome.details["steps"] == 2
    assert search.live == {only.branch}


def test_deal_out_of_branches_goes_on_greedily() -> None:
    search = ScriptedSearch(language(chain), max_candidates=3, sampling=Sampling(max_tokens=9))
    outcome = search.drive(deal.run(search, Deal(k=2, lookahead=3, scorer="rm")))
    assert [c.branch.text for c in outcome.candidates] == ["abcdefghi"]
    assert search.live == {outcome.candidates[0].branch}


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (Deal(), "scorer"),
        (Deal(scorer="rm", constraint=ScorerParams(min_words=3)), "scorer"),
        (Deal(constraint=ScorerParams(model="rm")), "constraint"),
        (Deal(scorer="rm", k=0), "k"),
        (Deal(scorer="rm", lookahead=0), "lookahead"),
        (Deal(scorer="rm", beams=0), "beams"),
        (Deal(scorer="rm", weight=math.inf), "weight"),
    ],
)
def test_deal_refuses(params: Deal, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        deal.check(params, Sampling())
    assert refused.value.param == param


@pytest.mark.parametrize("seed", range(8))
def test_reward_search_is_its_definition(seed: int) -> None:
    rows, value = random_rows(seed), random_value(seed)
    text, done = "", False
    while not done and len(text) < 15:
        options = [(lp + 1.5 * value(text + char.strip("$")), char) for char, lp in best(rows, text, 4)]
        char = min(options, key=lambda option: (-option[0], option[1]))[1]
        text, done = text + char.strip("$"), char == "$"
    search = ScriptedSearch(language(rows, scores=scored(value)), sampling=Sampling(max_tokens=15))
    (only,) = search.drive(reward_search.run(search, RewardSearch("rm", k=4, weight=1.5))).candidates
    assert (only.branch.text, only.branch.finished) == (text, "stop" if done else "length")
    assert only.score == value(text)
    assert search.live == {only.branch}


def test_reward_search_in_verbs() -> None:
    tables = language(
        lambda text: [("$", -0.1)] if text else [("a", -1.0), ("b", -2.0)],
        scores=lambda h, _: [2.0 if h.text == "b" else 0.5],
    )
    search = ScriptedSearch(tables)
    search.drive(reward_search.run(search, RewardSearch("rm", k=2)))
    assert search.calls == [
        [("top", "", 2)],
        [("fork", "", 2)],
        [("feed", "", "a"), ("feed", "", "b")],
        [("score", "a", 0.5), ("score", "b", 2.0)],
        [("drop", ""), ("drop", "a")],
        [("top", "b", 2)],
        [("fork", "b", 1)],
        [("feed", "b", "$")],
        [("score", "b", 2.0)],
        [("drop", "b")],
    ]


def test_reward_search_draws_from_the_softmax() -> None:
    """Sums 0.3, -0.5 and 0.1 at temperature 0.5."""
    tops = [("a", -0.7), ("b", -1.5), ("c", -0.9)]
    params = RewardSearch("rm", k=3, sample=True)
    sampling = Sampling(temperature=0.5, max_tokens=1)
    counts: Counter[str] = Counter()
    for seed in range(2000):
        search = ScriptedSearch(Script(top=lambda text: tops, scores=lambda h, _: [1.0]), sampling=sampling, seed=seed)
        counts[search.drive(reward_search.run(search, params)).candidates[0].branch.text] += 1
    weights = {char: math.exp((lp + 1.0) / 0.5) for char, lp in tops}
    for char, weight in weights.items():
        share = weight / sum(weights.values())
        assert counts[char] / 2000 == pytest.approx(share, abs=4 * math.sqrt(share / 2000))
    search = ScriptedSearch(Script(top=lambda text: tops, scores=lambda h, _: []), sampling=sampling)
    assert search.drive(reward_search.run(search, params)).candidates[0].branch.text == "a"
    search = ScriptedSearch(Script(top=lambda text: tops), sampling=replace(sampling, temperature=0.0))
    assert search.drive(reward_search.run(search, params)).candidates[0].branch.text == "a"


def test_a_reward_without_a_bound_is_drawn() -> None:
    search = ScriptedSearch(Script())
    assert choose(search, RewardSearch("rule", sample=True), [0.0, math.inf, -math.inf], [1, 2, 3]) == 1


def test_reward_search_out_of_branches_goes_on_as_the_policy_does() -> None:
    tables = Script(go=lambda text, index, greedy: "xy$", top=lambda text: [("a", -1.0), ("b", -2.0)])
    search = ScriptedSearch(tables, max_candidates=2)
    (only,) = search.drive(reward_search.run(search, RewardSearch("rm", k=2))).candidates
    assert only.branch.text == "axy"
    assert search.live == {only.branch}


@pytest.mark.parametrize(("change", "param"), [({"k": 0}, "k"), ({"weight": math.nan}, "weight")])
def test_reward_search_refuses(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        reward_search.check(RewardSearch("rm", **change), Sampling())
    assert refused.value.param == param
    assert reward_search.KIND.scorers(RewardSearch("rm")) == ("rm",)
    assert deal.KIND.scorers(Deal(scorer="rm")) == ("rm", None)
