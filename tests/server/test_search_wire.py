"""What searches look like on the wire, to the letter: bodies, frames, reports, metrics. The engine here is a fake."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

import decoding.search
import server.catalog
from decoding.core import BadRequest, ModelLoadError, Sampling
from decoding.events import ModelInfo
from decoding.prepare import Entry
from decoding.scorers.spec import ScorerSpec
from decoding.search.spec import SearchKind
from decoding.search.verbs import Steps
from decoding.strategies import discover
from server.catalog import Served
from server.config import Preset
from server.searching import Bounds
from tests.server.conftest import STEERING, TEXTS, Ask, open_client
from tests.server.fake_engine import ANSWER, MODELS, WIDTH
from tests.server.test_chat import chunks
from tests.server.test_errors import CHAT, HI, TEXT, X, error_of


@dataclass(frozen=True, slots=True)
class Guess:
    """Parameters of a search that only this test knows."""

    scorer: ScorerSpec | None = field(default=None, metadata={"description": "Ranks."})
    n: int = 4
    helper: str | None = None


def check(params: Guess, sampling: Sampling) -> None:
    if params.n < 1:
        raise BadRequest("'n' must be at least 1.", "n")
    if sampling.temperature > 1.5:
        raise BadRequest("It is too hot to guess; give a temperature up to 1.5.", "n")


def run(_search: Any, _params: Guess) -> Steps:
    raise AssertionError("the fake engine runs no generator")


GUESS = SearchKind(
    "guess", "Guesses.", Guess, run, "a guess", check, scorers=lambda p: (p.scorer,), models=lambda p: (p.helper,),
    temperature=0.5, independent=lambda p: p.n, needs=("luck",), paper="None 2000",
)  # fmt: skip
SEARCH: dict[str, Any] = {"kind": "guess", "scorer": "expert"}


@pytest.fixture(autouse=True)
def guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more search, to show that the server knows none by name."""
    monkeypatch.setitem(decoding.search.SEARCHES, "guess", GUESS)


def searching(**params: Any) -> dict[str, Any]:
    return {"decoding": {"search": SEARCH | params}}


REPORT: dict[str, Any] = {
    "kind": "guess",
    "reason": "It ended early.",
    "exhausted": None,
    "branches": 3,
    "generated_tokens": 40,
    "scored_tokens": {"expert": 12},
    "details": {"votes": {"42": 1.5, "none": None}, "rows": [1, [None, True]], "kind": "{1}"},
}
CANDIDATES = [
    {"text": ANSWER, "tokens": 10, "finish_reason": "stop", "score": 0.5, "scores": [0.25, 0.5], "answer": "42",
     "note": None},
    {"text": " Hel", "tokens": 3, "finish_reason": "length", "score": None, "scores": [None], "answer": None,
     "note": "cut by max_tokens"},
]  # fmt: skip


def decoding_of(**changes: Any) -> dict[str, Any]:
    return {
        "strategy": "plain",
        "lossless": False,
        "models": ["base", "expert"],
        "forwards": {"base": 9, "expert": 3},
        "preemptions": 0,
        "speculation": None,
        "stop_reasons": [None],
        "search": REPORT,
    } | changes


USAGE = {
    "prompt_tokens": 1,
    "completion_tokens": 40,
    "total_tokens": 41,
    "prompt_tokens_details": {"cached_tokens": 2},
}


def test_a_whole_answer_to_the_letter(ask: Ask) -> None:
    answer = ask(TEXT, X | searching()).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    choice = {"index": 0, "finish_reason": "stop", "text": ANSWER, "logprobs": None}
    assert answer == {
        "object": "text_completion",
        "model": "base",
        "choices": [choice],
        "usage": USAGE,
        "system_fingerprint": None,
        "decoding": decoding_of(),
    }


def test_a_search_takes_one_place_in_the_queue(ask: Ask) -> None:
    full = {"max_queue": 1, "max_num_seqs": 1}
    answer = ask(TEXT, X | {"n": 3} | searching(), **full).json()
    assert len(answer["choices"]) == 3
    refused = ask(TEXT, X | {"n": 3, "prompt": ["x", "y"]} | searching(), **full)
    assert "at most 1 sequences" in error_of(refused)["message"]


