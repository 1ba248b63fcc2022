"""Forwards with adapters through static buffers: what was captured serves adapters that come and go, or is dropped.

A pretended replay computes what a CUDA graph would: with the hooks, the table and the rank of its capture.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import decoding.graphs
import decoding.runner
from decoding.adapters import Adapter, Lora
from decoding.graphs import Forward, Output
from decoding.host_build import load_kernels
from decoding.hosting import SpanInput
from decoding.lora import LEAST_RANK, Loras
from decoding.runner import Runner
from tests.decoding.test_graphs import as_it_is, hosted, static, steps
from tests.tiny import tiny_model

PARTS = ("q_proj", "v_proj")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Runner, "_measure_cost", lambda _: 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quicker(**options: Any) -> Runner:
    """A runner whose adapters alone are Triton's: the interpreter is slow."""
    if not load_kernels():
        pytest.skip("no C++ compiler")
    runner = hosted(kernels=True, **options)
    runner.loras = Loras(runner.model, runner.model.get_output_embeddings(), "triton")
    return runner


class Captures:
    """Pretends to capture: a replay has the hooks of its capture, and the table that was current then."""

    def __init__(self, runner: Runner) -> None:
        self.linears = list(runner.loras.linears.values())
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, forward: Forward, size: int) -> Forward:
        forward()
        self.captured.append(size)
        hooks = [module._forward_hooks.copy() for module in self.linears]

        def replay() -> Output:
            self.replayed.append(size)
            now = [module._forward_hooks for module in self.linears]
            self._hook(hooks)
            try:
                return forward()
            finally:
                self._hook(now)

        return replay

    def _hook(self, hooks: list[Any]) -> None:
        for module, own in zip(self.linears, hooks, strict=True):
            module._forward_hooks = own


def load(runner: Runner, id: str, rank: int = 4, seed: int = 0, parts: tuple[str, ...] = PARTS) -> None:
    """An adapter of noise that matters, on the layers whose names end with one of `parts`."""
    noise, modules = torch.Generator().manual_seed(seed), {}
    for layer, (size, width) in runner.loras.sizes().items():
        if layer.endswith(parts):
            down, up = torch.randn(rank, size, generator=noise), torch.randn(rank, width, generator=noise)
            modules[layer] = Lora((down * size**-0.5).to(runner._like), (up * 0.3).to(runner._like))
    runner.loras.add(id, Adapter(modules, ""))


def adapted(spans: list[SpanInput], *ids: str | None) -> list[SpanInput]:
    return [replace(span, adapter=id) for span, id in zip(spans, ids, strict=True)]


def plain(runner: Runner, case: list[SpanInput]) -> torch.Tensor:
    """logits [R, width] of the packed forward as it is."""
    held, runner._static = runner._static, None
    logits = runner.forward(case).logits
    runner._static = held
    return logits


def same(runner: Runner, case: list[SpanInput]) -> bool:
    """Whether `case` has the bits of the plain forward, and not those of one without adapters."""
    want, bare = plain(runner, case), plain(runner, [replace(span, adapter=None) for span in case])
    rows = [i for i, span in enumerate(span for span in case for _ in span.rows) if span.adapter is not None]
    assert ((want - bare)[rows].abs().amax(-1) > 0.01).all(), "the adapters matter"
    return torch.equal(runner.forward(case).logits, want)


def test_tokens_with_and_without_adapters_replay_what_was_captured() -> None:
    runner = hosted()
    load(runner, "a", parts=("proj",))
    load(runner, "b", rank=LEAST_RANK, seed=1)
    captures = Captures(runner)
    made = static(runner, captures)
    assert same(runner, adapted(steps([2, 0]), "b", "a"))
    assert same(runner, adapted(steps([1, 0], 2), "b", None))
    assert same(runner, adapted(steps([0, 1], 2), None, "a"))
    assert same(runner, adapted([*steps([1]), *steps([0], 7)], "a", "b"))
    assert (captures.captured, captures.replayed) == ([2, 4, 8], [2, 4, 4, 8])
    assert torch.equal(runner.forward(steps([2, 0])).logits, plain(runner, steps([2, 0])))
    assert (captures.captured[3:], captures.replayed[4:]) == ([2], [2]), "without adapters: another graph"
    assert (sorted(made.made), sorted(made.adapted)) == ([2], [2, 4, 8])
    runner.close()


