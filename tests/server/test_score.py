"""`/v1/score`, on the real engine over table models: numbers computed by hand, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from tests.fakes import TableModel, random_table
from tests.server.tables import ask, client_of, letters
from tests.server.test_errors import error_of

SCORE = "/v1/score"
LIKELIHOOD = {"rule": "likelihood"}


def prm_scores(prompt: str, steps: list[str]) -> list[float]:
    """The PRM's own reading: P(y) over y and n at each marker."""
    model, ids, found = TableModel("prm", random_table(3, width=257), memory=5), list(prompt.encode()), []
    for step in steps:
        ids += [*step.encode(), ord("+")]
        pair = model.row(ids)[torch.tensor([ord("y"), ord("n")])]
        found.append(float(torch.softmax(pair, 0)[0]))
    return found


def test_scores_of_steps() -> None:
    pairs = [{"prompt": "Q", "response": "one\n\ntwo\n\n"}, {"prompt": "Q", "response": "three"}]
    for extra, how in (({}, lambda v: v[-1]), ({"aggregate": "min"}, min)):  # type: ignore[var-annotated]
        answer = ask(SCORE, {"model": "prm", "input": pairs} | extra).json()
        want = [prm_scores("Q", ["one\n\n", "two\n\n"]), prm_scores("Q", ["three"])]
        assert [each["scores"] for each in answer["data"]] == [pytest.approx(each, abs=1e-5) for each in want]
        assert [each["score"] for each in answer["data"]] == [pytest.approx(how(each), abs=1e-5) for each in want]
        assert (answer["object"], answer["model"]) == ("list", "prm")
        assert answer["usage"]["total_tokens"] > 0


def test_scores_by_likelihood_rules_and_vllms_fields() -> None:
    base = TableModel("base", letters(1), memory=5)
    want = sum(float(torch.log_softmax(base.row(list(b"Q: " + b"hello"[:i])), 0)[b"hello"[i]]) for i in range(5))
    body = {"model": "base", "input": [{"prompt": "Q: ", "response": "hello"}], "scorer": {"rule": "likelihood"}}
    assert ask(SCORE, body).json()["data"][0]["score"] == pytest.approx(want, abs=1e-4)
    body = {"model": "base", "text_1": "Q", "text_2": ["a tide", "b"], "scorer": {"keywords": ["tide"]}}
    assert [each["score"] for each in ask(SCORE, body).json()["data"]] == [1.0, 0.0]
    assert ask("/score", body).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"model": "prm"}, None, 400),
        ({"model": "prm", "input": []}, "input", 400),
        ({"model": "prm", "input": [{"response": "x"}]}, "input.0", 400),
        ({"model": "prm", "input": [{"prompt": "a", "response": "b"}] * 257}, "input", 400),
        ({"model": "base", "input": [{"prompt": "", "response": "b"}], "scorer": LIKELIHOOD}, "input", 400),
        ({"model": "base", "text_1": "", "text_2": "b", "scorer": LIKELIHOOD}, "text_1", 400),
        ({"model": "base", "text_1": "a" * 300, "text_2": "b" * 300, "scorer": LIKELIHOOD}, "text_2", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "aggregate": "max"}, "aggregate", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "separator": ""}, "separator", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "scorer": "prm"}, "scorer", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "scorer": {"model": "rm"}}, "scorer", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "scorer": {"regex": "("}}, "scorer.regex", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "scorer": {"parts": [{"weight": 2}]}}, "scorer.parts.0", 400),
        ({"model": "prm", "text_1": ["a", "b"], "text_2": ["c"]}, "text_1", 400),
        ({"model": "prm", "text_1": "a", "text_2": []}, "text_2", 400),
        ({"model": "prm", "text_1": "a"}, None, 400),
        ({"model": "nobody", "text_1": "a", "text_2": "b"}, "model", 404),
        ({"model": "prm", "text_1": "a", "text_2": "b", "scorer": {"x": 1}}, "scorer.x", 400),
        ({"model": "prm", "text_1": "a", "text_2": "b", "scorer": {"weights": [1.0]}}, "scorer.weights", 400),
        ({"model": "prm", "text_1": "a", "text_2": ["b"] * 257}, "text_2", 400),
        ({"model": "prm", "text_1": "a" * 600, "text_2": "b"}, "text_2", 400),
        ({"model": "prm", "text_1": "a" * 300, "text_2": "b" * 300}, "text_2", 400),
    ],
)
def test_what_cannot_be_scored_is_refused(body: dict[str, Any], param: str | None, status: int) -> None:
    assert error_of(ask(SCORE, body), status)["param"] == param


def test_sentences_say_what_would_be_accepted() -> None:
    pair = {"model": "prm", "text_1": "a", "text_2": "b"}
    for extra, words in (
        ({"scorer": {"model": "rm"}}, "served: base, small, prm"),
        ({"scorer": {"quesion": "x"}}, "Did you mean 'question'"),
        ({"scorer": {"parts": [{}]}}, "'scorer.parts.0' must be exactly one of model, remote, rule"),
        ({"text_1": "a" * 600}, "600 tokens was to be scored; 'prm' takes 512"),
        ({"model": "rm"}, "does not exist. Served: base@best, base, small, prm"),
    ):
        response = ask(SCORE, pair | extra, defaults={"model": "base@best"})
        assert words in response.json()["error"]["message"]


def test_without_a_model_the_first_scorer_is_asked_and_named() -> None:
    pair = {"text_1": "a", "text_2": "b"}
    answer = ask(SCORE, pair).json()
    assert answer["model"] == "prm"
    assert answer["data"] == ask(SCORE, pair | {"model": "prm"}).json()["data"]