def test_a_stream_to_the_letter(ask: Ask) -> None:
    body = HI | {"model": "base", "stream": True, "stream_options": {"include_usage": True}} | searching(progress=True)
    frames = chunks(ask(CHAT, body))
    head = {key: frames[0][key] for key in ("id", "created")}
    head |= {"object": "chat.completion.chunk", "model": "base", "system_fingerprint": None}
    end = {"logprobs": None, "finish_reason": None}
    last = end | {"finish_reason": "stop"}
    role = {"role": "assistant", "content": "", "refusal": None}
    made = ask(CHAT, {k: v for k, v in body.items() if not k.startswith("stream")}).json()
    assert frames == [
        head | {"choices": [], "decoding": {"progress": {"samples": 2.0, "message": "two samples"}}, "usage": None},
        head | {"choices": [], "decoding": {"progress": {"step": 1.0, "message": "step 1"}}, "usage": None},
        head | {"choices": [{"index": 0, "delta": role} | end], "usage": None},
        head | {"choices": [{"index": 0, "delta": {"content": ANSWER}} | last], "usage": None},
        head | {"choices": [], "usage": made["usage"], "decoding": decoding_of()},
    ]  # fmt: skip
    assert made["decoding"] == decoding_of(), "a whole answer has no progress, even where it was asked for"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_nothing_but_the_answer_is_streamed_without_progress(ask: Ask, path: str) -> None:
    frames = chunks(ask(path, (HI if path == CHAT else X) | {"model": "base", "stream": True} | searching()))
    assert all(frame["choices"] for frame in frames)
    assert frames[-1]["decoding"] == decoding_of()
    assert not any("decoding" in frame for frame in frames[:-1])


def test_progress_names_its_prompt_and_continuous_usage_is_in_it(ask: Ask) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = X | {"prompt": ["a", "b"], "stream": True, "stream_options": options} | searching(progress=True)
    told = [frame for frame in chunks(ask(TEXT, body)) if "progress" in frame.get("decoding", {})]
    assert [frame["decoding"]["progress"]["prompt"] for frame in told] == [0, 0, 1, 1]
    counts = [frame["usage"]["completion_tokens"] for frame in told]
    assert counts == sorted(counts)
    assert set(counts) <= {0, 40, 80}, "tokens count when their search ends"


def test_reports_stand_in_the_order_of_the_prompts(ask: Ask) -> None:
    answer = ask(TEXT, X | {"prompt": ["a [late]", "b"]} | searching()).json()
    reasons = [report["reason"] for report in answer["decoding"]["search"]]
    assert reasons == ["It ended late.", "It ended early."]


def test_candidates_and_budgets_are_reported(ask: Ask) -> None:
    answer = ask(TEXT, X | searching(candidates=True, max_total_tokens=9)).json()
    report = REPORT | {"exhausted": "max_total_tokens", "candidates": CANDIDATES}
    assert answer["decoding"]["search"] == report


def test_the_best_n_are_the_choices(ask: Ask) -> None:
    answer = ask(TEXT, X | {"n": 3, "return_token_ids": True} | searching()).json()
    assert [choice["text"] for choice in answer["choices"]] == [ANSWER] * 3
    assert {len(choice["token_ids"]) for choice in answer["choices"]} == {10}
    assert answer["usage"] == USAGE, "every hypothesis counts once, whatever is shown"


def test_a_failure_is_a_400_or_after_progress_an_error_frame(ask: Ask) -> None:
    failing = X | {"prompt": "x [fail]"}
    for extra in ({}, {"stream": True}):
        error = error_of(ask(TEXT, failing | extra | searching()))
        assert error["param"] == "decoding.search.scorer"
    failing |= {"prompt": "x [slow] [fail]"}
    *frames, error, done, _ = ask(TEXT, failing | {"stream": True} | searching(progress=True)).text.split("\n\n")
    assert (len(frames), done) == (2, "data: [DONE]")
    assert json.loads(error[6:])["error"]["message"] == "The search cannot go on."


