"""Servers over the fake engine: in this process for most tests, over a real socket for the others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from decoding.text import TextModel
from server.bridge import Bridge, launch_thread
from server.config import Config
from server.engine_process import EngineFactory
from server.start import Server, _uvicorn_config, build_app
from tests.server.fake_engine import MODELS, fake_engine, text_models

STEERING = {"strategy": "proxy_tuning", "expert": "expert", "anti": "base-small"}
TEXTS = text_models()


def make_config(**settings: Any) -> Config:
    values: dict[str, Any] = {
        "models": {name: {"path": f"/models/{name}"} for name in MODELS},
        "presets": {"base@chat": {"model": "base", "decoding": STEERING}},
        "defaults": {"model": "base@chat"},
        "log_level": "error",
    }
    return Config.model_validate(values | settings)


@contextlib.asynccontextmanager
async def open_client(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app in this process; the bridge hangs on `client.bridge`."""
    config = make_config(**settings)
    bridge = Bridge(fake_engine, max_sequences=config.max_queue + config.max_num_seqs, launch=launch_thread)
    await bridge.start()
    transport = httpx.ASGITransport(build_app(config, bridge, TEXTS))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            client.bridge = bridge  # type: ignore[attr-defined]
            yield client
        assert bridge.sequences == 0, "every request has given back its place in the queue"
    finally:
        bridge.stop()


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask() -> Ask:
    """One request to a fresh server: `ask(path, json, **settings)`; without a body it is a GET."""

    def one(path: str, body: Any = None, *, content: bytes | None = None, headers: Any = None, **settings: Any) -> Any:
        async def run() -> httpx.Response:
            async with open_client(**settings) as client:
                if body is None and content is None:
                    return await client.get(path, headers=headers)
                return await client.post(path, json=body, content=content, headers=headers)

        return asyncio.run(run())

    return one


class Live:
    """A server on a real socket, in a thread. factory, texts: of its engine, which is a fake by default."""

    def __init__(
        self, factory: EngineFactory = fake_engine, texts: dict[str, TextModel] = TEXTS, **settings: Any
    ) -> None:
        self.config, self._factory, self._texts = make_config(**settings), factory, texts
        self.announced = False
        self._started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="live server")

    async def _run(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.bridge = Bridge(self._factory, max_sequences=self.config.max_queue, launch=launch_thread)
        await self.bridge.start()
        app = build_app(self.config, self.bridge, self._texts)
        options = _uvicorn_config(app, self.config)
        self.server = Server(options, self.bridge, self.config.shutdown_timeout, self._listens)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self._started.set()
        try:
            await self.server.serve(sockets=[listener])
        finally:
            self.bridge.stop()
            listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _listens(self) -> None:
        """Said from the server's loop: the socket takes connections by then."""
        socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        self.announced = True

    def start(self) -> Live:
        self.thread.start()
        assert self._started.wait(30)
        return self

    def signal(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(15, None)

    def stop(self) -> None:
        self.signal()
        self.signal()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def live() -> Iterator[Callable[..., Live]]:
    """Starts servers with settings, and stops them after the test."""
    servers: list[Live] = []

    def start(**settings: Any) -> Live:
        servers.append(Live(**settings).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
