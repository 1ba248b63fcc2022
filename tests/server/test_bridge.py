"""The bridge: a real process, its start, its death; the queue's bound; draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import BadRequest, EngineFailure, ModelLoadError, ModelSpec, Overloaded, Sampling, SearchPlan
from decoding.core import Request as EngineRequest
from decoding.prepare import Entry, prepare
from decoding.strategies import STRATEGIES
from server.bridge import Bridge, Channel, launch_thread
from server.engine_process import EngineLike
from tests.server.conftest import TEXTS
from tests.server.fake_engine import FakeEngine, crashing_engine, failing_engine, fake_engine


def request(bridge: Bridge, prompt: str = "x", n: int = 1) -> EngineRequest:
    plain = STRATEGIES["plain"]
    catalog = {info.id: Entry(TEXTS[info.id], info) for info in bridge.models}
    return prepare(plain.build(plain.params(), "base"), prompt, Sampling(), catalog, n=n)


async def text_of(channel: Channel) -> str:
    pieces = []
    while events := await channel.events():
        pieces += [getattr(event, "text", None) or getattr(event, "message", "") for event in events]
    channel.close()
    return "".join(pieces)


def with_bridge(test: Callable[[Bridge], Any], factory: Callable[[], EngineLike] = fake_engine, **kwargs: Any) -> None:
    async def run() -> None:
        bridge = Bridge(factory, **({"launch": launch_thread} | kwargs))
        try:
            await bridge.start()
            await test(bridge)
        finally:
            bridge.stop()

    asyncio.run(run())


def with_process(test: Callable[[Bridge], Any], factory: Callable[[], EngineLike] = fake_engine) -> None:
    from server.bridge import launch_process

    with_bridge(test, factory, launch=launch_process)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_a_process_serves_and_its_death_fails_its_requests() -> None:
    async def test(bridge: Bridge) -> None:
        assert [info.id for info in bridge.models] == ["base", "expert", "base-small"]
        assert (await text_of(bridge.submit([request(bridge)]))).endswith("world.")
        waiting, fatal = bridge.submit([request(bridge, "[wait]")]), bridge.submit([request(bridge, "[exit]")])
        assert await text_of(waiting) == await text_of(fatal) == "The engine has stopped."
        assert not bridge.alive
        assert bridge.sequences == 0
        with pytest.raises(EngineFailure, match="must be restarted"):
            bridge.submit([request(bridge)])

    with_process(test)


def test_a_process_loads_adapters_and_its_death_fails_what_it_was_asked() -> None:
    base = ModelSpec("base", "/models/base")

    def spec(path: str) -> ModelSpec:
        return ModelSpec("tuned", path, kind="adapter", of="base")

    async def test(bridge: Bridge) -> None:
        before = bridge.models
        waiting = bridge.submit([request(bridge, "[wait]")])
        await bridge.load_adapter(spec("/good"), base)
        assert [info.of for info in bridge.models] == [None, None, None, "base"]
        with pytest.raises(ModelLoadError, match="has no adapter_config"):
            await bridge.load_adapter(spec("/bad"), base)
        with pytest.raises(EngineFailure, match="RuntimeError"):
            await bridge.load_adapter(spec("/broken"), base)
        await bridge.unload_adapter("tuned")
        assert bridge.models == before
        assert waiting.open, "nothing of this touches a request"
        waiting.close()
        with pytest.raises(EngineFailure, match="has stopped"):
            await bridge.load_adapter(spec("/exit"), base)
        with pytest.raises(EngineFailure, match="has stopped"):
            await bridge.unload_adapter("tuned")

    with_process(test)


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (failing_engine, ModelLoadError, r"no config\.json"),
        (crashing_engine, EngineFailure, "ended while it was starting"),
    ],
)
def test_a_start_that_fails_says_why(factory: Any, error: type[Exception], message: str) -> None:
    async def never(bridge: Bridge) -> None:
        raise AssertionError("it has started")

    with pytest.raises(error, match=message):
        with_process(never, factory)


def test_the_queue_is_bounded_in_sequences() -> None:
    async def test(bridge: Bridge) -> None:
        held = bridge.submit([request(bridge, "[wait]", n=3)])
        with pytest.raises(Overloaded, match="queue is full"):
            bridge.submit([request(bridge), request(bridge)])
        one = bridge.submit([request(bridge)])
        assert bridge.full
        assert held.close()
        assert (await text_of(one)).endswith("world.")
        with pytest.raises(BadRequest, match="at most 4"):
            bridge.submit([request(bridge, n=5)])
        assert bridge.sequences == 0

    with_bridge(test, max_sequences=4)


def test_a_search_counts_as_its_root() -> None:
    """Its n is how many answers are told, not what is queued."""

    async def test(bridge: Bridge) -> None:
        plain = request(bridge, "[wait]", n=3)
        search = replace(plain, program=replace(plain.program, search=SearchPlan("guess", None)))
        held = bridge.submit([search, replace(search, id="other")])
        assert bridge.sequences == 2
        with pytest.raises(Overloaded, match=r"queue is full \(2 sequences\)"):
            bridge.submit([replace(search, id="third")])
        assert held.close()
        assert bridge.sequences == 0

    with_bridge(test, max_sequences=2)


def test_several_requests_share_a_channel() -> None:
    async def test(bridge: Bridge) -> None:
        requests = [request(bridge), request(bridge, n=2)]
        channel = bridge.submit(requests)
        assert list(channel.positions.values()) == [0, 1]
        assert (await text_of(channel)).count("w") == 3
        assert not channel.close()

    with_bridge(test)


def test_closing_a_channel_aborts_what_runs() -> None:
    engines: list[FakeEngine] = []

    def factory() -> EngineLike:
        engines.append(FakeEngine())
        return engines[0]

    async def test(bridge: Bridge) -> None:
        channel = bridge.submit([request(bridge, "[forever]"), request(bridge, "[wait]")])
        await channel.events()
        assert channel.close()
        await until(lambda: engines[0].aborts == 2 and not engines[0].groups)
        await until(lambda: bridge.stats is not None and bridge.stats.aborts == 2)

    with_bridge(test, factory)


def test_draining_lets_requests_finish_and_takes_no_more() -> None:
    async def test(bridge: Bridge) -> None:
        running = bridge.submit([request(bridge, "[slow]")])
        draining = asyncio.create_task(bridge.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="shutting down"):
            bridge.submit([request(bridge)])
        assert (await text_of(running)).endswith("world.")
        await draining

    with_bridge(test)


def test_draining_fails_what_takes_too_long() -> None:
    async def test(bridge: Bridge) -> None:
        running = bridge.submit([request(bridge, "[wait]")])
        await bridge.drain(0.01)
        assert await text_of(running) == "The server is shutting down."

    with_bridge(test)


def test_an_engine_whose_ticks_keep_failing_stops() -> None:
    class Hopeless(FakeEngine):
        def has_work(self) -> bool:
            return self.started

        started = False

        def submit(self, request: EngineRequest) -> None:
            self.started = True
            super().submit(request)

    async def test(bridge: Bridge) -> None:
        assert "engine failed" in await text_of(bridge.submit([request(bridge, "[raise]")]))
        await until(lambda: not bridge.alive)

    def factory() -> EngineLike:
        engine = Hopeless()
        engine.step = lambda: (_ for _ in ()).throw(RuntimeError("again"))  # type: ignore[method-assign]
        return engine

    with_bridge(test, factory)