def test_a_search_goes_with_every_policy_and_may_be_a_strategy(ask: Ask) -> None:
    steered = ask(TEXT, X | {"decoding": STEERING | {"search": SEARCH}}).json()["decoding"]
    assert steered == decoding_of(strategy="proxy_tuning", models=["base", "expert", "base-small"])
    alone = {"strategy": "guess", "scorer": "expert", "max_total_tokens": 9, "progress": True, "trace": False}
    made = ask(TEXT, X | {"decoding": alone | {"speculation": {"draft": "ngram"}}}).json()["decoding"]
    assert made["search"]["exhausted"] == "max_total_tokens"
    assert made["speculation"]["draft"] == "ngram"
    assert ask(TEXT, X | {"decoding": {"search": False}}).json()["decoding"]["search"] is None


def test_presets_search_and_requests_change_or_drop_that(ask: Ask) -> None:
    presets = {"b@g": {"model": "base", "decoding": {"strategy": "guess", "n": 2, "scorer": "expert"}}}
    settings = {"presets": presets, "defaults": {"model": "b@g"}}
    body = {"model": "b@g", "prompt": "x"}
    assert ask(TEXT, body, **settings).json()["decoding"]["search"] == REPORT
    assert error_of(ask(TEXT, body | {"n": 3}, **settings))["param"] == "n"
    assert ask(TEXT, body | {"n": 3, "decoding": {"n": 3}}, **settings).status_code == 200
    plain = ask(TEXT, body | {"decoding": {"strategy": "plain"}}, **settings).json()
    assert plain["decoding"]["search"] is None


