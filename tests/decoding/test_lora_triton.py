"""Adapters by Triton's kernel, interpreted: the same logits as by torch's products, for any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from decoding.adapters import Adapter, Lora
from decoding.hosting import SpanInput
from decoding.lora import FEW_TOKENS, Loras
from decoding.runner import Runner
from tests.tiny import tiny_model

RANKS = {"narrow": 1, "wide": 17, "some": 4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapter(loras: Loras, name: str, seed: int = 0) -> Adapter:
    """On every layer, "some" on every other one; one matrix lies where no vector could be loaded from."""
    noise, rank = torch.Generator().manual_seed(seed + len(name)), RANKS[name]
    modules = {}
    for number, (layer, (size, width)) in enumerate(loras.sizes().items()):
        if name != "some" or number % 2:
            flat = torch.randn(rank * size + 1, generator=noise)[1:] * size**-0.5
            modules[layer] = Lora(flat.view(rank, size), torch.randn(rank, width, generator=noise) * 0.3)
    return Adapter(modules, "")


def make_runner(names: tuple[str, ...] = tuple(RANKS), triton: bool = True) -> Runner:
    """A model whose attention is torch's: only the adapters differ."""
    runner = Runner(tiny_model("llama", num_hidden_layers=1), "m", kernels=False)
    if triton:
        runner.loras = Loras(runner.model, runner.model.get_output_embeddings(), "triton")
    runner.allocate(32, 16)
    for name in names:
        runner.loras.add(name, adapter(runner.loras, name))
    return runner


def logits(runner: Runner, lengths: dict[str | None, int]) -> torch.Tensor:
    spans = [SpanInput([7 * i % 96 for i in range(n)], 0, [4 * at + i for i in range(4)], range(n), name)
             for at, (name, n) in enumerate(lengths.items())]  # fmt: skip
    return runner.forward(spans).logits


FEW: dict[str | None, int] = {"wide": 1, None: 3, "narrow": 2, "some": 5}
MANY: dict[str | None, int] = {"narrow": 9, "some": 3, None: 5, "wide": 50}


def test_few_tokens_and_many_are_what_torch_makes_of_them() -> None:
    runner, plain = make_runner(), make_runner(triton=False)
    assert sum(FEW.values()) <= FEW_TOKENS < sum(MANY.values())
    for lengths in (FEW, MANY):
        got, want = logits(runner, lengths), logits(plain, lengths)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for name in RANKS:  # each adapter matters, or the comparison would show nothing
        assert (logits(runner, {name: 3}) - logits(runner, {None: 3})).abs().max() > 0.05
    runner.close()
    plain.close()


def test_adapters_come_and_go_under_what_was_captured() -> None:
    runner = make_runner(("some", "wide"))
    key, want = runner.loras.capture_key(), logits(runner, {"wide": 3})
    runner.loras.add("narrow", adapter(runner.loras, "narrow"))
    runner.loras.remove("some")
    assert runner.loras.capture_key() == key, "the table stays where it is"
    assert torch.equal(logits(runner, {"wide": 3}), want)
    runner.loras.add("wide", adapter(runner.loras, "wide", seed=5))
    assert runner.loras.capture_key() == key
    assert (logits(runner, {"wide": 3}) - want).abs().max() > 0.05
    for i in range(9):
        runner.loras.add(f"{i}", adapter(runner.loras, "some"))
    assert runner.loras.capture_key() != key, "more adapters than the table has places for"
    plain = make_runner(("some",), triton=False)
    torch.testing.assert_close(logits(runner, {"8": 3}), logits(plain, {"some": 3}), atol=1e-5, rtol=1e-5)
    for name in list(runner.loras.adapters):
        runner.loras.remove(name)
    assert runner.loras.bytes() == 0
    runner.close()
    plain.close()


def test_a_wider_adapter_changes_what_launches_are_made_for() -> None:
    runner = make_runner(("some",))
    key = runner.loras.capture_key()
    runner.loras.add("wide", adapter(runner.loras, "wide"))
    assert runner.loras.capture_key() != key
    runner.close()
