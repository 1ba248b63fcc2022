"""Distillation losses: the kernel in the interpreter against training's own losses in fp64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from tests.triton_kernels.shapes import Shapes
from training import losses
from triton_kernels import distill_loss as module
from triton_kernels.distill_loss import TargetHead, distill_loss

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
CASES: list[tuple[str, dict[str, Any], losses.Distillation]] = [
    ("kl", {}, losses.kl),
    ("tvd", {}, losses.tvd),
    ("tvd++", {}, losses.tvd_plus),
    ("tvd++", {"per_position": True, "floor": 0.2}, partial(losses.tvd_plus, per_position=True, floor=0.2)),
    ("lk", {}, losses.lk),
    ("lk", {"decay": 3.0}, partial(losses.lk_mixed, decay=3.0)),
]
NAMES = ["kl", "tvd", "tvd++", "tvd++ by position", "lk", "lk mixed"]
each_loss = pytest.mark.parametrize(("kind", "options", "loss"), CASES, ids=NAMES)


def material(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> Given:
    """hidden, weight, bias, target and a mask without every third row, if there are that many."""
    g = torch.Generator().manual_seed(n * 1000 + v)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    bias, target = torch.randn(v, generator=g), torch.randn(n, v, generator=g) * 2
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target, torch.arange(n) % 3 != 1


def learned(
    call: Callable[..., torch.Tensor], given: Given, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and its gradients for hidden, weight and bias, in fp64."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in given[:3]]
    loss = call(*leaves, *given[3:])
    (loss * 3).backward()
    assert all(x is None or (x.grad is not None and x.grad.dtype == x.dtype) for x in leaves)
    return loss.detach().double(), [x.grad.double() / 3 for x in leaves if x is not None and x.grad is not None]


def check(call: Callable[..., torch.Tensor], loss: losses.Distillation, given: Given) -> None:
    """`call` is the mean of training's `loss` over the mask, in value and gradients.

    A logit is a product of D terms plus a bias, rounded to the dtype; so is what is read from it. Slopes sum to at
    most 2 in magnitude for a row of kl or tvd; `steep` is what the others multiply: 1 / sigma up to 5, 1 / A likewise.
    """

    def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = torch.nn.functional.linear(h, w, b)
        return loss(t.double()[mask], q[mask]).sum() / mask.sum().clamp(min=1)

    want, want_slopes = learned(plain, given, torch.float64)
    got, slopes = learned(call, given)
    hidden, weight, _, target, mask = given
    size = float(2 + target[torch.isfinite(target)].abs().max() + (hidden.float() @ weight.float().t()).abs().max())
    steep, few = 5.0, 4.0 if hidden.dtype == torch.float32 else 1.0
    slack = few * torch.finfo(hidden.dtype).eps * size * steep
    assert abs(got - want) <= slack, (got, want)
    rows = max(1, int(mask.sum()))
    scales = (float(weight.abs().max()) / rows, float(hidden.abs().max()), 1.0)
    for mine, exact, scale in zip(slopes, want_slopes, scales, strict=False):
        assert (mine - exact).abs().max() <= slack * scale, (mine, exact)


def run(kind: str, **options: Any) -> Callable[..., torch.Tensor]:
    def call(*given: Any) -> torch.Tensor:
        return distill_loss(*given[:4], kind, mask=given[4], kernel=True, **options)

    return call


@each_loss
@pytest.mark.parametrize(("n", "d", "v", "chunk"), [(1, 5, 1, 1), (1, 5, 7, 3), (5, 5, 301, 3), (4, 3, 4999, 4)])
def test_values_and_gradients_are_those_of_the_plain_formula(
    kind: str, options: dict[str, Any], loss: losses.Distillation, n: int, d: int, v: int, chunk: int
) -> None:
    check(run(kind, chunk=chunk, **options), loss, material(n, d, v))


@each_loss
def test_low_precision(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    given = material(4, 6, 129, torch.bfloat16)
    check(run(kind, chunk=2, **options), loss, (*given[:3], given[3].bfloat16(), given[4]))


@each_loss
def test_the_reference_is_trainings(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    hidden, weight, bias, target, mask = (x.double() if x.is_floating_point() else x for x in material(7, 4, 60))

    def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, t: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return loss(t[m], torch.nn.functional.linear(h, w, b)[m]).sum() / m.sum()

    def reference(*given: Any) -> torch.Tensor:
        return distill_loss(*given[:4], kind, mask=given[4], kernel=False, **options)

    want, want_slopes = learned(plain, (hidden, weight, bias, target, mask))
    got, slopes = learned(reference, (hidden, weight, bias, target, mask))
    torch.testing.assert_close([got, *slopes], [want, *want_slopes])


@each_loss
def test_a_mask_without_rows(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    given = material(3, 5, 40)
    for kernel in (True, False):
        leaves = [x.clone().requires_grad_() for x in given[:3] if x is not None]
        none = torch.zeros(3, dtype=torch.bool)
        found = distill_loss(*leaves, given[3], kind, mask=none, kernel=kernel, **options)  # type: ignore[misc]
        found.backward()
        assert found.item() == 0
        assert all(x.grad is not None and not x.grad.any() for x in leaves)


@each_loss
def test_log_probs_offsets_strides_and_tokens_that_the_target_cannot_say(
    kind: str, options: dict[str, Any], loss: losses.Distillation
) -> None:
    hidden, weight, _, target, mask = material(4, 5, 200)
    target[1:, 190:] = -torch.inf

    def exact(t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """-inf as far below as fp64 can say: training's KL has 0 * inf there."""
        return loss(t.clamp(min=-1e4), q)

    padded = torch.cat([target, torch.randn(4, 8)], 1)[:, :200]
    for each in (target, target + 50, torch.log_softmax(target, 1), padded, target.t().contiguous().t()):
        check(run(kind, **options), exact, (hidden, weight, None, each, mask))