@pytest.mark.parametrize(
    ("params", "extra", "param", "words"),
    [
        ({"n": "4"}, {}, "n", "valid integer"),
        ({"n": 0}, {}, "n", "at least 1"),
        ({"n": 65}, {}, "n", "at most 64 candidates"),
        ({"scorr": 1}, {}, "scorr", "Did you mean 'scorer'"),
        ({"max_token": 1}, {}, "max_token", "Did you mean 'max_total_tokens'"),
        ({"max_total_tokens": 0}, {}, "max_total_tokens", "above 0"),
        ({"max_candidates": -1}, {}, "max_candidates", "above 0"),
        ({"max_seconds": "1"}, {}, "max_seconds", "valid number"),
        ({"progress": 1}, {}, "progress", "valid boolean"),
        ({"candidates": "yes"}, {}, "candidates", "valid boolean"),
        ({"scorer": "nobody"}, {}, "scorer", "Scorers that are served: base, expert, base-small"),
        ({"scorer": 5}, {}, "scorer", "a valid string or input should be an object"),
        ({"scorer": {"modle": "x"}}, {}, "scorer.modle", "Did you mean 'model'"),
        ({"scorer": {"weights": ["a"]}}, {}, "scorer.weights.0", "valid number"),
        ({"scorer": {"regex": "("}}, {}, "scorer.regex", "regular expression"),
        ({"scorer": {"parts": [{"rule": "length"}, {}]}}, {}, "scorer.parts.1", "exactly one of model"),
        ({"helper": "nobody"}, {}, "helper", "Served: base, expert, base-small"),
        ({}, {"temperature": 1.8}, "n", "up to 1.5"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named_where_they_stand(
    ask: Ask, params: dict[str, Any], extra: dict[str, Any], param: str, words: str
) -> None:
    for asked, path in (
        ({"search": SEARCH | params}, "decoding.search"),
        ({"strategy": "guess", "scorer": "expert"} | params, "decoding"),
    ):
        error = error_of(ask(TEXT, X | extra | {"decoding": asked}))
        assert error["param"] == f"{path}.{param}"
        assert words in error["message"]


def test_the_number_of_candidates_is_the_operators(ask: Ask) -> None:
    assert "at most 2 candidates" in error_of(ask(TEXT, X | searching(n=3), max_candidates=2))["message"]
    assert ask(TEXT, X | searching(n=2), max_candidates=2).status_code == 200


def test_temperature_0_is_refused_for_several_samples_only(ask: Ask) -> None:
    error = error_of(ask(TEXT, X | {"temperature": 0} | searching()))
    assert (error["param"], "4 independent samples" in error["message"]) == ("temperature", True)
    assert ask(TEXT, X | {"temperature": 0} | searching(n=1)).status_code == 200


def test_models_of_a_presets_search_are_in_use() -> None:
    decoding = {"search": {"kind": "guess", "helper": "base-small", "scorer": {"parts": [{"model": "expert"}]}}}
    infos = {name: ModelInfo(name, 128, WIDTH, 4096, 1000, "float32", "cpu") for name in MODELS}
    catalog = {name: Entry(TEXTS[name], info) for name, info in infos.items()}
    served = Served(catalog, {"b@g": Preset(model="base", decoding=decoding)}, "base")
    assert [served.users(name) for name in ("base-small", "expert")] == [["part of the preset 'b@g'"]] * 2


def test_no_strategy_may_take_a_searchs_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = discover()["plain"]
    monkeypatch.setattr(server.catalog, "discover", lambda: {"guess": plain})
    with pytest.raises(ModelLoadError, match="'guess' takes the name of a search"):
        Served({"base": None}, {}, "base")  # type: ignore[dict-item]


def test_searches_describe_themselves(ask: Ask) -> None:
    listed = {row["id"]: row for row in ask("/v1/strategies").json()["data"]}
    row = listed["guess"]
    parameters, bounds = row.pop("parameters"), row.pop("bounds")
    assert row == {
        "id": "guess", "object": "search", "summary": "Guesses.", "formula": "a guess", "default_temperature": 0.5,
        "needs": ["luck"], "combines_with": listed["guess"]["combines_with"], "lossless": False, "paper": "None 2000",
    }  # fmt: skip
    assert list(parameters["properties"]) == ["scorer", "n", "helper"]
    assert parameters["properties"]["scorer"]["description"] == "Ranks."
    assert list(bounds["properties"]) == list(Bounds.__dataclass_fields__)
    assert listed["plain"]["combines_with"]["search"][-1] == "guess"


def test_metrics_tell_how_searches_ended() -> None:
    async def run() -> str:
        async with open_client() as client:
            await client.post(TEXT, json=X | searching())
            await client.post(TEXT, json=X | searching(max_total_tokens=3))
            await client.post(TEXT, json=X | {"prompt": "[fail]"} | searching())
            await client.post("/v1/score", json={"model": "expert", "text_1": "a", "text_2": "b"})
            await client.post("/v1/score", json={"model": "expert", "text_1": "a"})
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    for outcome in ("ok", "exhausted", "error"):
        assert f'trimtab_searches_total{{model="base",outcome="{outcome}",search="guess"}} 1.0' in text
    assert 'trimtab_search_branches_total{model="base",search="guess"} 6.0' in text
    assert 'trimtab_scored_tokens_total{scorer="expert"} 36.0' in text
    assert 'trimtab_tokens_total{kind="completion",model="base",strategy="plain"} 80.0' in text
    assert 'trimtab_requests_total{model="expert",outcome="ok",strategy="score"} 1.0' in text


@pytest.mark.parametrize("chat", [False, True])
def test_the_sdks_strict_types_take_answers_and_streams(chat: bool) -> None:
    async def run() -> None:
        async with open_client() as http:
            client = openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="any", http_client=http, max_retries=0,
                _strict_response_validation=chat,
            )  # fmt: skip
            make: Any = client.chat.completions.create if chat else client.completions.create
            body: Any = {"model": "base", "extra_body": searching(progress=True, candidates=True)}
            body |= HI if chat else {"prompt": "x"}
            made = await make(**body)
            assert made.usage.completion_tokens == 40
            assert made.model_extra["decoding"]["search"]["candidates"] == CANDIDATES
            seen = [chunk async for chunk in await make(**body, stream=True)]
            told = [chunk.model_extra["decoding"]["progress"] for chunk in seen if not chunk.choices]
            assert [each["message"] for each in told] == ["two samples", "step 1"]

    asyncio.run(run())


def test_scores_to_the_letter(ask: Ask) -> None:
    body = {"model": "expert", "input": [{"prompt": "a", "response": "b"}] * 2}
    answer = ask("/v1/score", body).json()
    assert answer.pop("id").startswith("score-")
    scored = {"object": "score", "score": 0.5, "scores": [0.5]}
    usage: dict[str, Any] = {"prompt_tokens": 54, "completion_tokens": 0, "total_tokens": 54}
    usage["prompt_tokens_details"] = {"cached_tokens": 2}
    data = [{"index": i} | scored for i in (0, 1)]
    assert answer == {"object": "list", "model": "expert", "data": data, "usage": usage}
