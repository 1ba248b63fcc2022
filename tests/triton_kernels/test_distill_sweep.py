"""Losses chunk by chunk in torch against training's own on whole logits, in fp64: values, gradients, and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from tests.triton_kernels.shapes import Shapes
from tests.triton_kernels.test_distill_loss import CASES, NAMES, Given, each_loss, material
from training import losses
from triton_kernels import distill_sweep as module
from triton_kernels.distill_sweep import TargetHead, chunked_cross_entropy, chunked_distill_loss

Learned = list[torch.Tensor]


def doubles(n: int, d: int, v: int) -> Given:
    hidden, weight, bias, target, mask = (
        x if x is None or x.dtype == torch.bool else x.double() for x in material(n, d, v)
    )
    assert hidden is not None
    assert weight is not None
    assert target is not None
    assert mask is not None
    return hidden, weight, bias, target, mask


def learned(call: Callable[..., torch.Tensor], *leaves: torch.Tensor | None) -> Learned:
    """The loss, and its gradients for the leaves."""
    mine = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    loss = call(*mine)
    (loss * 3).backward()
    return [loss.detach(), *(x.grad / 3 for x in mine if x is not None and x.grad is not None)]


def whole(loss: losses.Distillation, target: torch.Tensor, mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    def call(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return loss(target[mask], torch.nn.functional.linear(h, w, b)[mask]).sum() / mask.sum().clamp(min=1)

    return call


def swept(function: Callable[..., torch.Tensor], *rest: Any, **options: Any) -> Callable[..., torch.Tensor]:
    def call(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return function(h, w, b, *rest, **options)

    return call


@each_loss
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("n", "chunk"), [(1, 1), (7, 3), (6, 3), (7, 64)])
def test_values_and_gradients_are_those_of_whole_logits(
    kind: str, options: dict[str, Any], loss: losses.Distillation, biased: bool, n: int, chunk: int
) -> None:
    hidden, weight, bias, target, mask = doubles(n, 5, 61)
    bias = bias if biased else None
    want = learned(whole(loss, target, mask), hidden, weight, bias)
    got = learned(swept(chunked_distill_loss, target, kind, mask=mask, chunk=chunk, **options), hidden, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@each_loss
@pytest.mark.parametrize("biased", [True, False])
def test_a_target_behind_its_head_is_the_target(
    kind: str, options: dict[str, Any], loss: losses.Distillation, biased: bool
) -> None:
    hidden, weight, bias, _, mask = doubles(7, 5, 61)
    wide, head, other, _, _ = doubles(7, 9, 61)
    target = TargetHead(wide.flip(0), head.flip(0), other if biased else None)
    want = learned(whole(loss, target.logits(), mask), hidden, weight, bias)
    got = learned(swept(chunked_distill_loss, target, kind, mask=mask, chunk=3, **options), hidden, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@each_loss
def test_only_chunks_of_logits_are_made(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    hidden, weight, bias, _, mask = material(7, 4, 333)
    target = TargetHead(torch.randn(7, 6), torch.randn(333, 6))
    with Shapes() as shapes:
        learned(swept(chunked_distill_loss, target, kind, mask=mask, chunk=2, **options), hidden, weight, bias)
    assert (2, 333) in shapes.made
    assert all(shape[0] <= 2 for shape in shapes.made if len(shape) == 2 and shape[1] == 333)


@each_loss
def test_no_row(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    hidden, weight, bias, target, mask = doubles(3, 5, 40)
    for given, rows in ((hidden[:0], target[:0]), (hidden, target)):
        call = swept(chunked_distill_loss, rows, kind, mask=torch.zeros_like(mask[: len(given)]), **options)
        found = learned(call, given, weight, bias)
        assert len(found) == 4
        assert not any(each.any() for each in found)


@each_loss
def test_tokens_that_the_target_cannot_say(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    hidden, weight, bias, target, mask = doubles(5, 5, 61)
    target[1:, 50:] = -torch.inf
    want = learned(whole(loss, target.clamp(min=-1e4), mask), hidden, weight, bias)
    got = learned(swept(chunked_distill_loss, target, kind, mask=mask, **options), hidden, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_distributions_that_hardly_overlap() -> None:
    """lk where sum min(p, q) underflows."""
    hidden, weight = torch.eye(2).double(), torch.tensor([[2000.0, 0.0], [0.0, 900.0], [0.0, 0.0]]).double()
    target, mask = torch.tensor([[0.0, 2000.0, 0.0], [1200.0, 0.0, 3.0]]).double(), torch.ones(2, dtype=torch.bool)
    want = learned(whole(losses.lk, target, mask), hidden, weight, None)
    torch.testing.assert_close(learned(swept(chunked_distill_loss, target, "lk"), hidden, weight, None), want)


@each_loss
def test_low_precision_is_widened(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    """A logit of up to 8 in bf16 is off by 2^-6; slopes of at most 5 a row, rounded to bf16."""
    hidden, weight, _, target, mask = material(6, 5, 61, torch.bfloat16)
    want = learned(whole(loss, target.double(), mask), hidden.double(), weight.double(), None)
    got = learned(swept(chunked_distill_loss, target, kind, mask=mask, chunk=4, **options), hidden, weight, None)
    assert [each.dtype for each in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, exact in zip(got, want, strict=True):
        assert (mine.double() - exact).abs().max() <= 0.05 * max(1.0, float(exact.abs().max()))


def test_it_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import triton_kernels.distill_sweep"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(module.__file__).parent.parent)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_cross_entropy(n: int) -> None:
    hidden, weight, bias, _, _ = doubles(8, 5, 61)
    hidden, labels = hidden[:n], torch.arange(n) * 8 % 61

    def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(h, w, b)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / max(1, n)

    got = learned(swept(chunked_cross_entropy, labels, chunk=3), hidden, weight, bias)
    torch.testing.assert_close(got, learned(plain, hidden, weight, bias), rtol=1e-10, atol=1e-12)
    with Shapes() as shapes:
        learned(swept(chunked_cross_entropy, labels, chunk=3), hidden, weight, bias)
    assert (7, 61) not in shapes.made


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, bias, target, _ = material(3, 4, 9)
    with pytest.raises(ValueError, match="no loss called"):
        chunked_distill_loss(hidden, weight, bias, target, "mse")
    with pytest.raises(ValueError, match=r"target.*do not fit"):
        chunked_distill_loss(hidden, weight, bias, TargetHead(hidden, weight[:8]), "kl")
    with pytest.raises(ValueError, match=r"target.*do not fit"):
        chunked_distill_loss(hidden, weight, bias, TargetHead(hidden[:, :3], weight), "kl")
    with pytest.raises(ValueError, match="labels"):
        chunked_cross_entropy(hidden, weight, bias, torch.zeros(4, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kl", "made.add(start, logits", "made.add(0, logits"),
        ("kl", "return divergence, log_q.exp().sub_(p)", "return divergence, log_q.exp()"),
        ("tvd", "d.sub_(mean)", "d"),
        ("tvd++", "share = (q * (d > 0))", "share = (q * d)"),
        ("tvd++ by position", "slope.mul_(by[:, None])", "slope.mul_(1)"),
        ("lk", ".mul_(tied).sub_(s)", ".sub_(s)"),
        ("lk mixed", "share[:] = 1 - distance", "share[:] = distance"),
        ("lk mixed", "sweep(slopes=False)", "pass"),
        ("kl", "loss.masked_fill_(left_out, 0.0)", "pass"),
        ("kl", "slope.masked_fill_(left_out[:, None], 0.0)", "slope"),
        ("kl", "logits_of(buffer, hidden[part], weight, bias)\n", "logits_of(buffer, hidden[part], weight, None)\n"),
    ],
)
def test_broken_sweeps_are_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    kind, options, loss = CASES[NAMES.index(name)]
    hidden, weight, bias, _, mask = doubles(7, 5, 61)
    head = (hidden.flip(0), weight.flip(0) + 1, bias)
    want = learned(whole(loss, TargetHead(*head).logits(), mask), hidden, weight, bias)

    def check(which: Any) -> None:
        call = swept(which.chunked_distill_loss, which.TargetHead(*head), kind, mask=mask, chunk=3, **options)
        torch.testing.assert_close(learned(call, hidden, weight, bias), want, rtol=1e-10, atol=1e-12)

    check(module)
    with pytest.raises(AssertionError):
        check(mutated(Path(module.__file__), old, new, tmp_path))
