"""Solvers against the paper's objective written out, closed forms, and invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.host_build import load_kernels
from decoding.solvers import Fusion, Nudge, _KernelEvidence, _TorchEvidence

NONE = torch.zeros(50, dtype=torch.bool)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.exp() * (a - b)).sum(-1)


def objective(
    base: torch.Tensor, small: torch.Tensor, experts: list[torch.Tensor], expert: int, alpha: torch.Tensor
) -> torch.Tensor:
    """Fan et al. 2024 as printed: the loss per row [n] of one active expert, log-prob rows in float64."""
    fused = torch.log_softmax(base + alpha[:, None] * (experts[expert] - small), 1)
    loss = torch.zeros(len(base), dtype=torch.float64)
    for row in experts:
        loss += (kl(fused, base) - kl(row, small)) ** 2 + (kl(base, fused) - kl(small, row)) ** 2
    return loss


def rows(seed: int, n: int, count: int, width: int = 50) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, n, 1, generator=g, dtype=torch.float64) * 3
    return [
        torch.log_softmax(torch.randn(n, width, generator=g, dtype=torch.float64) * scale[i], 1) for i in range(count)
    ]


def grid(
    base: torch.Tensor, small: torch.Tensor, experts: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    best = torch.full((len(base),), torch.inf, dtype=torch.float64)
    alpha, expert = torch.zeros_like(best), torch.zeros(len(base), dtype=torch.int64)
    for step in range(21):
        for i in range(len(experts)):
            a = torch.full_like(best, step * 0.1)
            loss = objective(base, small, experts, i, a)
            better = loss < best
            best, alpha = torch.where(better, loss, best), torch.where(better, a, alpha)
            expert = torch.where(better, i, expert)
    return alpha, expert, best


@pytest.mark.parametrize("count", [1, 2, 3])
def test_paper_mode_is_the_grid(count: int) -> None:
    base, small, *experts = rows(count, 200, 2 + count)
    alpha, expert, best = grid(base, small, experts)
    got_alpha, got_expert, _ = Fusion(fast=False).solve(base, small, experts)
    same = (got_alpha - alpha).abs() < 1e-9
    assert same.float().mean() > 0.99  # equal losses to the last bit may be told apart by rounding
    for i in range(count):
        mine = got_expert == i
        losses = objective(base, small, experts, i, got_alpha)[mine]
        assert torch.allclose(losses, best[mine], rtol=1e-9)
    assert ((got_expert == expert) | ~same | (alpha == 0)).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fast_is_never_above_the_grid(count: int, dtype: torch.dtype) -> None:
    base, small, *experts = rows(10 + count, 1000, 2 + count)
    cast = [row.to(dtype) for row in (base, small, *experts)]
    alpha, expert, _ = Fusion(fast=True).solve(cast[0], cast[1], cast[2:])
    alpha = alpha.double()
    _, _, best = grid(base, small, experts)
    loss = torch.stack([objective(base, small, experts, i, alpha) for i in range(count)]).gather(0, expert[None])[0]
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    assert (loss <= best * (1 + slack) + slack**2).all()
    assert (loss < best * 0.999).float().mean() > 0.5  # and it usually is better
    assert (alpha >= 0).all()
    assert (alpha <= 2).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.05, 1.0))
def test_fast_is_never_above_any_grid(seed: int, count: int, step: float) -> None:
    base, small, *experts = rows(seed, 8, 2 + count, width=7)
    paper = Fusion(False, 2.0, step).solve(base, small, experts)
    fast = Fusion(True, 2.0, step).solve(base, small, experts)
    assert (fast[2] <= paper[2]).all()


@pytest.mark.parametrize("width", [1, 15, 17, 4096, 4097, 9001])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_the_kernels_equal_their_specification(width: int, scale: float) -> None:
    g = torch.Generator().manual_seed(width)
    base, small, *experts = (torch.log_softmax(torch.randn(3, width, generator=g) * scale, 1) for _ in range(4))
    kernel = _KernelEvidence.of(base, small, experts)
    if kernel is None:
        assert not load_kernels()
        return
    exact = _TorchEvidence(base.double(), small.double(), [row.double() for row in experts])
    for got, want in zip(kernel.targets(), exact.targets(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * scale)
    start = torch.tensor([[0.0, 0.3], [0.1, 1.9], [0.5, 0.0]])
    for i in range(2):
        got = kernel.divergences(i, start, 0.05, 9)
        for mine, want in zip(got, exact.divergences(i, start.double(), 0.05, 9), strict=True):
            torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=2e-5 * scale)
        start_of_one = start.masked_fill(torch.tensor([True, False]), torch.nan)  # nan: not to be computed
        for mine, whole in zip(kernel.divergences(i, start_of_one, 0.05, 9), got, strict=True):
            assert mine[:, :9].isnan().all()
            assert torch.equal(mine[:, 9:], whole[:, 9:])


def test_closed_forms() -> None:
    base, small, expert = rows(3, 20, 3)
    alpha, _, loss = Fusion().solve(base, base, [expert])
    assert torch.allclose(alpha, torch.ones_like(alpha))  # small = large: the expert itself, and no loss
    assert loss.max() < 1e-20
    alpha, _, _ = Fusion().solve(base, small, [small])  # an expert that changes nothing
    assert (alpha == 0).all()
    uniform = torch.full_like(base, -3.912)
    alpha, _, _ = Fusion().solve(base, small, [small + 0 * uniform])
    assert (alpha == 0).all()


def test_fusion_leaves_out_tokens_that_some_model_cannot_say() -> None:
    base, small, expert = (row.float() for row in rows(4, 20, 3))
    wanted = Fusion().solve(
        *(torch.log_softmax(r[:, :40], 1) for r in (base, small)), [torch.log_softmax(expert[:, :40], 1)]
    )
    base[:, 40:], small[:, 45:], expert[:, 40:42] = -torch.inf, -torch.inf, -torch.inf
    got = Fusion().solve(base, small, [expert])
    assert torch.allclose(got[0], wanted[0], atol=1e-3)
    assert torch.isfinite(got[2]).all()


def test_nudging_switches_below_the_threshold_and_back_at_a_words_end() -> None:
    starts = torch.tensor([False, True, False])
    sure, unsure = torch.tensor([0.9, 0.05, 0.05]).log(), torch.tensor([0.35, 0.33, 0.32]).log()
    within, at_end = torch.tensor([0.1, 0.1, 0.8]).log(), torch.tensor([0.1, 0.8, 0.1]).log()
    base = torch.stack([sure, unsure, sure, sure, unsure])
    nudger = torch.stack([within, within, within, at_end, at_end])
    states = [None, None, True, True, True]
    weights = Nudge(0.4).weights([base, nudger], states, starts)
    assert weights[:, 1].tolist() == [0, 1, 1, 0, 1]
    assert Nudge(0.4).advance(None, [0.0, 1.0], 7) is True
    assert Nudge(0.4).advance(True, [1.0, 0.0], 7) is False
