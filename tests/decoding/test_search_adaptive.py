"""Adaptive sampling: when it stops, what it prunes, what it picks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from decoding.core import BadRequest, Sampling
from decoding.search import adaptive
from decoding.search.adaptive import Adaptive
from decoding.search.verbs import Run, Verb
from tests.scripted import Script, ScriptedSearch, spy

TEXTS = ["aa", "bbbb", "cccc", "dddd", "eeee", "ffff"]  # the samples, in order
NO = math.log(3.0)  # of "no" against "yes": 0.75 sure


def tables(sure: dict[str, float]) -> Script:
    """Samples are TEXTS; the model's confidence in a text is that of its first letter."""

    def probe(text: str, suffix: Any, choices: Any) -> list[float]:
        assert choices == (" no", " yes")
        p = sure[text[0]]
        return [math.log(p) - 7.0 if p else -math.inf, math.log(1 - p) - 7.0]

    return Script(go=lambda text, index, greedy: TEXTS[index][len(text) :] + "$", probe=probe)


def test_it_stops_at_once_when_the_greedy_answer_is_good() -> None:
    search = ScriptedSearch(tables({"a": 0.9}))
    outcome = search.drive(adaptive.run(search, Adaptive(threshold=0.9)))
    assert search.calls == [
        [("fork", "", 1)],
        [("greedy", "", "aa")],
        [("probe", "aa", adaptive.QUESTION)],
        [("drop", "")],
    ]
    assert [(c.branch.text, c.score) for c in outcome.candidates] == [("aa", pytest.approx(0.9))]
    assert outcome.details == {"samples": 1, "pruned": 0}


def test_it_samples_in_waves_until_it_is_sure() -> None:
    sure = {"a": 0.2, "b": 0.5, "c": 0.3, "d": 0.8, "e": 0.1}
    search = ScriptedSearch(tables(sure))
    outcome = search.drive(adaptive.run(search, Adaptive(threshold=0.75, wave=2)))
    assert [c.branch.text for c in outcome.candidates] == ["dddd", "bbbb", "cccc", "aa", "eeee"]
    assert [c.score for c in outcome.candidates] == pytest.approx([0.8, 0.5, 0.3, 0.2, 0.1])
    assert outcome.details == {"samples": 5, "pruned": 0}
    assert search.live == {c.branch for c in outcome.candidates}
    assert search.messages == ["1 samples: 20% sure", "3 samples: 50% sure", "5 samples: 80% sure"]


def test_max_samples_ends_it_and_cuts_the_last_wave() -> None:
    search = ScriptedSearch(tables(dict.fromkeys("abcdef", 0.5)))
    outcome = search.drive(adaptive.run(search, Adaptive(max_samples=4, wave=2)))
    assert [call for batch in search.calls for call in batch if call[0] == "fork"] == [
        ("fork", "", 1),
        ("fork", "", 2),
        ("fork", "", 1),
    ]
    assert [c.branch.text for c in outcome.candidates] == TEXTS[:4]  # ties: the order in which they came


def test_the_first_sample_is_greedy_and_the_others_get_hotter() -> None:
    seen: list[list[Verb]] = []
    search = ScriptedSearch(tables(dict.fromkeys("abcdef", 0.5)), sampling=Sampling(temperature=0.8))
    search.drive(spy(adaptive.run(search, Adaptive(max_samples=5, wave=2, schedule=(0.0, 0.5, 1.0))), seen))
    runs = [verb for batch in seen for verb in batch if isinstance(verb, Run)]
    assert [run.sampling.temperature for run in runs if run.sampling] == pytest.approx([0.0, 0.4, 0.8, 0.8, 0.8])