@pytest.mark.parametrize(
    ("scorer", "model"),
    [
        ({"model": "prm"}, "prm"),
        ({"model": "small", "question": "Is {answer} right?"}, "small"),
        ({"rule": "length"}, "base"),
        (LIKELIHOOD, "base"),
        ({"parts": [{"rule": "length"}, {"rule": "mean_likelihood"}, {"model": "small"}]}, "small"),
    ],
)
def test_without_a_model_that_of_the_scorer_is_meant(scorer: dict[str, Any], model: str) -> None:
    pair = {"text_1": "a", "text_2": "b c", "scorer": scorer}
    answer = ask(SCORE, pair).json()
    assert answer["model"] == model
    assert answer["data"] == ask(SCORE, pair | {"model": model}).json()["data"]


def test_where_the_default_is_a_preset_its_model_is_meant() -> None:
    pair = {"text_1": "a", "text_2": "b c", "scorer": LIKELIHOOD}
    answer = ask(SCORE, pair, defaults={"model": "base@best"}).json()
    assert answer["model"] == "base"
    assert answer["data"] == ask(SCORE, pair | {"model": "base"}).json()["data"]


def test_a_scorer_that_is_not_served_is_the_one_to_name() -> None:
    error = error_of(ask(SCORE, {"text_1": "a", "text_2": "b", "scorer": {"model": "rm"}}), 400)
    assert (error["param"], "'rm'" in error["message"]) == ("scorer", True)


def test_a_presets_policy_is_not_scored_by_its_model_alone() -> None:
    presets = {"p": {"model": "base", "decoding": {"strategy": "proxy_tuning", "expert": "small", "anti": "base"}},
               "alias": {"model": "base"}}  # fmt: skip
    pair: dict[str, Any] = {"text_1": "a", "text_2": "b c", "scorer": LIKELIHOOD}
    error = error_of(ask(SCORE, pair | {"model": "p"}, presets=presets), 400)
    assert (error["param"], "such as 'base'" in error["message"]) == ("model", True)
    assert ask(SCORE, pair | {"model": "p", "scorer": {"rule": "length"}}, presets=presets).status_code == 200
    same = [ask(SCORE, pair | {"model": name}, presets=presets).json()["data"] for name in ("alias", "base")]
    assert same[0] == same[1]


def test_a_server_of_scorers_alone_scores() -> None:
    body = {"text_1": "Q", "text_2": "three"}
    answer = ask(SCORE, body, kinds={"prm": "prm"}).json()
    assert answer["data"][0]["scores"] == pytest.approx(prm_scores("Q", ["three"]), abs=1e-5)


def test_likelihood_is_of_the_whole_text_up_to_the_end_of_the_context() -> None:
    """A text that just fits is scored to its last token; it was refused above where one more would be cut off."""
    pair = {"model": "base", "text_1": "a", "scorer": LIKELIHOOD}
    shorter, whole = (ask(SCORE, pair | {"text_2": "b" * n}).json()["data"][0]["score"] for n in (510, 511))
    last = torch.log_softmax(TableModel("base", letters(1), memory=5).row(list(b"b" * 5)), 0)[ord("b")]
    assert whole - shorter == pytest.approx(float(last), abs=2e-2)
    assert error_of(ask(SCORE, pair | {"text_2": "b" * 512}))["code"] == "context_length_exceeded"


def test_rules_take_texts_of_any_length() -> None:
    body = {"model": "prm", "text_1": "a", "text_2": "one " * 2000, "scorer": {"rule": "length"}}
    assert ask(SCORE, body).json()["data"][0]["score"] == 2000


def test_nothing_but_the_scorer_is_run_for_scores() -> None:
    """The policy that a request needs computes nothing."""

    async def run() -> str:
        async with client_of() as client:
            await client.post(SCORE, json={"model": "prm", "text_1": "a", "text_2": "b"})
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    assert 'trimtab_scored_tokens_total{scorer="prm"} 3.0' in text
    assert 'trimtab_forwards_total{model="base"} 0.0' in text
    assert 'trimtab_forwards_total{model="prm"} 1.0' in text
    assert 'trimtab_requests_total{model="prm",outcome="ok",strategy="score"} 1.0' in text


PAIR = {"prompt": "A question of words", "response": "one\n\ntwo\n\n"}  # 19, 5 and 5 tokens; the PRM adds 2


@pytest.mark.parametrize(
    ("scorer", "tokens", "held"),
    [
        ({"model": "prm"}, 31, 24),  # all blocks of 4 before the first marker
        ({"model": "base", "scorer": LIKELIHOOD}, 29, 16),  # before the last token of the prompt
        ({"model": "base", "scorer": {"parts": [LIKELIHOOD, {"rule": "mean_likelihood"}]}}, 29, 16),
        ({"model": "base", "scorer": {"parts": [{"model": "prm"}, {"model": "prm"}]}}, 62, 48),
        ({"model": "prm", "scorer": {"rule": "length"}}, 0, 0),
    ],
)
def test_usage_counts_texts_whatever_the_cache_holds(scorer: dict[str, Any], tokens: int, held: int) -> None:
    async def run() -> list[dict[str, Any]]:
        async with client_of() as client:
            body = {"input": [PAIR]} | scorer
            return [(await client.post(SCORE, json=body)).json()["usage"] for _ in range(3)]

    first, *others = asyncio.run(run())
    totals = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert others == [totals | {"prompt_tokens_details": {"cached_tokens": held}}] * 2
    cached = first.pop("prompt_tokens_details")["cached_tokens"]
    assert first == totals
    assert cached <= held / 2, "of one text that is read twice, half at most"
