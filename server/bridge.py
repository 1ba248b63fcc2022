"""The server's side of the engine: requests out, events in, from asyncio.

`Bridge.submit` gives a `Channel` per HTTP request, which may carry several engine requests (one for each prompt). All
that a tick brought for a channel arrives in one wake-up. Writing to the pipe is a thread's job, because a pipe to a
busy engine may block and the event loop must not.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from decoding.core import AdapterInUse, BadRequest, EngineFailure, ModelLoadError, ModelSpec, Overloaded
from decoding.core import Request as EngineRequest
from decoding.events import Done, Event, Failed, ModelInfo, Stats
from server.engine_process import (
    Abort,
    Changed,
    EngineFactory,
    LoadAdapter,
    Ready,
    StartFailed,
    Submit,
    Tick,
    UnloadAdapter,
    engine_main,
    process_main,
)

logger = logging.getLogger("trimtab.server")


class Worker(Protocol):
    """A running engine: a process, or in tests a thread."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


Launch = Callable[[EngineFactory], tuple[Worker, Connection]]


def launch_process(factory: EngineFactory, log_level: str = "info") -> tuple[Worker, Connection]:
    """The engine in a process of its own; `factory` must be picklable."""
    # Threads that spin for long between parallel regions starve each other once anything else runs on their cores (a
    # tokenizer, this server); ones that never spin take twice as long for a tick. The child reads this as it starts.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=process_main, args=(theirs, factory, log_level), name="trimtab-engine", daemon=True
    )
    process.start()
    atexit.register(process.kill)  # before multiprocessing would wait for a child that ignores signals
    theirs.close()  # or the end of the process would not close the pipe
    return process, ours


class _Thread(threading.Thread):
    def kill(self) -> None:
        """A thread ends by itself when its pipe closes."""


def launch_thread(factory: EngineFactory) -> tuple[Worker, Connection]:
    """The engine's loop in a thread of this process, for tests."""
    ours, theirs = multiprocessing.Pipe()

    def run() -> None:
        try:
            engine_main(theirs, factory)
        finally:
            theirs.close()

    thread = _Thread(target=run, name="trimtab-engine", daemon=True)
    thread.start()
    return thread, ours


class Channel:
    """The events of one HTTP request. `positions`: engine request id to the place of its prompt in the request."""

    def __init__(self, bridge: Bridge, requests: Sequence[EngineRequest]) -> None:
        self.positions = {request.id: i for i, request in enumerate(requests)}
        self.sequences = sum(request.sequences for request in requests)
        self.open = set(self.positions)
        self._bridge = bridge
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    async def events(self) -> list[Event]:
        """Everything that has come since the last call, waiting for something; empty when all requests have ended."""
        while not self._events and self.open:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def push(self, event: Event) -> None:
        """From the bridge: one more event."""
        self._events.append(event)
        if isinstance(event, Done | Failed):
            self.open.discard(event.request_id)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> bool:
        """Forgets the channel; what still runs is aborted. True if something did."""
        return self._bridge.forget(self)