@each_loss
@pytest.mark.parametrize("kernel", [True, False])
def test_a_target_behind_its_head(kind: str, options: dict[str, Any], loss: losses.Distillation, kernel: bool) -> None:
    hidden, weight, bias, _, mask = material(5, 4, 301)
    wide, head, other, _, _ = material(5, 6, 301)

    def call(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, _: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        target = TargetHead(wide, head, other)
        return distill_loss(h, w, b, target, kind, mask=m, chunk=2, kernel=kernel, **options)

    check(call, loss, (hidden, weight, bias, torch.nn.functional.linear(wide, head, other), mask))


def test_distributions_that_hardly_overlap() -> None:
    """lk where sum min(p, q) underflows in fp32; its gradient is then still that of the formula."""
    hidden, weight = torch.eye(2), torch.tensor([[200.0, 0.0], [0.0, 90.0], [0.0, 0.0]])
    target = torch.tensor([[0.0, 200.0, 0.0], [120.0, 0.0, 3.0]])
    given: Given = (hidden, weight, None, target, torch.ones(2, dtype=torch.bool))
    check(run("lk"), losses.lk, given)


@each_loss
def test_a_drafter_that_is_its_target(kind: str, options: dict[str, Any], loss: losses.Distillation) -> None:
    hidden, weight, bias, _, mask = material(4, 5, 200)
    target = torch.nn.functional.linear(hidden, weight, bias)
    found, slopes = learned(run(kind, **options), (hidden, weight, bias, target, mask))
    assert abs(found) < 1e-5
    # Half of the mass is below the target where all ties: no slope.
    assert all(slope.abs().max() < 1e-5 for slope in slopes)


def test_only_what_is_wanted_is_computed() -> None:
    hidden, weight, bias, target, mask = material(5, 4, 333)
    with torch.no_grad():
        assert not distill_loss(hidden.requires_grad_(), weight, bias, target, "kl", kernel=True).requires_grad
    with Shapes() as shapes:
        found = distill_loss(hidden, weight, bias, target, "kl", mask=mask, chunk=2, kernel=True)
        found.backward(retain_graph=True)
    assert (2, 333) in shapes.made
    assert (5, 333) not in shapes.made  # never the whole logits
    assert (333, 4) not in shapes.made  # and no gradient for a frozen head
    assert weight.grad is None
    assert hidden.grad is not None
    with Shapes() as shapes:
        behind = TargetHead(torch.randn(5, 6), torch.randn(333, 6))
        distill_loss(hidden, weight, bias, behind, "kl", mask=mask, chunk=2, kernel=True)
    assert (5, 333) not in shapes.made
    once = hidden.grad.clone()
    found.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, bias, target, _ = material(3, 4, 9)
    with pytest.raises(ValueError, match="no loss called"):
        distill_loss(hidden, weight, bias, target, "mse")
    with pytest.raises(ValueError, match="do not fit"):
        distill_loss(hidden, weight, bias, target[:, :8], "kl")
    with pytest.raises(ValueError, match="do not fit"):
        distill_loss(hidden, weight[:, :3], bias, target, "kl")
    with pytest.raises(ValueError, match="at least one row"):
        distill_loss(hidden, weight, bias, target, "kl", chunk=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kl", "cross = cross * scale +", "cross = cross +"),
        ("kl", "slope = q - tl.exp(log_p)", "slope = q"),
        ("tvd", "q * tied - s", "q - s"),
        ("tvd++", "share += tl.sum(tl.where(log_q < log_p, q, 0.0), 0)", "share += tl.sum(q, 0)"),
        ("tvd++ by position", "scale = 1 / tl.maximum", "scale = tl.maximum"),
        ("lk", "below = below * scale +", "below = below +"),
        ("lk mixed", "scale = 1 - w", "scale = w"),
        ("lk mixed", "share = 1 - loss", "share = loss"),
        ("kl", "tl.load(mask_ptr + row) == 0", "tl.load(mask_ptr + row) == 2"),
    ],
)
def test_broken_kernels_are_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    kind, options, loss = CASES[NAMES.index(name)]
    broken = mutated(Path(module.__file__), old, new, tmp_path).distill_loss
    hidden, weight, bias, target, mask = material(6, 3, 4500)
    assert bias is not None
    rise = 4 * (torch.arange(4500) > 4200)  # the second block holds the largest
    given: Given = (hidden, weight, bias + rise, target + rise, mask)
    check(run(kind, chunk=3, **options), loss, given)

    def call(*args: Any) -> torch.Tensor:
        found: torch.Tensor = broken(*args[:4], kind, mask=args[4], chunk=3, kernel=True, **options)
        return found

    with pytest.raises(AssertionError):
        check(call, loss, given)
