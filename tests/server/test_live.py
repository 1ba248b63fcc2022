"""Over a real socket: the openai SDK, clients that leave, bodies that stop half-way, SIGTERM."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from rich.console import Console

from decoding.engine import Engine
from decoding.text import TextModel
from server import start
from server.bridge import launch_thread
from tests.fakes import byte_tokenizer
from tests.server.conftest import TEXTS, Live, make_config
from tests.server.fake_engine import ANSWER, fake_engine
from tests.server.tables import MODELS as KINDS
from tests.server.tables import make_engine
from tests.server.test_errors import CHAT, HI, TEXT, X, error_of

Start = Callable[..., Live]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def sdk(live: Start) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{live().url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


USER: list[Any] = [{"role": "user", "content": "hi"}]


def test_sdk_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="base@chat", messages=USER, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.usage is not None
    assert answer.model_extra is not None
    assert answer.model_extra["decoding"]["strategy"] == "proxy_tuning"


def test_sdk_chat_stream(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.create(
        model="base@chat", messages=USER, stream=True, stream_options={"include_usage": True}, logprobs=True
    ) as stream:
        frames = list(stream)
    assert "".join(frame.choices[0].delta.content or "" for frame in frames[:-1]) == ANSWER
    assert frames[0].choices[0].delta.role == "assistant"
    assert frames[-1].choices == []
    assert frames[-1].usage is not None
    assert frames[-1].usage.completion_tokens == 11


def test_sdk_stream_helper(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(model="base", messages=USER) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_sdk_completions(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="base", prompt="x", max_tokens=20, logprobs=2)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None


def test_sdk_completions_stream(live: Start) -> None:
    """Not strict: OpenAI's own chunks have `finish_reason: null`, which the SDK's type of a text choice forbids."""
    with openai.OpenAI(base_url=f"{live().url}/v1", api_key="any", max_retries=0) as client:
        with client.completions.create(model="base", prompt="x", max_tokens=20, stream=True) as stream:
            assert "".join(frame.choices[0].text for frame in stream) == ANSWER
        with pytest.raises(openai.APIError, match="half-way"):
            list(client.completions.create(model="base", prompt="[slow] [fail]", stream=True))


def test_sdk_models_and_errors(sdk: openai.OpenAI) -> None:
    assert sdk.models.list().data[0].id == "base@chat"
    assert sdk.models.retrieve("expert").owned_by == "trimtab"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        sdk.chat.completions.create(model="gpt-9", messages=USER)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="base", messages=USER, extra_body={"decoding": {"strategy": "x"}})
    assert caught.value.param == "decoding.strategy"
    steered = {"decoding": {"strategy": "cfg", "negative_prompt": "no", "guidance": 2.0}}
    answer = sdk.chat.completions.create(model="base", messages=USER, extra_body=steered)
    assert answer.model_extra is not None
    assert answer.model_extra["decoding"]["strategy"] == "cfg"


def test_a_client_that_leaves_a_stream_aborts_it(live: Start) -> None:
    server = live()
    with httpx.stream("POST", server.url + CHAT, json={"messages": [{"role": "user", "content": "[forever]"}],
                                                       "model": "base", "stream": True}) as response:  # fmt: skip
        pieces = response.iter_text()
        next(pieces)
        assert server.bridge.sequences == 1
    until(lambda: server.bridge.sequences == 0)
    until(lambda: server.bridge.stats is not None and server.bridge.stats.aborts == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_before_the_answer_aborts_it(live: Start, stream: bool, half: bool) -> None:
    server = live()
    body = json.dumps(X | {"prompt": "[wait]", "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (TEXT.encode(), len(body)) + body)
        until(lambda: server.bridge.sequences == 1)
        if half:
            client.shutdown(socket.SHUT_WR)
            until(lambda: server.bridge.sequences == 0)
    until(lambda: server.bridge.sequences == 0)
    assert httpx.post(server.url + TEXT, json=X).status_code == 200


class Held:
    """Makes a real engine over tables whose forwards wait: `begun` is set by the first one, `go` lets them on."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.engine: Engine

    def __call__(self) -> Engine:
        self.engine = make_engine()
        for runner in self.engine.runners.values():
            runner.forward = functools.partial(self._wait, runner.forward)  # type: ignore[method-assign]
        return self.engine

    def _wait(self, forward: Callable[..., Any], *args: Any) -> Any:
        self.begun.set()
        assert self.go.wait(20)
        return forward(*args)

    def check_idle(self) -> None:
        """Nothing runs or waits, and no block is held."""
        scheduler = self.engine.scheduler
        assert not self.engine.has_work()
        assert not [*scheduler.running, *scheduler.waiting, *scheduler.resting]
        self.engine.check()
        assert all(pool.available == pool.num_blocks for pool in self.engine.pools.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("body", [{"model": "prm"}, {"model": "base", "scorer": {"rule": "likelihood"}}])
def test_a_client_that_leaves_before_its_scores_aborts_them(live: Start, body: dict[str, Any], half: bool) -> None:
    """It leaves during the first tick of many: the engine reads no further, and keeps nothing of the texts."""
    held = Held()
    texts = {id: TextModel(id, byte_tokenizer()) for id in KINDS}
    models = {id: {"path": f"/{id}", "kind": kind} for id, kind in KINDS.items()}
    server = live(factory=held, texts=texts, models=models, presets={}, defaults={"model": "base"})
    pairs = [{"prompt": f"{i} is a number", "response": "of many letters " * 20} for i in range(100)]
    content = json.dumps(body | {"input": pairs}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
        client.sendall(head + content)
        assert held.begun.wait(20)
        assert server.bridge.sequences == 1
        if half:
            client.shutdown(socket.SHUT_WR)
            until(lambda: server.bridge.sequences == 0)
    until(lambda: server.bridge.sequences == 0)
    held.go.set()
    until(lambda: server.bridge.stats is not None and server.bridge.stats.aborts == 1)
    held.check_idle()
    runner: Any = held.engine.runners[body["model"]]
    assert sum(len(span.token_ids) for spans in runner.spans for span in spans) < 100 * 320 / 2
    counted = f'trimtab_requests_total{{model="{body["model"]}",outcome="abort",strategy="score"}} 1.0'
    assert counted in httpx.get(server.url + "/metrics").text
    again = httpx.post(server.url + "/v1/score", json=body | {"input": pairs[:2]}, timeout=60)
    assert len(again.json()["data"]) == 2


@pytest.mark.parametrize("ending", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_a_body_that_stops_half_way_harms_nobody(live: Start, ending: int) -> None:
    server = live()
    for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b'POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model"' % path.encode())
            client.shutdown(ending)
            assert b" 500 " not in client.recv(1000)
    assert httpx.post(server.url + TEXT, json=X).status_code == 200
    assert 'outcome="error"' not in httpx.get(server.url + "/metrics").text


def test_bytes_that_are_no_http(live: Start) -> None:
    server = live()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"\xff\xfe nonsense\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400")
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_full_queue_is_a_503_with_retry_after(live: Start) -> None:
    server = live(max_queue=2)
    with httpx.Client(base_url=server.url) as client, client.stream("POST", TEXT, json=X | {
        "prompt": "[forever]", "n": 2, "stream": True}) as response:  # fmt: skip
        pieces = response.iter_text()  # kept: the response closes with it
        next(pieces)
        refused = httpx.post(server.url + TEXT, json=X)
        assert error_of(refused, 503)["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.get(server.url + "/health").status_code == 200
    until(lambda: server.bridge.sequences == 0)
    assert httpx.post(server.url + TEXT, json=X).status_code == 200


def test_a_signal_drains(live: Start) -> None:
    server = live()
    long = X | {"prompt": "x [slow]", "stream": True, "ignore_eos": True, "max_tokens": 110}  # a second
    with httpx.stream("POST", server.url + TEXT, json=long) as response:
        pieces = response.iter_text()
        first = next(pieces)
        server.signal()
        assert error_of(httpx.post(server.url + TEXT, json=X), 503)["message"] == "The server is shutting down."
        assert httpx.get(server.url + "/ready").json()["status"] == "shutting down"
        assert (first + "".join(pieces)).endswith("data: [DONE]\n\n")
    server.thread.join(20)
    assert not server.thread.is_alive()


def test_a_signal_ends_what_takes_too_long(live: Start) -> None:
    server = live(shutdown_timeout=0.05)
    with httpx.stream("POST", server.url + TEXT, json=X | {"prompt": "[forever]", "stream": True}) as response:
        pieces = response.iter_text()
        next(pieces)
        server.signal()
        *_, error, done, end = "".join(pieces).split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert json.loads(error[6:])["error"]["message"] == "The server is shutting down."
    server.thread.join(20)
    assert not server.thread.is_alive()


def test_it_is_announced_when_connections_are_accepted() -> None:
    """Whoever waits for the line that says how to call the server may call it at once."""

    class Watching(Console):
        accepted: bool | None = None

        def print(self, *objects: Any, **options: Any) -> None:
            if "curl" in str(objects[0]):
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    self.accepted = True
                except OSError:
                    self.accepted = False
                loop.call_soon(os.kill, os.getpid(), signal.SIGTERM)

    async def run(console: Console) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(start, "load_texts", lambda specs: TEXTS)
            patch.setattr(start, "launch_process", lambda factory, log_level: launch_thread(factory))
            await start.serve(make_config(port=port), fake_engine, console)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    loop: asyncio.AbstractEventLoop
    console = Watching(file=io.StringIO())
    asyncio.run(run(console))
    assert console.accepted is True


SCRIPT = """
import asyncio, functools, os, pathlib, sys
import server.start
from tests.server.conftest import make_config, TEXTS
from tests.server.fake_engine import fake_engine

def factory(file):
    pathlib.Path(file).write_text(str(os.getpid()))
    return fake_engine()

if __name__ == "__main__":
    server.start.load_texts = lambda specs: TEXTS
    asyncio.run(server.start.serve(make_config(port=int(sys.argv[1])), functools.partial(factory, sys.argv[2])))
"""


def test_sigterm_ends_the_server_and_its_engine(tmp_path: Path) -> None:
    """The whole of it in processes of their own: start, one answer, SIGTERM to the group, exit code 0."""
    script = tmp_path / "serve_fake.py"
    script.write_text(SCRIPT)
    engine = tmp_path / "engine.pid"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script), str(port), str(engine)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if "curl" in line:
                break
        assert f"http://127.0.0.1:{port}/v1" in log, log
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            assert client.post(CHAT, json=HI).json()["choices"][0]["message"]["content"] == ANSWER
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()
        with pytest.raises(ProcessLookupError):
            os.kill(int(engine.read_text()), 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()  # type: ignore[union-attr]
