"""Searches over HTTP, on the real engine over table models: answers, streams, reports, refusals."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from decoding.core import Sampling
from decoding.search import SEARCHES, searching
from server.config import ConfigError, load_config
from server.searching import Bounds
from tests.fakes import TableModel
from tests.server.tables import ask, client_of, letters, make_engine
from tests.server.test_errors import error_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PAGE = (Path(__file__).parents[2] / "docs/search.md").read_text()
PLAIN: dict[str, Any] = {"model": "base", "prompt": "once upon", "max_tokens": 12, "seed": 7}
STEPS = {"kind": "step_speculative", "scorer": "prm"}
WIDE = {"kind": "beam_search", "width": 2}
RANKED = {"kind": "reward_search", "k": 2, "scorer": {"rule": "length"}}
AHEAD = {"kind": "deal", "k": 2, "constraint": {"min_words": 2}}
BEST = {"kind": "best_of_n", "n": 4, "scorer": "prm", "candidates": True}


AUTO: dict[str, Any] = {"kind": "auto", "n": 4}


def row(params: dict[str, Any]) -> dict[str, Any]:
    """A search that leads to one with these parameters."""
    kind = params.get("kind", "best_of_n")
    return AUTO | {"table": [{"kind": kind, "params": {k: v for k, v in params.items() if k != "kind"}}]}


def test_the_winner_is_the_first_choice_and_everything_is_reported() -> None:
    answer = ask(TEXT, PLAIN | {"n": 2, "decoding": {"search": BEST}}).json()
    report = answer["decoding"]["search"]
    candidates = report["candidates"]
    assert len(candidates) == 4
    assert [choice["text"] for choice in answer["choices"]] == [each["text"] for each in candidates[:2]]
    order = [(each["finish_reason"] != "stop", -each["score"]) for each in candidates]
    assert order == sorted(order)
    assert all(each["scores"] == [each["score"]] for each in candidates)
    assert answer["usage"]["completion_tokens"] == sum(each["tokens"] for each in candidates)
    assert report["generated_tokens"] == answer["usage"]["completion_tokens"]
    assert report["scored_tokens"]["prm"] > 0
    assert (report["kind"], report["exhausted"]) == ("best_of_n", None)
    assert answer["decoding"]["lossless"] is False
    assert set(answer["decoding"]["forwards"]) == {"base", "prm"}


def test_a_search_over_http_is_the_search_in_process() -> None:
    engine = make_engine()
    mine = engine.generate(
        "once upon", searching("best_of_n", "base", n=4, scorer="prm"), Sampling(seed=7, max_tokens=12)
    )
    for decoding in ({"search": BEST}, {"strategy": "best_of_n", "n": 4, "scorer": "prm"}):
        assert ask(TEXT, PLAIN | {"decoding": decoding}).json()["choices"][0]["text"] == mine[0].text
    assert (
        ask(TEXT, PLAIN | {"model": "base@best", "decoding": {"search": BEST}}).json()["choices"][0]["text"]
        == mine[0].text
    )


def test_a_searchs_temperature_is_used_where_the_request_has_none() -> None:
    texts = [
        ask(TEXT, PLAIN | extra | {"decoding": {"search": BEST}}).json()["decoding"]["search"]["candidates"]
        for extra in ({}, {"temperature": 0.8}, {"temperature": 1.0})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_tells_progress_only_to_those_who_ask_and_then_the_winner() -> None:
    search = {"kind": "beam", "n": 4, "width": 2, "scorer": "prm", "step_tokens": 4, "max_steps": 2}
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 12,
        "seed": 3,
        "stream": True,
    }
    whole = ask(CHAT, {k: v for k, v in body.items() if k != "stream"} | {"decoding": {"search": search}}).json()
    for progress in (False, True):
        asked = body | {
            "decoding": {"search": search | {"progress": progress}},
            "stream_options": {"include_usage": True},
        }
        frames = [json.loads(line[6:]) for line in ask(CHAT, asked).text.splitlines() if line.startswith("data: {")]
        told = [frame["decoding"]["progress"] for frame in frames if "progress" in frame.get("decoding", {})]
        assert bool(told) is progress
        assert all(frame["message"] for frame in told)
        content = [frame["choices"][0]["delta"].get("content") for frame in frames if frame["choices"]]
        assert "".join(filter(None, content)) == whole["choices"][0]["message"]["content"]
        assert frames[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert frames[-1]["decoding"]["search"]["kind"] == "beam"
        assert all(frame["usage"] is None for frame in frames[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdk_takes_a_search(stream: bool) -> None:
    async def run() -> None:
        async with client_of() as http:
            client = openai.AsyncOpenAI(
                base_url="http://test/v1",
                api_key="any",
                http_client=http,
                max_retries=0,
                _strict_response_validation=True,
            )
            search = {"kind": "best_of_n", "n": 3, "scorer": "prm", "progress": True}
            extra: Any = {"decoding": {"search": search}}
            messages: Any = [{"role": "user", "content": "hi"}]
            made: Any = await client.chat.completions.create(
                model="base", messages=messages, max_tokens=8, stream=stream, extra_body=extra, logprobs=True, seed=1
            )
            if not stream:
                assert made.choices[0].logprobs.content
                assert made.model_extra["decoding"]["search"]["kind"] == "best_of_n"
                return
            assert [chunk async for chunk in made][-1].choices[0].finish_reason

    asyncio.run(run())


def test_budgets_end_a_search_with_what_it_has() -> None:
    search = BEST | {"n": 8, "max_total_tokens": 20}
    answer = ask(TEXT, PLAIN | {"ignore_eos": True, "decoding": {"search": search}}).json()
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["decoding"]["search"]["exhausted"] == "max_total_tokens"
    assert "max_total_tokens" in answer["decoding"]["search"]["reason"]
    assert answer["choices"][0]["finish_reason"] == "length"


def test_several_prompts_have_a_report_each() -> None:
    answer = ask(TEXT, PLAIN | {"prompt": ["one", "two"], "decoding": {"search": BEST}}).json()
    assert [len(report["candidates"]) for report in answer["decoding"]["search"]] == [4, 4]
    assert len(answer["choices"]) == 2


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"decoding": {"search": {"kind": "best"}}}, "decoding.search.kind", "Did you mean"),
        ({"decoding": {"search": {"n": 4}}}, "decoding.search.kind", "Missing"),
        ({"decoding": {"search": "beam"}}, "decoding.search", "must be an object"),
        ({"decoding": {"search": BEST | {"scorer": {"regex": "(?a)(?u)x"}}}}, "decoding.search.scorer.regex", "flags"),
        ({"decoding": {"search": BEST | {"m": 1}}}, "decoding.search.m", "Unrecognized"),
        ({"decoding": {"search": BEST | {"n": 0}}}, "decoding.search.n", "from 1 to 64"),
        ({"decoding": {"search": BEST | {"n": 65}}}, "decoding.search.n", "from 1 to 64"),
        ({"decoding": {"strategy": "best_of_n", "n": 0}}, "decoding.n", "from 1 to 64"),
        ({"decoding": {"search": BEST | {"scorer": "rm"}}}, "decoding.search.scorer", "prm"),
        ({"decoding": {"strategy": "best_of_n", "scorer": "rm"}}, "decoding.scorer", "prm"),
        ({"decoding": {"search": {"kind": "beam"}}}, "decoding.search.scorer", "Missing"),
        ({"decoding": {"search": BEST | {"max_total_tokens": 0}}}, "decoding.search.max_total_tokens", "above 0"),
        ({"decoding": {"search": STEPS | {"draft": "x"}}}, "decoding.search.draft", "small"),
        ({"decoding": {"search": STEPS | {"draft": "prm"}}}, "decoding.search.draft", "cannot write"),
        ({"decoding": {"search": AUTO | {"scorer": "rm"}}}, "decoding.search.scorer", "not loaded"),
        ({"decoding": {"search": row({"scorer": {"x": 1}})}}, "decoding.search.table", "has no parameter 'x'"),
        ({"decoding": {"search": row({"scorer": "prm", "separator": 5})}}, "decoding.search.table", "wrong type"),
        ({"decoding": {"search": row({"scorer": {"model": "rm"}})}}, "decoding.search", "not loaded"),
        ({"decoding": {"search": BEST}, "temperature": 0}, "temperature", "4 independent samples"),
        ({"decoding": {"search": BEST}, "n": 5}, "n", "4 candidates"),
        ({"decoding": {"search": BEST}, "echo": True}, "echo", "echo"),
        ({"decoding": {"search": BEST}, "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"decoding": {"search": WIDE}, "logit_bias": {"65": 5}}, "logit_bias", "'beam_search' ranks"),
        ({"decoding": {"search": RANKED}, "presence_penalty": 0.5}, "presence_penalty", "'reward_search' ranks"),
        ({"decoding": {"search": AHEAD}, "repetition_penalty": 1.1}, "repetition_penalty", "'deal' ranks"),
        ({"decoding": {"search": row(AHEAD)}, "logit_bias": {"65": 5}}, "decoding.search.table", "'deal' ranks"),
        ({"decoding": {"search": BEST, "strategy": "best_of_n"}}, "decoding.strategy", "not both"),
        ({"model": "prm"}, "model", "scorer"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(ask(TEXT, PLAIN | body), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_biases_that_change_nothing_are_no_reason_to_refuse() -> None:
    body = PLAIN | {"max_tokens": 2, "decoding": {"search": WIDE}, "logit_bias": {}, "presence_penalty": 0}
    assert ask(TEXT, body).status_code == 200


@pytest.mark.parametrize(
    ("search", "param"),
    [
        ({"kind": "beam_search", "width": 4}, "decoding.search.width"),
        ({"kind": "reward_search", "k": 4, "scorer": "prm"}, "decoding.search.k"),
        ({"kind": "deal", "k": 2, "beams": 2, "constraint": {"min_words": 2}}, "decoding.search"),
        (row({"n": 4, "scorer": "prm"}), "decoding.search.n"),
    ],
)
def test_the_operators_bound_holds_for_every_kind_of_breadth(search: dict[str, Any], param: str) -> None:
    body = PLAIN | {"max_tokens": 2, "decoding": {"search": search}}
    error = error_of(ask(TEXT, body, max_candidates=3), 400)
    assert (error["param"], "at most 3 candidates" in error["message"]) == (param, True)
    assert ask(TEXT, body, max_candidates=4).status_code == 200


@pytest.mark.parametrize(
    ("search", "most"),
    [
        ({"kind": "selective", "scorer": {"rule": "length"}, "threshold": 0}, 1),
        ({"kind": "tree_prompt"}, 1),
        ({"kind": "reward_search", "k": 2, "scorer": {"rule": "length"}}, 1),
        ({"kind": "nudging_search", "nudger": "small"}, 1),
        (STEPS | {"draft": "small"}, 1),
        ({"kind": "deal", "k": 2, "beams": 2, "constraint": {"min_words": 2}}, 2),
        ({"kind": "agents"}, 2),
    ],
)
def test_more_choices_than_a_search_can_have_are_refused(search: dict[str, Any], most: int) -> None:
    body = PLAIN | {"max_tokens": 2, "decoding": {"search": search}}
    error = error_of(ask(TEXT, body | {"n": most + 1}), 400)
    assert (error["param"], f"has {most} candidate" in error["message"]) == ("n", True)
    assert len(ask(TEXT, body | {"n": most}).json()["choices"]) == most


@pytest.mark.parametrize("search", [{"kind": "beam_search", "width": 2}, {"kind": "reward_search", "k": 2}])
def test_tokens_that_a_search_feeds_have_the_best_beside_them(search: dict[str, Any]) -> None:
    """As many as were asked for, though the search itself looks at fewer."""
    scorer = {} if search["kind"] == "beam_search" else {"scorer": {"rule": "length"}}
    body = PLAIN | {"max_tokens": 4, "logprobs": 6, "return_token_ids": True, "decoding": {"search": search | scorer}}
    choice = ask(TEXT, body).json()["choices"][0]
    model, ids = TableModel("base", letters(1), memory=5), choice["prompt_token_ids"]
    assert len(choice["logprobs"]["top_logprobs"]) == len(choice["token_ids"])
    for token, told in zip(choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        best = torch.log_softmax(model.row(ids), 0).topk(6).values.tolist()
        assert sorted(told.values(), reverse=True)[:6] == pytest.approx(best, abs=1e-4)
        ids = [*ids, token]


def test_strategies_list_the_searches() -> None:
    listed = {each["id"]: each for each in ask("/v1/strategies").json()["data"]}
    for name, kind in SEARCHES.items():
        assert listed[name]["object"] == "search"
        assert listed[name]["summary"] == kind.summary
        assert set(listed[name]["parameters"]["properties"]) == set(kind.params.__dataclass_fields__)
    assert listed["plain"]["combines_with"]["search"] == list(SEARCHES)


def test_metrics_count_searches() -> None:
    async def run() -> str:
        async with client_of() as client:
            await client.post(TEXT, json=PLAIN | {"decoding": {"search": BEST}})
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    assert 'trimtab_searches_total{model="base",outcome="ok",search="best_of_n"} 1.0' in text
    assert 'trimtab_search_branches_total{model="base",search="best_of_n"} 5.0' in text
    assert 'trimtab_scored_tokens_total{scorer="prm"}' in text


def test_remote_scorers_are_configured_not_sent(tmp_path: Any) -> None:
    file = tmp_path / "trimtab.yaml"
    file.write_text("models: {a: {path: x}}\nremotes: {far: {url: 'http://h:1', kind: score}}")
    (spec,) = load_config(file=str(file), environment={}).remote_specs()
    assert (spec.id, spec.kind) == ("far", "score")
    for entry, words in (
        ("{far: {url: 'ftp://h'}}", r"remotes\.far: .*http"),
        ("{far: {url: 'http://h', kind: other}}", r"remotes\.far\.kind"),
        ("{a: {url: 'http://h'}}", "the name 'a' is taken"),
        ("{far: {uri: 'http://h'}}", "Unknown key"),
    ):
        file.write_text(f"models: {{a: {{path: x}}}}\nremotes: {entry}")
        with pytest.raises(ConfigError, match=words):
            load_config(file=str(file), environment={})


def test_a_preset_whose_scorer_is_not_served_does_not_start() -> None:
    presets = {"p": {"model": "base", "decoding": {"search": {"kind": "best_of_n", "scorer": "rm"}}}}
    with pytest.raises(Exception, match="'p' cannot be served: The scorer 'rm' is not loaded"):
        ask("/health", presets=presets)


def test_scorers_inside_a_table_are_read_as_outside() -> None:
    search = row({"n": 4, "scorer": {"rule": "length"}}) | {"candidates": True}
    answer = ask(TEXT, PLAIN | {"decoding": {"search": search}}).json()
    candidates = answer["decoding"]["search"]["candidates"]
    assert [each["score"] for each in candidates] == [float(len(each["text"].split())) for each in candidates]


EXAMPLES = re.findall(r"```json\n(.*?)```", PAGE, re.S)
assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_docs_examples_are_served(example: str) -> None:
    body = json.loads(example)
    paths = [path for name, path in (("messages", CHAT), ("prompt", TEXT)) if name in body] or ["/v1/score"]
    answer = ask(paths[0], body | ({} if paths == ["/v1/score"] else {"max_tokens": 16}))
    assert answer.status_code == 200, answer.text


def test_the_docs_say_what_every_search_takes() -> None:
    for name in Bounds.__dataclass_fields__:
        assert f"| `{name}` |" in PAGE