def test_padding_has_no_adapter() -> None:
    runner = quicker()
    load(runner, "a")
    load(runner, "b", seed=1)
    made = static(runner, Captures(runner))
    runner.forward(adapted(steps([0, 1], 2), "a", "b"))
    case = adapted(steps([2, 0, 1]), "b", None, "b")
    torch.testing.assert_close(runner.forward(case).logits, plain(runner, case), rtol=1e-5, atol=1e-5)
    assert made._owners[:4].tolist() == [1, -1, 1, -1]
    runner.close()


def test_adapters_come_and_go_under_what_was_captured() -> None:
    runner = quicker()
    load(runner, "a")
    captures = Captures(runner)
    static(runner, captures)
    case = adapted(steps([0, 1]), "a", "a")
    assert same(runner, case)
    before = runner.forward(case).logits
    load(runner, "a", rank=LEAST_RANK, seed=2)
    assert same(runner, case)
    assert (runner.forward(case).logits - before).abs().max() > 0.01
    load(runner, "b", rank=1, seed=3)
    assert same(runner, adapted(steps([0, 1]), "b", "a"))
    runner.unload_adapter("a")
    assert same(runner, adapted(steps([0, 1]), "b", None))
    with pytest.raises(KeyError, match="no adapter 'a'"):
        runner.forward(case)
    runner.unload_adapter("b")
    load(runner, "a", seed=4)
    assert same(runner, case)
    assert captures.captured == [2], "captured once"
    assert len(captures.replayed) == 7
    runner.close()


@pytest.mark.parametrize("change", ["rank", "layers", "table"])
def test_what_would_not_serve_an_adapter_is_dropped(change: str) -> None:
    """A rank above that of the launches, layers without a hook, more adapters than the table has places."""
    runner = quicker()
    load(runner, "a")
    captures = Captures(runner)
    made = static(runner, captures)
    assert same(runner, adapted(steps([0]), "a"))
    assert same(runner, adapted(steps([0, 1]), "a", "a"))
    if change == "table":
        for i in range(8):
            load(runner, f"{i}", rank=1, seed=i)
    load(runner, "b", LEAST_RANK + 1 if change == "rank" else 4, 1, ("mlp.down_proj",) if change == "layers" else PARTS)
    assert same(runner, adapted(steps([0, 1]), "b", "a"))
    assert list(made.adapted) == [2], "the one that would be wrong is gone, not needed for this size or not"
    assert same(runner, adapted(steps([0]), "b"))
    assert same(runner, adapted(steps([0]), "a"))
    assert captures.captured == [1, 2, 2, 1]
    assert captures.replayed == [1, 2, 2, 1, 1]
    runner.close()


def test_a_table_where_a_smaller_one_has_been_is_another() -> None:
    runner = quicker()
    before = runner.loras.capture_key()
    for i in range(9):
        load(runner, f"{i}", rank=1)
    assert runner.loras.capture_key()[1] > before[1]
    runner.close()


def test_adapters_that_cannot_be_captured_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    runner = quicker()
    load(runner, "a")

    def refuse(forward: Forward, size: int) -> Forward:
        if size == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return forward

    made = static(runner, refuse)
    assert same(runner, adapted(steps([0]), "a"))
    with caplog.at_level(logging.WARNING, "decoding.graphs"):
        for _ in range(2):
            assert same(runner, adapted(steps([0, 1]), "a", None))
    assert [record.message.split(" stay")[0] for record in caplog.records] == ["Forwards with adapters"]
    assert same(runner, adapted(steps([0, 1], 2), "a", None))
    assert sorted(made.adapted) == [1, 2], "nothing more is tried"
    assert made.quick, "the rest is captured"
    runner.forward(steps([0]))
    assert list(made.made) == [1]
    runner.close()


