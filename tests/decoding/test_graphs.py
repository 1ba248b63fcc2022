"""Forwards through static buffers: padded rows are the unpadded ones, padding stores nothing, sizes are reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import decoding.graphs
import decoding.runner
from decoding.core import ModelLoadError
from decoding.graphs import Forward, StaticForward, buckets, divide
from decoding.host_build import load_kernels
from decoding.hosting import SpanInput
from decoding.runner import Runner
from tests.tiny import VOCAB, tiny_model

BLOCK = 4
LENGTHS = (3, 11, 26)
TABLES = ([9, 2, 14], [5, 11, 0, 7], [1, 3, 8, 20, 21, 22, 6, 4])
KERNELS: list[Literal["triton"] | bool] = [True, "triton"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not load_kernels():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(Runner, "_measure_cost", lambda _: 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products sum a row by its place in the tile, a GPU's do not: here they are rounded doubles."""

    def dot(_self: Any, a: Any, b: Any, d: Any, *_how: Any) -> TensorHandle:
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def texts() -> list[list[int]]:
    noise = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (40,), generator=noise).tolist() for _ in LENGTHS]


def hosted(arch: str = "llama", kernels: bool | Literal["triton"] = "triton", **options: Any) -> Runner:
    """A runner whose pool holds the first `LENGTHS` positions of the three texts."""
    kinds = {"layer_types": ["sliding_attention"]} if arch == "gemma2" else {}
    runner = Runner(tiny_model(arch, num_hidden_layers=1, **kinds), "m", kernels=kernels, **options)
    runner.allocate(24, BLOCK)
    runner.forward([SpanInput(text[:n], 0, table, []) for text, n, table in zip(texts(), LENGTHS, TABLES)])
    return runner


def steps(tracks: list[int], tokens: int = 1) -> list[SpanInput]:
    return [
        SpanInput(texts()[i][LENGTHS[i] : LENGTHS[i] + tokens], LENGTHS[i], TABLES[i], range(tokens)) for i in tracks
    ]


def static(runner: Runner, capture: Callable[[Forward, int], Forward] | None) -> StaticForward:
    made = StaticForward(runner._packed, buckets(32), 10, runner.device, lambda _: 64, capture)
    runner._static = made
    return made


def as_it_is(forward: Forward, _size: int) -> Forward:
    return forward


@pytest.mark.parametrize("kernels", KERNELS)
def test_padded_rows_are_the_unpadded_ones(kernels: bool | Literal["triton"]) -> None:
    """Decode rows, verify rows, and a short chunk of which one row is wanted."""
    runner = hosted(kernels=kernels)
    cases = [steps([0]), steps([0, 1, 2]), steps([2, 0], 5), [SpanInput([3, 4, 5], 11, TABLES[1], [1])]]
    want = [runner.forward(case, want_hidden=True) for case in cases]
    made = static(runner, as_it_is)
    for case, rows in zip(cases, want):
        got = runner.forward(case, want_hidden=True)
        assert got.logits.shape == rows.logits.shape
        torch.testing.assert_close(got.logits, rows.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.hidden, rows.hidden, rtol=1e-5, atol=1e-5)
    assert sorted(made.made) == [1, 4, 16]
    again = runner.forward(cases[1]).logits  # the buffers have been used for more since
    torch.testing.assert_close(again, want[1].logits, rtol=1e-5, atol=1e-5)
    assert sorted(made.made) == [1, 4, 16]
    runner.close()


@pytest.mark.parametrize("kernels", KERNELS)
def test_padding_stores_nothing(kernels: bool | Literal["triton"]) -> None:
    runner = hosted(kernels=kernels)
    before = runner.layers[0].keys.clone(), runner.layers[0].values.clone()
    made = static(runner, as_it_is)
    made.prepare(8)
    assert sorted(made.made) == [1, 2, 4, 8]
    assert torch.equal(runner.layers[0].keys, before[0])
    runner.forward(steps([0, 1], 3))  # positions 3 to 5 and 11 to 13, padded from 6 to 8 tokens
    written = {(9, 3), (2, 0), (2, 1), (0, 3), (7, 0), (7, 1)}
    changed = (runner.layers[0].keys != before[0]).any(1).any(1).nonzero().tolist()  # (block, offset)
    assert {tuple(each) for each in changed} == written
    changed = (runner.layers[0].values != before[1]).any(1).any(-1).nonzero().tolist()
    assert {tuple(each) for each in changed} == written
    runner.close()