class Bridge:
    """Owns the engine. `max_sequences` bounds what may be in the engine, running or queued.

    `models` and `stats` are what the engine last told; `alive` is whether it runs, `draining` whether it takes no more.
    """

    def __init__(self, factory: EngineFactory, *, max_sequences: int = 1088, launch: Launch = launch_process) -> None:
        self.max_sequences = max_sequences
        self.models: tuple[ModelInfo, ...] = ()
        self.stats: Stats | None = None
        self.alive = self.draining = False
        self.sequences = 0
        self._factory, self._launch = factory, launch
        self._channels: dict[str, Channel] = {}
        self._changes: dict[int, asyncio.Future[Changed]] = {}
        self._tickets = itertools.count()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._connection: Connection | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Starts the engine and waits for its models. Raises ModelLoadError, or EngineFailure for a bug."""
        loop = asyncio.get_running_loop()
        self._worker, self._connection = self._launch(self._factory)
        try:
            first = await loop.run_in_executor(None, self._connection.recv)
        except (EOFError, OSError):
            first = StartFailed("The engine's process ended while it was starting.", False)
        except asyncio.CancelledError:
            self.stop()
            raise
        if isinstance(first, StartFailed):
            self.stop()
            raise (ModelLoadError if first.expected else EngineFailure)(first.message)
        assert isinstance(first, Ready), "the engine's first message says how the start went"
        self.models, self.alive = first.models, True
        threading.Thread(target=self._write, args=(self._connection,), name="trimtab-outbox", daemon=True).start()
        loop.add_reader(self._connection.fileno(), self._read)

    def submit(self, requests: Sequence[EngineRequest]) -> Channel:
        """Sends requests to the engine, all of them or none. Raises Overloaded, BadRequest and EngineFailure."""
        channel = Channel(self, requests)
        if not self.alive:
            raise EngineFailure("The engine has stopped; the server must be restarted.")
        if self.draining:
            raise Overloaded("The server is shutting down.", retry_after=5)
        if channel.sequences > self.max_sequences:
            raise BadRequest(
                f"The request has {channel.sequences} sequences (prompts times n; a search is one); at most "
                f"{self.max_sequences} can be queued. Send fewer at a time.",
                "n",
            )
        if self.sequences + channel.sequences > self.max_sequences:
            raise Overloaded(f"The queue is full ({self.sequences} sequences).", retry_after=1)
        self.sequences += channel.sequences
        self._idle.clear()
        for request in requests:
            self._channels[request.id] = channel
            self._outbox.put(Submit(request))
        return channel

    def forget(self, channel: Channel) -> bool:
        """Ends a channel; requests that still run are aborted."""
        running = tuple(channel.open)
        if running:
            self._outbox.put(Abort(running))
        channel.open.clear()
        for request_id in channel.positions:
            self._channels.pop(request_id, None)
        self.sequences, channel.sequences = self.sequences - channel.sequences, 0
        if not self.sequences:
            self._idle.set()
        return bool(running)

    async def load_adapter(self, spec: ModelSpec, base: ModelSpec) -> None:
        """The engine serves an adapter of `base`, and `models` tells of it. Raises ModelLoadError, EngineFailure."""
        await self._change(LoadAdapter(next(self._tickets), spec, base))

    async def unload_adapter(self, id: str) -> None:
        """The engine forgets an adapter. Raises AdapterInUse while requests use it, and EngineFailure."""
        await self._change(UnloadAdapter(next(self._tickets), id))

    async def _change(self, message: LoadAdapter | UnloadAdapter) -> None:
        if not self.alive:
            raise EngineFailure("The engine has stopped; the server must be restarted.")
        self._changes[message.ticket] = asyncio.get_running_loop().create_future()
        self._outbox.put(message)
        try:
            changed = await self._changes[message.ticket]
        finally:
            del self._changes[message.ticket]
        if changed.kind is not None:
            kinds = {"AdapterInUse": AdapterInUse, "ModelLoadError": ModelLoadError, "EngineFailure": EngineFailure}
            raise kinds[changed.kind](changed.message)

    @property
    def full(self) -> bool:
        """Whether the queue takes nothing more."""
        return self.sequences >= self.max_sequences

    async def drain(self, timeout: float) -> None:
        """Takes no more, lets what runs finish for `timeout` seconds, then fails the rest."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            logger.warning("%d sequences were still running after %g s; they are aborted", self.sequences, timeout)
            self._fail_all("The server is shutting down.", kind="Overloaded")

    def stop(self) -> None:
        """Ends the engine and its process."""
        self.alive = False
        if self._connection is not None:
            if self._connection.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._outbox.put(None)
            self._connection.close()
            self._connection = None
        if self._worker is not None:
            self._worker.join(2.0)
            if self._worker.is_alive():
                self._worker.kill()
                self._worker.join(2.0)

    def _write(self, connection: Connection) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                connection.send(message)
            except (OSError, ValueError):
                return  # the engine is gone; the reader sees that too

    def _read(self) -> None:
        """Everything the pipe holds, in one callback of the event loop."""
        connection = self._connection
        try:
            while connection is not None and connection.poll():
                self._route(connection.recv())
        except (EOFError, OSError):
            self._on_death()

    def _route(self, tick: Tick | Changed) -> None:
        if isinstance(tick, Changed):
            self.models = tick.models
            change = self._changes.get(tick.ticket)
            if change is not None and not change.done():
                change.set_result(tick)
            return
        self.stats = tick.stats or self.stats
        for event in tick.events:
            channel = self._channels.get(event.request_id)
            if channel is not None:  # else it was aborted, and this was on its way
                channel.push(event)

    def _on_death(self) -> None:
        assert self._connection is not None
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self.alive = False
        logger.critical("the engine's process has ended")
        self._fail_all("The engine has stopped.", kind="EngineFailure")
        for ticket, change in self._changes.items():
            if not change.done():
                change.set_result(Changed(ticket, self.models, "EngineFailure", "The engine has stopped."))

    def _fail_all(self, message: str, kind: Any) -> None:
        for channel in set(self._channels.values()):
            running = tuple(channel.open)
            if running and self.alive:
                self._outbox.put(Abort(running))
            for request_id in running:
                channel.push(Failed(request_id, kind, message))
