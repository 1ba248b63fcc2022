"""The engine's side of the bridge: a loop over one pipe, in a process of its own.

Inbox first, then one tick while there is work, then what happened in that tick as one message; it sleeps on the pipe
when idle. What fails for one request is that request's failure. The process ends when its parent does (the pipe
closes), and leaves signals to the parent. Imports no web code: a child that starts fast is a server that does.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal, Protocol

from decoding.core import (
    AdapterInUse,
    BadRequest,
    ModelLoadError,
    ModelSpec,
    Overloaded,
    Request,
    TrimtabError,
    UnknownModel,
)
from decoding.events import Done, Event, Failed, ModelInfo, Stats

if TYPE_CHECKING:
    from decoding.text import TextModel

logger = logging.getLogger("trimtab.engine")

STATS_EVERY = 0.25  # seconds
FAILED_TICKS = 3  # so many in a row, and the engine is beyond help


class EngineLike(Protocol):
    """What the loop needs of an engine."""

    models: tuple[ModelInfo, ...]

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Event]: ...

    def has_work(self) -> bool: ...

    def stats(self) -> Stats: ...

    def load_adapter(self, spec: ModelSpec, text: TextModel | None = None) -> None: ...

    def unload_adapter(self, id: str) -> None: ...


EngineFactory = Callable[[], EngineLike]


@dataclass(frozen=True, slots=True)
class Submit:
    """To the engine: a request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """To the engine: forget these requests."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """To the engine: serve this adapter of `base`. Answered by `Changed` with the same ticket."""

    ticket: int
    spec: ModelSpec
    base: ModelSpec


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """To the engine: forget this adapter. Answered by `Changed` with the same ticket."""

    ticket: int
    id: str


@dataclass(frozen=True, slots=True)
class Changed:
    """From the engine: what it serves now; or why nothing has changed, `kind` being the exception's class name."""

    ticket: int
    models: tuple[ModelInfo, ...]
    kind: Literal["AdapterInUse", "ModelLoadError", "EngineFailure"] | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """From the engine, first: the models are loaded."""

    models: tuple[ModelInfo, ...]


@dataclass(frozen=True, slots=True)
class StartFailed:
    """From the engine, first and last: it cannot start. `expected` tells a configuration error from a bug."""

    message: str
    expected: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """From the engine: what happened in a tick, and now and then a snapshot."""

    events: tuple[Event, ...]
    stats: Stats | None = None


def process_main(connection: Connection, factory: EngineFactory, log_level: str) -> None:
    """Entry point of the process. The parent decides when to stop, so signals to the whole group do nothing here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    engine_main(connection, factory)


def engine_main(connection: Connection, factory: EngineFactory) -> None:
    """Builds the engine, tells how that went, and serves until the pipe closes."""
    try:
        engine = factory()
    except Exception as error:
        expected = isinstance(error, ModelLoadError)
        if not expected:
            logger.exception("the engine cannot start")
        message = str(error) if expected else f"The engine cannot start: {type(error).__name__}: {error}"
        _send(connection, StartFailed(message, expected))
        return
    if _send(connection, Ready(engine.models)):
        Loop(connection, engine).run()


def _send(connection: Connection, message: Any) -> bool:
    """False if nobody listens any more."""
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError, OSError):
        return False
    return True


class Loop:
    """One engine behind one pipe. `live`: requests that have been taken and not yet ended."""

    def __init__(self, connection: Connection, engine: EngineLike) -> None:
        self.connection, self.engine = connection, engine
        self.live: set[str] = set()
        self._refused: list[Event] = []
        self._stats_due = 0.0
        self._failed_ticks = 0

    def run(self) -> None:
        """Until the parent is gone, or the engine cannot be helped."""
        try:
            while self._failed_ticks < FAILED_TICKS:
                self._read_inbox()
                events = [*self._refused, *self._tick()]
                self._refused = []
                if not self._report(events):
                    return
        except (EOFError, ConnectionResetError, BrokenPipeError):
            return  # the parent has gone
        logger.critical("%d ticks in a row have failed; the engine stops", FAILED_TICKS)

    def _read_inbox(self) -> None:
        """Takes what has come; waits for something only if there is nothing to do."""
        wait = None if not self.engine.has_work() else 0.0
        while self.connection.poll(wait):
            message = self.connection.recv()
            if isinstance(message, Submit):
                self._submit(message.request)
            elif isinstance(message, LoadAdapter | UnloadAdapter):
                _send(self.connection, self._change(message))
            else:
                for request_id in message.request_ids:
                    self.live.discard(request_id)
                    self.engine.abort(request_id)
            wait = 0.0

    def _submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except TrimtabError as error:
            self._refused.append(_refusal(request.id, error))
        except Exception as error:
            logger.exception("request %s cannot be taken", request.id)
            self._refused.append(Failed(request.id, "EngineFailure", f"The engine failed: {type(error).__name__}."))
        else:
            self.live.add(request.id)

    def _change(self, message: LoadAdapter | UnloadAdapter) -> Changed:
        """Between two ticks: requests that run go on after it as they would have without."""
        kind: Any = None
        text = ""
        try:
            if isinstance(message, LoadAdapter):
                from decoding.texts import own_text  # transformers takes seconds to import; the fake needs none of it

                self.engine.load_adapter(message.spec, own_text(message.spec, message.base))
            else:
                self.engine.unload_adapter(message.id)
        except (ModelLoadError, UnknownModel) as error:
            kind, text = "AdapterInUse" if isinstance(error, AdapterInUse) else "ModelLoadError", str(error)
        except Exception as error:
            logger.exception("an adapter cannot be changed")
            kind, text = "EngineFailure", f"The engine failed: {type(error).__name__}."
        return Changed(message.ticket, self.engine.models, kind, text)

    def _tick(self) -> list[Event]:
        if not self.engine.has_work():
            return []
        try:
            events = self.engine.step()
        except Exception as error:
            self._failed_ticks += 1
            logger.exception("a tick failed; its requests fail, the engine goes on")
            return self._fail_all(f"The engine failed: {type(error).__name__}.")
        self._failed_ticks = 0
        self.live.difference_update(event.request_id for event in events if isinstance(event, Done | Failed))
        return events

    def _fail_all(self, message: str) -> list[Event]:
        failed: list[Event] = []
        for request_id in self.live:
            failed.append(Failed(request_id, "EngineFailure", message))
            try:
                self.engine.abort(request_id)
            except Exception:
                logger.exception("request %s cannot be aborted", request_id)
        self.live.clear()
        return failed

    def _report(self, events: list[Event]) -> bool:
        now = time.monotonic()
        due = now >= self._stats_due or not self.engine.has_work()
        if not events and not due:
            return True
        self._stats_due = now + STATS_EVERY if due else self._stats_due
        return _send(self.connection, Tick(tuple(events), self.engine.stats() if due else None))


def _refusal(request_id: str, error: TrimtabError) -> Failed:
    if isinstance(error, BadRequest):
        kind: Any = "UnknownModel" if isinstance(error, UnknownModel) else "BadRequest"
        return Failed(request_id, kind, error.message, error.param, error.code)
    return Failed(request_id, "Overloaded" if isinstance(error, Overloaded) else "EngineFailure", str(error))
