"""Scorers elsewhere: what they are sent, and how what they answer is read, over a transport in this process."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import httpx
import pytest

from decoding.core import BadRequest, EngineFailure, ModelLoadError
from decoding.scorers.remote import RemoteScorer, RemoteSpec
from decoding.scorers.spec import Hypothesis
from decoding.text import Chat

ASK = Chat(
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "1+1?"}]})
)
SENT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


class Server:
    """Answers every request with `answer`, and keeps what it was asked."""

    def __init__(self, answer: Any, status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        content = self.answer if isinstance(self.answer, str) else json.dumps(self.answer)
        return httpx.Response(self.status, content=content)

    @property
    def body(self) -> Any:
        return json.loads(self.asked[-1].content)


def asked(answer: Any, text: Hypothesis, status: int = 200, **spec: Any) -> tuple[list[float], Server]:
    server = Server(answer, status)
    scorer = RemoteScorer(RemoteSpec("far", "http://box:1/v1/", **spec), httpx.MockTransport(server))
    return scorer.score(text), server


def pooled(data: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"index": 0, "object": "pooling", "data": data}]}


@pytest.mark.parametrize(
    ("data", "score"), [([2.5], 2.5), ([[2.5]], 2.5), ([[0.0], [1.0], [2.5]], 2.5), ([0.25, 0.75], 0.75)]
)
def test_pooling_reads_the_last_row(data: Any, score: float) -> None:
    found, server = asked(pooled(data), Hypothesis(ASK, ("2", "!")), model="rm")
    assert found == [score]
    assert server.asked[0].url == "http://box:1/pooling"
    assert server.body == {
        "model": "rm",
        "messages": [*SENT, {"role": "assistant", "content": "2!"}],
        "add_generation_prompt": False,
    }


def test_pooling_of_steps() -> None:
    text = Hypothesis("Q", ("a\n\n", "b"))
    found, server = asked(pooled([[0.9, 0.1], [0.2, 0.8]]), text, step_marker="<extra_0>")
    assert found == [0.1, 0.8]
    assert server.body["messages"][-1]["content"] == "a<extra_0>b<extra_0>"
    with pytest.raises(EngineFailure, match="1 numbers for 2 steps"):
        asked(pooled([[0.9, 0.1]]), text, step_marker="<extra_0>")
    assert not RemoteScorer(RemoteSpec("far", "http://box", step_marker="#")).one_number
    assert RemoteScorer(RemoteSpec("far", "http://box")).one_number


def test_an_answer_that_the_prompt_began_is_one_message() -> None:
    begun = Chat(({"role": "user", "content": "Q"}, {"role": "assistant", "content": "It is "}), False, True)
    _, server = asked(pooled([1.0]), Hypothesis(begun, ("two", ".")))
    assert server.body["messages"] == [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "It is two."}]
    _, server = asked(pooled([[1.0], [2.0]]), Hypothesis(begun, ("two", ".")), step_marker="#")
    assert server.body["messages"][-1]["content"] == "It is two#.#"
    _, server = asked(pooled([1.0]), Hypothesis(begun, ()))
    assert server.body["messages"][-1]["content"] == "It is "


def test_pairs_are_scored() -> None:
    found, server = asked({"data": [{"index": 0, "score": -1.5}]}, Hypothesis("Q", ("a", "b")), kind="score")
    assert found == [-1.5]
    assert server.asked[0].url == "http://box:1/score"
    assert server.body == {"text_1": "Q", "text_2": "ab"}


def test_classes() -> None:
    answer = {"data": [{"index": 0, "label": "LABEL_1", "probs": [0.4, 0.6], "num_classes": 2}]}
    found, server = asked(answer, Hypothesis(ASK, ("2",)), kind="classify", model="c")
    assert found == [0.6]
    assert server.asked[0].url == "http://box:1/classify"
    assert server.body == {"model": "c", "input": "system: Be brief.\n\nuser: 1+1?\n\n2"}
    assert asked(answer, Hypothesis("Q", ()), kind="classify", label=0)[0] == [0.4]


def completion(*likeliest: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(p)} for token, p in likeliest]
    return {"choices": [{"message": {}, "logprobs": {"content": [{"token": "7", "top_logprobs": top}]}}]}


def test_a_judge_expects_a_digit() -> None:
    """3 and " 3" are the same digit; words, numbers of two digits and other scripts' digits are none."""
    answer = completion(("3", 0.2), ("8", 0.2), (" 3", 0.1), ("10", 0.3), ("٣", 0.1), ("The", 0.1))
    text = Hypothesis("Q{answer}", ("a{prompt}",))
    found, server = asked(answer, text, kind="openai", model="j", question="{prompt} - {answer}?")
    assert found == [pytest.approx((0.3 * 3 + 0.2 * 8) / 0.5)]
    assert server.asked[0].url == "http://box:1/v1/chat/completions"
    assert server.body == {
        "model": "j",
        "messages": [{"role": "user", "content": "Q{answer} - a{prompt}?"}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    with pytest.raises(EngineFailure, match="gave none"):
        asked(completion(("The", 1.0)), text, kind="openai")
    assert RemoteScorer(RemoteSpec("far", "http://box", "openai")).approximate
    assert not RemoteScorer(RemoteSpec("far", "http://box", "score")).approximate


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "secret")
    text = Hypothesis("Q", ("a",))
    assert asked(pooled([1.0]), text, api_key_env="FAR_KEY")[1].asked[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in asked(pooled([1.0]), text)[1].asked[0].headers


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (httpx.ConnectError("no"), 200, "cannot be reached: ConnectError"),
        (httpx.ReadTimeout("no"), 200, "took too long"),
        ("model not\n found", 404, "status 404: model not found"),
        ("<html>", 200, "not JSON"),
        ({}, 200, "does not give"),
        ([], 200, "does not give"),
        (pooled([]), 200, "does not give"),
        (pooled("AAAA"), 200, "does not give"),
        ({"data": []}, 200, "does not give"),
        ('{"data": [{"data": [NaN]}]}', 200, "not finite"),
    ],
)
def test_failures_are_told_in_a_sentence(answer: Any, status: int, says: str) -> None:
    with pytest.raises(EngineFailure, match="The remote scorer 'far'") as caught:
        asked(answer, Hypothesis("Q", ("a",)), status)
    assert says in str(caught.value)


def test_token_ids_are_refused() -> None:
    with pytest.raises(BadRequest, match="not token ids"):
        asked(pooled([1.0]), Hypothesis((1, 2), ("a",)))


def test_one_client_serves_all_threads() -> None:
    server = Server(pooled([1.0]))
    scorer = RemoteScorer(RemoteSpec("far", "http://box"), httpx.MockTransport(server))
    threads = [threading.Thread(target=scorer.score, args=(Hypothesis("Q", ("a",)),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 8
    assert scorer.blocks


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "embed"},
        {"url": "file:///etc/passwd"},
        {"kind": "score", "step_marker": "#"},
        {"question": "Good?"},
        {"timeout": 0},
    ],
)
def test_wrong_configurations_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match="far"):
        RemoteSpec(**({"id": "far", "url": "http://box"} | wrong))