@pytest.mark.parametrize("when", ["never", "expected", "loaded"])
def test_warming_up_captures_for_adapters(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.runner, "FEW_ROWS", 2)
    runner = quicker(adapters=when == "expected")
    if when == "loaded":
        load(runner, "a", rank=LEAST_RANK + 1)
    captures = Captures(runner)
    made = static(runner, captures)
    before = [layer.keys.clone() for layer in runner.layers]
    assert runner.warm_up()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(runner.layers, before, strict=True))
    assert sorted(made.adapted) == ([] if when == "never" else [1, 2])
    if when == "expected":
        assert not runner.loras.adapters
        load(runner, "a", rank=LEAST_RANK, parts=tuple(runner.loras.sizes()))
    if when != "never":
        assert same(runner, adapted(steps([0, 1]), "a", "a"))
        assert captures.captured == [1, 2, 1, 2]
    runner.close()


def test_the_cpus_kernel_keeps_from_what_was_captured() -> None:
    if not load_kernels():
        pytest.skip("no C++ compiler")
    runner = hosted(kernels=True)
    load(runner, "a")
    made = static(runner, as_it_is)
    assert same(runner, adapted(steps([0, 1]), "a", None))
    assert not made.made
    assert not made.adapted
    runner.close()


def test_forwards_of_one_size_give_a_row_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.graphs, "INVARIANT_TOKENS", 8)
    monkeypatch.setattr(decoding.runner, "INVARIANT_TOKENS", 8)
    runner = quicker(batch_invariant=True)
    load(runner, "a")
    load(runner, "b", seed=1)
    alone = [runner.forward(adapted(steps([i]), id)).logits[0] for i, id in enumerate(("a", None, "b"))]
    together = runner.forward(adapted(steps([2, 0, 1]), "b", "a", None)).logits
    assert torch.equal(together, torch.stack([alone[2], alone[0], alone[1]]))
    load(runner, "a", LEAST_RANK + 1)
    assert not torch.equal(runner.forward(adapted(steps([0]), "a")).logits[0], alone[0])
    assert torch.equal(runner.forward(adapted(steps([2]), "b")).logits[0], alone[2])
    runner.close()


@pytest.mark.gpu
def test_graphs_with_adapters_on_a_gpu() -> None:
    """Captured for adapters alone, dropped for a wider one, and captured anew, into the same pool."""
    model = tiny_model("llama", hidden_size=64, head_dim=16).to("cuda", torch.float32)
    runner = Runner(model, "m")
    runner.allocate(32, 16)
    made = runner._static
    assert made is not None
    for number, rank in enumerate((4, LEAST_RANK + 1, 40)):
        load(runner, "a", rank, number)
        load(runner, "b", 2, number + 7)
        for tokens in (1, 3):
            spans = [SpanInput([5, 6, 7][:tokens], 0, [i], range(tokens)) for i in range(3)]
            case = adapted(spans, "a", None, "b")
            torch.testing.assert_close(runner.forward(case).logits, plain(runner, case), rtol=1e-4, atol=1e-4)
        assert made.quick_adapted, "no capture failed"
        assert sorted(made.adapted) == [4, 16]
    assert not made.made
    assert runner.warm_up()
    assert sorted(made.made) == sorted(made.adapted) == [1, 2, 4, 8, 16, 32, 48, 64]
    load(runner, "a", 4, 11)
    case = adapted([SpanInput([5], 0, [0], [0]), SpanInput([5], 0, [1], [0])], "a", None)
    torch.testing.assert_close(runner.forward(case).logits, plain(runner, case), rtol=1e-4, atol=1e-4)
    assert sorted(made.adapted) == [1, 2, 4, 8, 16, 32, 48, 64], "a replaced adapter needs no other graph"
    runner.close()
