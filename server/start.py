"""Starting and stopping: the engine's process, the HTTP server, and SIGTERM between them."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from decoding.core import EngineConfig, ModelLoadError, ModelSpec
from decoding.prepare import Entry
from decoding.scorers.remote import RemoteScorer, RemoteSpec
from decoding.text import TextModel
from decoding.texts import base_specs, load_texts
from server.admin import Admin
from server.app import create_app
from server.bridge import Bridge, launch_process
from server.catalog import Served
from server.config import Config
from server.engine_process import EngineFactory, EngineLike
from server.metrics import Metrics
from server.state import Services


def make_engine(specs: tuple[ModelSpec, ...], config: EngineConfig, remotes: tuple[RemoteSpec, ...] = ()) -> EngineLike:
    """Loads the models; runs in the engine's process. Raises ModelLoadError."""
    from decoding.engine import Engine  # not before: the server's process never needs weights
    from decoding.generate import load_judges, load_models

    options = {"compile": config.compile, "self_check": config.self_check, "adapters": config.adapters}
    hosted = load_models(specs, **options)
    return Engine(hosted, config, load_judges(specs, hosted), {each.id: RemoteScorer(each) for each in remotes})


class Server(uvicorn.Server):
    """uvicorn, but a signal first drains: new requests get a 503, running ones finish or run out of time.

    A second signal stops at once. `announce` is called when connections are accepted, not before.
    """

    def __init__(self, config: uvicorn.Config, bridge: Bridge, timeout: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._bridge, self._timeout, self._announce = bridge, timeout, announce
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then says so."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """From uvicorn's signal handler."""
        if self._bridge.draining:
            self.should_exit = self.force_exit = True
        else:
            self._bridge.draining = True  # at once: the drain below begins when the loop is next free
            self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._bridge.drain(self._timeout)
        self.should_exit = True


async def serve(config: Config, factory: EngineFactory | None = None, console: Console | None = None) -> None:
    """Loads, serves until a signal, drains, stops. Raises ModelLoadError and EngineFailure from the start."""
    console = console or Console(stderr=True)
    loop, loading = asyncio.get_running_loop(), asyncio.current_task()
    assert loading is not None, "a coroutine runs in a task"
    loop.add_signal_handler(signal.SIGTERM, loading.cancel)  # until uvicorn has its own
    listener = _bind(config)  # first: a taken port should not cost the loading of a model
    launch = functools.partial(launch_process, log_level=config.log_level)
    factory = factory or functools.partial(make_engine, config.specs(), config.engine(), config.remote_specs())
    bridge = Bridge(factory, max_sequences=config.max_queue + config.max_num_seqs, launch=launch)
    console.print(f"Loading {', '.join(config.models)} ...")
    try:
        _, texts = await asyncio.gather(bridge.start(), asyncio.to_thread(load_texts, config.specs()))
        app = build_app(config, bridge, texts)
        announce = functools.partial(_announce, console, app, listener)
        server = Server(_uvicorn_config(app, config), bridge, config.shutdown_timeout, announce)
        loop.remove_signal_handler(signal.SIGTERM)
        await server.serve(sockets=[listener])
    finally:
        bridge.stop()
        listener.close()


def _bind(config: Config) -> socket.socket:
    """Takes the port without listening: until the models are loaded, connections are refused."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ModelLoadError(f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}.") from error
    return listener


def build_app(config: Config, bridge: Bridge, texts: dict[str, TextModel]) -> FastAPI:
    """The app over a started bridge. Raises ModelLoadError if a preset could never be served."""
    catalog = {info.id: Entry(texts[info.id], info) for info in bridge.models}
    served = Served(catalog, config.presets, config.default_model, config.negative_weights, tuple(config.remotes))
    served.check_presets()
    admin = Admin(config.admin_root, base_specs(config.specs())) if config.admin_root else None
    return create_app(Services(config, bridge, served, Metrics(bridge), admin))


def _uvicorn_config(app: FastAPI, config: Config) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level=config.log_level,
        access_log=config.log_level == "debug",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
        server_header=False,
        ws="none",
        lifespan="off",
    )


def _announce(console: Console, app: FastAPI, listener: socket.socket) -> None:
    services: Services = app.state.services
    for info in services.bridge.models:
        if info.of is not None:
            size = f"{info.parameters / 1e6:.2f}M parameters"
            console.print(f"  [bold]{info.id}[/bold]: an adapter of {info.of}, {size}", soft_wrap=True)
            continue
        console.print(
            f"  [bold]{info.id}[/bold]: {info.parameters / 1e6:.1f}M parameters, {info.dtype} on {info.device}, "
            f"{info.max_model_len} tokens of context, KV for {info.kv_tokens}",
            soft_wrap=True,
        )
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    message = json.dumps({"messages": [{"role": "user", "content": "Hello!"}]})
    names = ", ".join(services.served.names)
    console.print(f"Serving {names} at [bold]{url}/v1[/bold] (the first one answers by default). Try:", soft_wrap=True)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{message}'",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
