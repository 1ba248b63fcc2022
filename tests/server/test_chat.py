"""Chat completions: the whole answer and the stream, over the fake engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import STEERING, Ask
from tests.server.fake_engine import ANSWER

PATH = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The frames of a stream, which must be well-formed and end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def texts(frames: list[dict[str, Any]]) -> dict[int, str]:
    made: dict[int, str] = {}
    for frame in frames:
        for choice in frame["choices"]:
            made[choice["index"]] = made.get(choice["index"], "") + choice["delta"].get("content", "")
    return made


def test_whole_answer(ask: Ask) -> None:
    answer = ask(PATH, HI).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "base@chat", "a request without a model is answered by the default"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["decoding"]["strategy"] == "proxy_tuning"
    assert answer["decoding"]["models"] == ["base", "expert", "base-small"]
    assert answer["decoding"]["forwards"]["base"] == usage["completion_tokens"]
    assert answer["decoding"]["lossless"] is True


@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_the_whole_answer(ask: Ask, n: int) -> None:
    frames = chunks(ask(PATH, HI | {"stream": True, "n": n}))
    assert texts(frames) == dict.fromkeys(range(n), ANSWER)
    for index in range(n):
        mine = [c for f in frames for c in f["choices"] if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant", "the role stands in the first delta"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert [("decoding" in frame) for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert not any("usage" in frame for frame in frames)
    assert len({frame["id"] for frame in frames}) == 1


def test_stream_with_usage(ask: Ask) -> None:
    frames = chunks(ask(PATH, HI | {"stream": True, "stream_options": {"include_usage": True}}))
    assert all(frame["usage"] is None for frame in frames[:-1])
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"] == ask(PATH, HI).json()["usage"]
    assert frames[-1]["decoding"]["strategy"] == "proxy_tuning"


def test_continuous_usage(ask: Ask) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = chunks(ask(PATH, HI | {"stream": True, "stream_options": options}))
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == 11


def test_logprobs(ask: Ask) -> None:
    body = HI | {"logprobs": True, "top_logprobs": 4}
    content = ask(PATH, body).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == ANSWER
    assert content[0]["logprob"] == -0.75
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -0.75, -2.0, -9999.0]
    streamed = [
        entry
        for frame in chunks(ask(PATH, body | {"stream": True}))
        for choice in frame["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    assert ask(PATH, HI | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_stops_and_lengths(ask: Ask) -> None:
    answer = ask(PATH, HI | {"stop": "world"}).json()
    assert answer["choices"][0]["message"]["content"] == " Hello, 中文 and 😀 "
    assert answer["decoding"]["stop_reasons"] == ["world"]
    assert texts(chunks(ask(PATH, HI | {"stop": ["zzz", "world"], "stream": True}))) == {0: " Hello, 中文 and 😀 "}
    answer = ask(PATH, HI | {"max_tokens": 9, "max_completion_tokens": 2}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2
    kept = ask(PATH, HI | {"stop": "world", "include_stop_str_in_output": True}).json()
    assert kept["choices"][0]["message"]["content"].endswith(" world")


def test_token_ids(ask: Ask) -> None:
    whole = ask(PATH, HI | {"return_token_ids": True}).json()["choices"][0]
    assert len(whole["token_ids"]) == 11
    assert whole["prompt_token_ids"]
    frames = chunks(ask(PATH, HI | {"return_token_ids": True, "stream": True}))
    assert [i for f in frames for c in f["choices"] for i in c.get("token_ids", [])] == whole["token_ids"]
    assert frames[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": None, "response_format": {"type": "text"}, "prediction": None, "moderation": None},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "modalities": ["text"]},
        {"decoding": {"speculation": False, "trace": False, "search": None}},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "logit_bias": None, "stream_options": None},
        {"temperature": 0, "top_p": 0, "top_k": -1, "min_p": 0.1, "seed": -1, "logit_bias": {"5": -100}},
        {"chat_template_kwargs": {"enable_thinking": False}, "cache_salt": "x", "add_generation_prompt": False},
        {"allowed_token_ids": [5], "stop_token_ids": [6], "min_tokens": 1, "ignore_eos": False},
    ],
)
def test_fields_that_are_accepted(ask: Ask, extra: dict[str, Any]) -> None:
    assert ask(PATH, HI | extra).status_code == 200


def test_messages_in_all_their_shapes(ask: Ask) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}], "audio": None},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 4.", "refusal": None, "annotations": [], "function_call": None},
    ]
    assert ask(PATH, {"messages": messages, "model": "expert"}).status_code == 200
    continued = {"messages": messages, "model": "expert", "continue_final_message": True, "return_token_ids": True}
    with_end = ask(PATH, {"messages": messages, "model": "expert", "return_token_ids": True}).json()
    ids = ask(PATH, continued).json()["choices"][0]["prompt_token_ids"]
    assert ids == with_end["choices"][0]["prompt_token_ids"][: len(ids)]


def test_a_trace_comes_with_whole_answers_and_streams_alike(ask: Ask) -> None:
    body = HI | {"model": "base", "max_tokens": 3, "n": 2, "decoding": STEERING | {"trace": True}}
    whole = ask("/v1/chat/completions", body).json()["decoding"]["trace"]
    assert [len(choice) for choice in whole] == [3, 3]
    roles = [{"role": r, "logprob": -9999.0, "weight": w} for r, w in (("base", 1), ("expert", 1), ("anti", -1))]
    assert whole[0][0]["roles"] == roles
    assert (whole[0][0]["logprob"], whole[0][0]["rank"]) == (-0.75, 1)
    streamed: list[list[Any]] = [[], []]
    for line in ask("/v1/chat/completions", body | {"stream": True}).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                streamed[choice["index"]] += choice.get("decoding", {}).get("trace", [])
    assert streamed == whole
    assert "trace" not in ask("/v1/chat/completions", HI).json()["decoding"]