def test_what_cannot_be_captured_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    runner = hosted(kernels=True)
    want = [runner.forward(step).logits for step in (steps([0]), steps([0, 1]))]

    def refuse(_forward: Forward, _size: int) -> Forward:
        raise RuntimeError("operation not permitted when stream is capturing")

    made = static(runner, refuse)
    with caplog.at_level(logging.WARNING, "decoding.graphs"):
        got = [runner.forward(step).logits for step in (steps([0]), steps([0, 1]))]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not made.quick
    assert list(made.made) == [1]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    runner.close()


def test_what_does_not_fit_the_buffers_runs_as_it_is() -> None:
    runner = hosted(kernels=True)
    made = static(runner, as_it_is)
    runner.forward([SpanInput([5] * 33, 0, [*TABLES[2], 12], range(33))])  # more tokens
    runner.forward([SpanInput([5], 43, [*TABLES[2], 12, 13, 15], [0])])  # more blocks
    runner.forward([SpanInput([5] * 20, 0, TABLES[2], [19])])  # prefill: the head would be applied to every token
    assert not made.made
    runner.close()


def test_a_new_pool_takes_new_buffers() -> None:
    runner = hosted(kernels=True, batch_invariant=True)
    before = runner._static
    runner.allocate(24, BLOCK)
    assert runner._static is not before
    runner.release()
    assert runner._static is None
    runner.close()


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_row_has_the_same_bits_in_every_batch(
    kernels: bool | Literal["triton"], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, beside others, as one of several verified rows, and at the end of a prompt; with a window too."""
    monkeypatch.setattr(decoding.graphs, "INVARIANT_TOKENS", 16)
    monkeypatch.setattr(decoding.runner, "INVARIANT_TOKENS", 16)
    runner = hosted(arch, kernels, batch_invariant=True)
    alone = [runner.forward(steps([i])).logits[0] for i in range(3)]
    together = runner.forward(steps([2, 0, 1])).logits
    assert torch.equal(together, torch.stack([alone[2], alone[0], alone[1]]))
    verified = runner.forward(steps([1, 2], 4)).logits
    assert torch.equal(verified[0], alone[1])
    assert torch.equal(verified[4], alone[2])
    neighbour = SpanInput([1] * 13, 0, [10, 12, 13, 15], [])
    prompt = runner.forward([neighbour, SpanInput(texts()[2][:27], 0, TABLES[2], [26])])
    assert torch.equal(prompt.logits[0], alone[2])
    runner.close()


def test_rows_of_adapters_have_the_same_bits_too() -> None:
    runner = hosted(kernels=True, batch_invariant=True)
    with torch.inference_mode(), runner.loras.probe(runner._like) as adapter:
        adapted = [replace(step, adapter=adapter) for step in steps([0, 1, 2])]
        alone = [runner.forward([step]).logits[0] for step in adapted]
        plain = runner.forward(steps([1])).logits[0]
        together = runner.forward([adapted[2], steps([1])[0], adapted[0]]).logits
    assert torch.equal(together, torch.stack([alone[2], plain, alone[0]]))
    assert not torch.equal(plain, alone[1])
    runner.close()


def test_the_bits_do_depend_on_the_batch_otherwise() -> None:
    """Else the test above could not fail."""
    runner = hosted(kernels=True)
    alone = runner.forward(steps([1])).logits[0]
    neighbour = SpanInput([1] * 60, 0, range(9, 24), [])
    assert not torch.equal(runner.forward([*steps([1]), neighbour]).logits[0], alone)
    runner.close()


def test_invariant_rows_need_kernels() -> None:
    with pytest.raises(ModelLoadError, match="need kernels"):
        Runner(tiny_model("llama", num_hidden_layers=1), "m", kernels=False, batch_invariant=True)


def test_spans_are_cut_into_forwards_of_one_size() -> None:
    spans = [SpanInput(range(5), 2, [0, 1], [0, 4]), SpanInput(range(9), 0, [2], [3, 8]), SpanInput([7], 0, [3], [0])]
    parts = list(divide(spans, 6))
    assert [[len(s.token_ids) for s in part] for part in parts] == [[5, 1], [6], [2, 1]]
    assert [[list(s.rows) for s in part] for part in parts] == [[[0, 4], []], [[2]], [[1], [0]]]
    assert [[s.start for s in part] for part in parts] == [[2, 0], [1], [7, 0]]
    assert [list(s.token_ids) for part in parts for s in part][1:3] == [[0], [1, 2, 3, 4, 5, 6]]


def test_sizes_are_powers_of_two_then_multiples_of_16() -> None:
    assert buckets(64) == (1, 2, 4, 8, 16, 32, 48, 64)
    assert buckets(3) == (1, 2)
