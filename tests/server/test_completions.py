"""Text completions: prompts of every kind, echo, log-probs in four lists."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import TEXTS, Ask
from tests.server.fake_engine import ANSWER
from tests.server.test_chat import chunks

PATH = "/v1/completions"
IDS = TEXTS["base"].encode("hello world")


def complete(ask: Ask, **fields: Any) -> dict[str, Any]:
    response = ask(PATH, {"model": "base", "max_tokens": 20, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_prompts_of_every_kind(ask: Ask) -> None:
    for prompt, choices in [("hello world", 1), (IDS, 1), (["hello world", "x"], 2), ([IDS, [5]], 2)]:
        answer = complete(ask, prompt=prompt, return_token_ids=True)
        assert [choice["text"] for choice in answer["choices"]] == [ANSWER] * choices
        assert [choice["index"] for choice in answer["choices"]] == list(range(choices))
        assert answer["choices"][0]["prompt_token_ids"] == IDS
    assert answer["usage"]["prompt_tokens"] == len(IDS) + 1


def test_several_prompts_times_n(ask: Ask) -> None:
    answer = complete(ask, prompt=["hello world", "x"], n=3, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["hello world" + ANSWER] * 3 + ["x" + ANSWER] * 3
    assert answer["usage"]["prompt_tokens"] == len(IDS) + 1
    frames = chunks(ask(PATH, {"model": "base", "prompt": ["hello world", "x"], "n": 3, "echo": True, "stream": True}))
    made = {i: "".join(c["text"] for f in frames for c in f["choices"] if c["index"] == i) for i in range(6)}
    assert list(made.values()) == [choice["text"] for choice in answer["choices"]]


def test_the_default_length_is_sixteen_or_what_fits(ask: Ask) -> None:
    long = ask(PATH, {"model": "base", "prompt": "x", "ignore_eos": True}).json()
    assert long["usage"]["completion_tokens"] == 16
    near = ask(PATH, {"model": "base", "prompt": [5] * 125, "ignore_eos": True}).json()
    assert near["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_has_an_entry_for_each_token(ask: Ask, stream: bool) -> None:
    body = {"model": "base", "prompt": IDS, "echo": True, "logprobs": 4, "max_tokens": 1}
    if stream:
        parts = [c["logprobs"] for f in chunks(ask(PATH, body | {"stream": True})) for c in f["choices"]]
        logprobs = {key: [item for part in parts for item in part[key]] for key in parts[0]}
    else:
        logprobs = complete(ask, **body)["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(IDS) + 1}
    assert logprobs["tokens"] == ["hello", " world", " "]
    assert logprobs["text_offset"] == [0, 5, 11]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    for token, logprob, top in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:]
    ):
        assert top[token] == logprob
        assert -9999.0 in top.values()


def test_scoring_alone(ask: Ask) -> None:
    choice = complete(ask, prompt="hello world", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert choice["logprobs"]["tokens"] == ["hello", " world"]
    assert choice["logprobs"]["top_logprobs"] == [None, {" world": -0.75}]
    assert complete(ask, prompt="hello world", echo=True, max_tokens=0)["choices"][0]["logprobs"] is None


def test_the_last_token_is_counted_also_when_it_is_eos(ask: Ask) -> None:
    choice = complete(ask, prompt="x", logprobs=1)["choices"][0]
    assert choice["text"] == ANSWER
    assert choice["logprobs"]["tokens"][-1] == "</s>"
    assert choice["logprobs"]["text_offset"][-1] == len(ANSWER)


def test_special_tokens_show_when_asked_for(ask: Ask) -> None:
    assert complete(ask, prompt="x", skip_special_tokens=False)["choices"][0]["text"] == ANSWER + "</s>"


def test_best_of_one_is_accepted(ask: Ask) -> None:
    assert complete(ask, prompt="x", best_of=1, suffix=None)["choices"][0]["text"] == ANSWER


def test_a_stream_without_echo_has_text_only(ask: Ask) -> None:
    frames = chunks(ask(PATH, {"model": "base", "prompt": "x", "max_tokens": 20, "stream": True}))
    assert "".join(c["text"] for f in frames for c in f["choices"]) == ANSWER
    assert all(choice["text"] for frame in frames[:-1] for choice in frame["choices"])
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"
    assert frames[-1]["decoding"]["forwards"] == {"base": 11}