def test_the_weakest_of_a_wave_are_pruned_part_way() -> None:
    """Of b, c, d, e at two letters the weakest two go; what has ended by then is never one of them."""
    sure = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3, "e": 0.6}
    search = ScriptedSearch(tables(sure))
    params = Adaptive(max_samples=5, wave=4, prune_at=2, prune_fraction=0.5)
    outcome = search.drive(adaptive.run(search, params))
    assert search.calls[3:] == [
        [("fork", "", 4)],
        [("run", "", "bb"), ("run", "", "cc"), ("run", "", "dd"), ("run", "", "ee")],
        [("probe", text, adaptive.QUESTION) for text in ("bb", "cc", "dd", "ee")],
        [("drop", "cc"), ("drop", "dd")],
        [("run", "bb", "bb"), ("run", "ee", "ee")],
        [("probe", text, adaptive.QUESTION) for text in ("bbbb", "eeee")],
        [("drop", "")],
    ]
    assert [(c.branch.text, c.note) for c in outcome.candidates] == [
        ("eeee", ""),
        ("bbbb", ""),
        ("aa", ""),
        ("dd", "pruned"),
        ("cc", "pruned"),
    ]
    assert outcome.details == {"samples": 5, "pruned": 2}

    search = ScriptedSearch(tables(sure))
    outcome = search.drive(adaptive.run(search, Adaptive(max_samples=3, wave=2, prune_at=9, prune_fraction=0.5)))
    assert outcome.details["pruned"] == 0


def test_ties_prune_the_later_one() -> None:
    search = ScriptedSearch(tables(dict.fromkeys("abc", 0.5)))
    outcome = search.drive(adaptive.run(search, Adaptive(max_samples=3, wave=2, prune_at=2)))
    assert [c.branch.text for c in outcome.candidates] == ["aa", "bbbb", "cc"]


def test_a_self_evaluation_model_is_scored_instead() -> None:
    script = Script(go=lambda text, index, greedy: TEXTS[index] + "$", scores=lambda h, s: [0.9 * (h.text == "bbbb")])
    search = ScriptedSearch(script)
    params = Adaptive(max_samples=9, threshold=0.9, wave=2, self_eval="sure")  # as sure as it must be
    outcome = search.drive(adaptive.run(search, params))
    assert [c.branch.text for c in outcome.candidates] == ["bbbb", "aa", "cccc"]
    assert adaptive.KIND.scorers(params) == ("sure",)
    assert adaptive.KIND.independent(params) == 9


def test_budgets_end_it_with_what_there_is() -> None:
    sure = dict.fromkeys("abcdef", 0.5)
    search = ScriptedSearch(tables(sure), max_candidates=2)
    outcome = search.drive(adaptive.run(search, Adaptive(wave=2)))
    assert [c.branch.text for c in outcome.candidates] == ["aa", "bbbb"]
    search = ScriptedSearch(tables(sure), max_tokens=4)
    outcome = search.drive(adaptive.run(search, Adaptive(wave=1)))
    assert [(c.branch.text, c.note) for c in outcome.candidates] == [("aa", ""), ("bb", "cut by max_total_tokens")]
    search = ScriptedSearch(tables(sure), max_candidates=0)
    outcome = search.drive(adaptive.run(search, Adaptive(wave=1)))
    assert [c.branch.text for c in outcome.candidates] == ["aa"]
    assert search.live == {outcome.candidates[0].branch}


@pytest.mark.parametrize(("a", "b", "p"), [(0.0, -800.0, 1.0), (-800.0, 0.0, 0.0), (-math.inf, -math.inf, 0.0)])
def test_shares_of_extreme_log_probs(a: float, b: float, p: float) -> None:
    assert adaptive._share(a, b) == p


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_samples": 0}, "max_samples"),
        ({"max_samples": 65}, "max_samples"),
        ({"wave": 0}, "wave"),
        ({"threshold": 1.5}, "threshold"),
        ({"prune_at": 0}, "prune_at"),
        ({"prune_fraction": 1.0}, "prune_fraction"),
        ({"schedule": ()}, "schedule"),
        ({"schedule": (0.5, 0.2)}, "schedule"),
        ({"schedule": (-0.5, 0.2)}, "schedule"),
        ({"choices": ("no", "no")}, "choices"),
        ({"choices": ("", "no")}, "choices"),
    ],
)
def test_it_refuses(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        adaptive.check(Adaptive(**change), Sampling())
    assert refused.value.param == param
    adaptive.check(Adaptive(), Sampling())
