"""Streams and timers against a CUDA that only writes down what it is asked; and engines whose rows do not vary."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from decoding.core import EngineConfig, ModelLoadError, ModelSpec, Sampling
from decoding.engine import Engine
from decoding.generate import host
from decoding.hosting import Rows
from decoding.models import _device
from decoding.runner import has_experts
from decoding.streams import Streams, Timer
from tests.fakes import TableModel, byte_tokenizer, random_table, table_engine
from tests.tiny import SERVED, tiny_model

CUDA = torch.device("cuda", 0)


class Log:
    """A CUDA of streams and events; `calls` in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.current: Any = self.stream("main")
        self.over = False
        names = iter("ab")
        patch.setattr(torch.cuda, "Stream", lambda device: self.stream(next(names)))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "Event", lambda enable_timing: self.event())

    def stream(self, name: str) -> Any:
        log = self

        class Stream:
            device = CUDA

            def __repr__(self) -> str:
                return name

            def wait_stream(self, other: Any) -> None:
                log.calls.append((name, "waits for", repr(other)))

        return Stream()

    @contextmanager
    def on(self, stream: Any) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def event(self) -> Any:
        log = self

        class Event:
            def record(self) -> None:
                self.at = len(log.calls)
                log.calls.append((repr(log.current), "marks", self.at))

            def query(self) -> bool:
                return log.over

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        return Event()


class Seen:
    """A tensor that says on which streams it is used."""

    def __init__(self) -> None:
        self.used: list[str] = []

    def record_stream(self, stream: Any) -> None:
        self.used.append(repr(stream))


def test_models_run_beside_each_other_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(monkeypatch)
    streams = Streams({"large": CUDA, "small": CUDA}, beside=True)
    for model in ("large", "small"):
        with streams.of(model):
            log.calls.append((repr(log.current), "runs", model))
    logits = Seen()
    for model in ("large", "small"):
        streams.join(model, Rows(logits))  # type: ignore[arg-type]
    assert log.calls == [
        ("a", "waits for", "main"),
        ("a", "runs", "large"),
        ("b", "waits for", "main"),
        ("b", "runs", "small"),
        ("main", "waits for", "a"),
        ("main", "waits for", "b"),
    ]
    assert logits.used == ["main", "main"]


@pytest.mark.parametrize(
    ("devices", "beside"),
    [
        ({"one": CUDA}, True),
        ({"large": CUDA, "small": CUDA}, False),
        ({"large": torch.device("cpu"), "small": torch.device("cpu")}, True),
    ],
)
def test_otherwise_everything_runs_in_order(
    devices: dict[str, torch.device], beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(monkeypatch)
    streams = Streams(devices, beside)
    for model in devices:
        with streams.of(model):
            assert repr(log.current) == "main"
        streams.join(model, Rows(torch.zeros(1)))
    assert log.calls == []


def test_device_work_is_timed_where_it_runs_and_told_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    log, timer, told = Log(monkeypatch), Timer(), list[float]()
    streams = Streams({"large": CUDA, "small": CUDA}, beside=True)
    with streams.of("large"):
        began = timer.begin(CUDA)
        log.calls.append("work")
        timer.end(began, told.append)
    timer.settle()
    assert told == []  # it still runs
    log.over = True
    timer.settle()
    timer.settle()
    assert told == [2.0]  # once, from mark to mark
    assert [call for call in log.calls if call[1] == "marks"] == [("a", "marks", 1), ("a", "marks", 3)]


def test_host_work_is_told_at_once() -> None:
    timer, told = Timer(), list[float]()
    timer.end(timer.begin(torch.device("cpu")), told.append)
    assert len(told) == 1
    assert told[0] >= 0.0


def test_an_engine_may_give_every_request_the_bits_that_it_has_alone() -> None:
    def run(prompts: list[tuple[int, ...]], invariant: bool) -> list[Any]:
        torch.manual_seed(0)
        engine = Engine(
            {"base": host("base", tiny_model("llama", vocab_size=257), byte_tokenizer())},
            EngineConfig(batch_invariant=invariant),
        )
        done = engine.generate(prompts, sampling=Sampling(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0))
        engine.runners["base"].close()  # type: ignore[attr-defined]
        return [[entry.logprob for entry in each.logprobs or ()] for each in done]

    prompts = [tuple(range(3 + i, 9 + 3 * i)) for i in range(5)]
    assert run(prompts, True) == [run([each], True)[0] for each in prompts]


def test_an_engine_without_kernels_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = host("base", tiny_model("llama", vocab_size=257), byte_tokenizer())
    monkeypatch.setattr(hosted.runner, "_kernels", False)
    with pytest.raises(ModelLoadError, match="need kernels"):
        Engine({"base": hosted}, EngineConfig(batch_invariant=True))


def test_mixtures_of_experts_say_that_they_cannot() -> None:
    hosted = host("base", tiny_model("mixtral", vocab_size=257), byte_tokenizer())
    with pytest.raises(ModelLoadError, match="mixture of experts"):
        Engine({"base": hosted}, EngineConfig(batch_invariant=True))


@pytest.mark.parametrize("arch", list(SERVED))
def test_experts_are_seen(arch: str) -> None:
    assert has_experts(tiny_model(arch)) == ("num_experts" in SERVED[arch])


def test_models_in_several_places_are_refused() -> None:
    models = {"a": TableModel("a", random_table(1), 3), "b": TableModel("b", random_table(2), 3)}
    models["a"].device = torch.device("cuda:1")
    with pytest.raises(ModelLoadError, match="one device, but the engine has 'a' on cuda:1, 'b' on cpu"):
        table_engine(models)


def test_every_tick_launches_on_the_engines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append(str(device)))
    engine = table_engine({"a": TableModel("a", random_table(1), 3)})
    engine.step()
    assert used == []
    engine._device = torch.device("cuda:1")
    engine.step()
    engine.step()
    assert used == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize(("asked", "found"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_gpu_has_a_number(asked: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(_device(ModelSpec("a", "/a", device=asked))) == found
