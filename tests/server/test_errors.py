"""Bad input: each kind has its status and an error object, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import Ask, open_client

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
X: dict[str, Any] = {"model": "base", "prompt": "x"}
DECODING = {"strategy": "proxy_tuning", "expert": "expert", "anti": "base-small"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


NGRAM = {"draft": "ngram"}
CASES: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, HI | {"temprature": 1}, "temprature", "Did you mean 'temperature'"),
    (CHAT, {}, "messages", "Missing required"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0", "needs content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "not supported"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "color": 1}]}, "messages.0.color", "Unrecognized"),
    (CHAT, HI | {"temperature": "0.7"}, "temperature", "valid number"),
    (CHAT, HI | {"temperature": 2.5}, "temperature", "less than"),
    (CHAT, HI | {"temperature": True}, "temperature", "valid number"),
    (CHAT, HI | {"n": 0}, "n", "greater"),
    (CHAT, HI | {"n": 65}, "n", "at most 64"),
    (CHAT, HI | {"n": 1.5}, "n", "integer"),
    (CHAT, HI | {"stream": "yes"}, "stream", "boolean"),
    (CHAT, HI | {"top_logprobs": 2}, None, "logprobs is true"),
    (CHAT, HI | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    (CHAT, HI | {"stream_options": {"include_usage": True}}, None, "stream is true"),
    (CHAT, HI | {"tools": [{"type": "function"}]}, "tools", "not available"),
    (CHAT, HI | {"tool_choice": "required"}, "tool_choice", "needs tools"),
    (CHAT, HI | {"response_format": {"type": "json_object"}}, "response_format", "Only response_format"),
    (CHAT, HI | {"prediction": {"type": "text", "content": "x"}}, "prediction.type", "content"),
    (CHAT, HI | {"prediction": "x"}, "prediction", "object"),
    (CHAT, HI | {"moderation": True}, "moderation", "not available"),
    (CHAT, HI | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "not allowed"),
    (CHAT, HI | {"continue_final_message": True}, None, "role 'assistant'"),
    (CHAT, HI | {"stop": ["x"] * 17}, "stop", "at most 16"),
    (CHAT, HI | {"stop": ["x" * 1025]}, "stop", "at most 1024"),
    (CHAT, HI | {"stop": [""]}, "stop", "empty"),
    (CHAT, HI | {"stop": 5}, "stop", "text"),
    (CHAT, HI | {"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    (CHAT, HI | {"logit_bias": {"330": 1}}, "logit_bias", "outside the vocabulary"),
    (CHAT, HI | {"logit_bias": {"5": 101}}, "logit_bias.5", "less than"),
    (CHAT, HI | {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    (CHAT, HI | {"allowed_token_ids": []}, "allowed_token_ids", "empty"),
    (CHAT, HI | {"stop_token_ids": [10**6]}, "stop_token_ids", "outside the vocabulary"),
    (CHAT, HI | {"seed": 2**63}, "seed", "less than"),
    (CHAT, HI | {"min_tokens": 5, "max_tokens": 4}, "min_tokens", "above max_tokens"),
    (CHAT, HI | {"max_tokens": 1000}, "max_tokens", "maximum length of 'base' is 128"),
    (TEXT, {"model": "base"}, "prompt", "Missing"),
    (TEXT, X | {"prompt": None}, "prompt", "prompt must be"),
    (TEXT, X | {"prompt": []}, "prompt", "prompt must be"),
    (TEXT, X | {"prompt": [[]]}, "prompt", "empty"),
    (TEXT, X | {"prompt": ""}, "prompt", "empty"),
    (TEXT, X | {"prompt": [1, "a"]}, "prompt", "prompt must be"),
    (TEXT, X | {"prompt": [True]}, "prompt", "prompt must be"),
    (TEXT, X | {"prompt": [5, 330]}, "prompt", "330 in prompt is outside"),
    (TEXT, X | {"prompt": [-1]}, "prompt", "-1 in prompt is outside"),
    (TEXT, X | {"prompt": [10**30]}, "prompt", "outside"),
    (TEXT, X | {"prompt": ["x"] * 1025}, "prompt", "at most 1024"),
    (TEXT, X | {"suffix": "x"}, "suffix", "not supported"),
    (TEXT, X | {"best_of": 2}, "best_of", "use n"),
    (TEXT, X | {"messages": []}, "messages", "Unrecognized"),
    (TEXT, X | {"logprobs": 21}, "logprobs", "at most 20"),
    (TEXT, X | {"logprobs": True}, "logprobs", "integer"),
    (TEXT, X | {"decoding": {"strategy": "proxi_tuning"}}, "decoding.strategy", "Did you mean 'proxy_tuning'"),
    (TEXT, X | {"decoding": {"alpha": 1}}, "decoding.strategy", "needs a strategy"),
    (TEXT, X | {"decoding": "plain"}, "decoding", "an object"),
    (TEXT, X | {"decoding": {"strategy": 5}}, "decoding.strategy", "Unknown strategy"),
    (TEXT, X | {"decoding": DECODING | {"expert": "nobody"}}, "decoding.expert", "Served: base, expert"),
    (TEXT, X | {"decoding": DECODING | {"alpha": "1"}}, "decoding.alpha", "valid number"),
    (TEXT, X | {"decoding": DECODING | {"alhpa": 1}}, "decoding.alhpa", "Did you mean 'alpha'"),
    (TEXT, X | {"decoding": DECODING | {"alpha": -1}}, "decoding.alpha", "--negative-weights any"),
    (TEXT, X | {"decoding": {"strategy": "proxy_tuning", "anti": "base"}}, "decoding.expert", "Missing"),
    (TEXT, X | {"decoding": DECODING | {"search": {"kind": "beam"}}}, "decoding.search.scorer", "Missing"),
    (TEXT, X | {"decoding": DECODING | {"speculation": 4}}, "decoding.speculation", "must be true, false or an object"),
    (TEXT, X | {"decoding": {"speculation": {"draft": "nobody"}}}, "decoding.speculation.draft", "ngram, prediction"),
    (TEXT, X | {"decoding": {"speculation": {"draft": "base"}}}, "decoding.speculation.draft", "a smaller one"),
    (TEXT, X | {"decoding": {"speculation": {"draft": "prediction"}}}, "decoding.speculation.draft", "no 'prediction'"),
    (TEXT, X | {"decoding": {"speculation": {"tokens": 0}}}, "decoding.speculation.tokens", "from 1 to 32"),
    (TEXT, X | {"decoding": {"speculation": {"tokens": "many"}}}, "decoding.speculation.tokens", "'auto'"),
    (TEXT, X | {"decoding": {"speculation": {"accept": "never"}}}, "decoding.speculation.accept", "'rejection'"),
    (TEXT, X | {"decoding": {"speculation": {"treshold": 1}}}, "decoding.speculation.treshold", "Did you mean"),
    (TEXT, X | {"decoding": {"speculation": {"threshold": 1}}}, "decoding.speculation.threshold", "judge, kl"),
    (TEXT, X | {"decoding": {"speculation": NGRAM | {"accept": "kl"}}}, "decoding.speculation.accept", "Name a draft"),
    (TEXT, X | {"decoding": {"speculation": NGRAM | {"weight": 2}}}, "decoding.speculation.weight", "from 0 to 1"),
    (TEXT, X | {"decoding": {"policy": {}}}, "decoding.policy.terms", ""),
    (TEXT, X | {"decoding": {"strategy": "cfg", "negative_prompt": [{"x": 1}]}}, "decoding", "needs a role"),
    ("/tokenize", {"model": "base"}, None, "either prompt or messages"),
    ("/detokenize", {"model": "base", "tokens": [10**6]}, "tokens", "outside"),
    ("/detokenize", {"model": "base", "tokens": "x"}, "tokens", "array"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), CASES, ids=lambda case: str(case)[:60])
def test_bad_input_is_a_400_that_names_the_field(
    ask: Ask, path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    error = error_of(ask(path, body))
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": NaN}',
     b'{"temperature": 1e999, "prompt": "x"}', b'{"prompt": ' + b"[" * 10000, b'{"n": ' + b"9" * 5000 + b"}",
     "{'prompt': 'x'}".encode("utf-16")],
    ids=lambda content: repr(content[:24]),
)  # fmt: skip
def test_bodies_that_are_no_json(ask: Ask, content: bytes) -> None:
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        error_of(ask(path, content=content))


def test_unknown_models_paths_and_methods(ask: Ask) -> None:
    error = error_of(ask(CHAT, HI | {"model": "gpt-9"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "Served: base@chat, base, expert, base-small" in error["message"]
    assert error_of(ask("/v1/models/gpt-9"), 404)["code"] == "model_not_found"
    assert error_of(ask("/v1/nothing"), 404)["code"] == "unknown_url"
    assert error_of(ask(CHAT), 405)["code"] == "method_not_allowed"
    assert error_of(ask("/tokenizer_info?model=gpt-9"), 404)["code"] == "model_not_found"


def test_a_prompt_that_is_too_long_names_the_role_and_the_limit(ask: Ask) -> None:
    error = error_of(ask(TEXT, X | {"prompt": [5] * 128}))
    assert error["code"] == "context_length_exceeded"
    assert "128 tokens" in error["message"]
    assert "role 'base'" in error["message"]


def test_prompt_logprobs_are_bounded(ask: Ask) -> None:
    body = X | {"prompt": [[5] * 10] * 4, "echo": True, "logprobs": 5}
    assert "at most 199" in error_of(ask(TEXT, body, max_prompt_logprobs=199))["message"]
    assert ask(TEXT, body, max_prompt_logprobs=200).status_code == 200


@pytest.mark.parametrize(
    ("setting", "value", "body"),
    [
        ("max_n", 2, {"n": 3}),
        ("max_logprobs", 2, {"logprobs": 3}),
        ("max_stop", 1, {"stop": ["a", "b"]}),
        ("max_stop_length", 2, {"stop": "abc"}),
        ("max_logit_bias", 1, {"logit_bias": {"1": 1, "2": 1}}),
        ("max_queue", 3, {"n": 4}),
    ],
)
def test_each_limit_is_a_setting(ask: Ask, setting: str, value: int, body: dict[str, Any]) -> None:
    assert ask(TEXT, X | body).status_code == 200
    assert f"at most {value}" in error_of(ask(TEXT, X | body, **{setting: value}))["message"]


def test_negative_weights_are_the_operators_choice(ask: Ask) -> None:
    body = X | {"decoding": DECODING | {"alpha": -1}}
    assert ask(TEXT, body, negative_weights="any").status_code == 200


def test_failures_in_the_engine_are_the_requests_own() -> None:
    async def run() -> None:
        async with open_client() as client:
            quiet = asyncio.create_task(client.post(TEXT, json=X | {"prompt": "x [slow]"}))
            refused = error_of(await client.post(TEXT, json=X | {"prompt": "[refuse]"}))
            assert (refused["code"], refused["param"]) == ("refused", "prompt")
            for stream in (False, True):
                broken = await client.post(TEXT, json=X | {"prompt": "[broken]", "stream": stream})
                assert error_of(broken, 500)["type"] == "server_error"
            assert (await quiet).status_code == 200
            failed = await client.post(TEXT, json=X | {"prompt": "[raise]"})
            assert "engine failed" in error_of(failed, 500)["message"]
            assert (await client.post(TEXT, json=X)).status_code == 200, "the loop goes on after a tick that failed"

    asyncio.run(run())


def test_a_failure_within_a_stream_is_an_error_frame(ask: Ask) -> None:
    response = ask(CHAT, {"model": "base", "messages": [{"role": "user", "content": "[slow] [fail]"}], "stream": True})
    assert response.status_code == 200
    *frames, error, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(error[6:])["error"]["message"] == "It failed half-way."
    assert json.loads(frames[0][6:])["choices"][0]["delta"]["role"] == "assistant"
