"""Dynamic fusion's weights: the kernels in the interpreter and the reference against the solver in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from decoding.solvers import Fusion
from tests.triton_kernels.mutate import mutated
from triton_kernels import fusion_weights as module
from triton_kernels.fusion_weights import fusion_weights, fusion_weights_reference

Weights = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
EPS = torch.finfo(torch.float32).eps


def rows(seed: int, n: int, count: int, width: int, scale: float = 3.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.log_softmax(torch.randn(n, width, generator=g) * scale, 1) for _ in range(count)]


def check(
    solve: Weights,
    given: Sequence[torch.Tensor],
    refine: bool,
    step: float = 0.1,
) -> None:
    """`solve` finds what the solver finds in fp64, of the same rows.

    f and g are sums of log-probs up to `size`, of about 20 roundings each (a tree over 2048 tokens, exponents, logs)
    and grow with alpha up to 2; so the root of the loss is known to `slack`. Points whose losses differ by no more
    cannot be told apart; there the loss found must be as good.
    """
    base, small, *experts = (row.double() for row in given)
    alpha, expert, loss = solve(given[0], given[1], given[2:], 2.0, step, refine, kernel=True)
    want_alpha, want_expert, want = Fusion(refine, 2.0, step).solve(base, small, experts)
    finite = torch.stack([base, small, *experts]).masked_fill(~torch.isfinite(torch.stack(list(given))), 0.0)
    size = float((finite - finite.amax(-1, keepdim=True)).abs().max())
    slack = 2 * 20 * EPS * size
    assert loss.dtype == given[0].dtype
    assert ((loss.double().sqrt() - want.sqrt()).abs() <= slack).all(), (loss, want)
    same = (expert == want_expert) & ((alpha - want_alpha).abs() <= 4 * EPS)
    # The solver's own loss where the answer differs: as good, within what fp32 knows.
    for row in torch.nonzero(~same)[:, 0].tolist():
        one = experts[int(expert[row])][row : row + 1]
        again = exact_loss(base[row : row + 1], small[row : row + 1], [e[row : row + 1] for e in experts], one, alpha)
        assert abs(float(again[row]) ** 0.5 - float(want[row]) ** 0.5) <= slack, (row, alpha[row], want_alpha[row])


def exact_loss(
    base: torch.Tensor, small: torch.Tensor, experts: list[torch.Tensor], one: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """The loss of one row and expert at each of `alpha`, with what cannot be said left out, in fp64."""
    usable = torch.isfinite(torch.cat([base, small, *experts])).all(0)
    p, q, t, *all_experts = (torch.log_softmax(row[:, usable], 1) for row in (base, small, one, *experts))
    fused = torch.log_softmax(p + alpha.double()[:, None] * (t - q), 1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1)

    f = torch.stack([kl(e, q) for e in all_experts]).mean()
    g = torch.stack([kl(q, e) for e in all_experts]).mean()
    return (kl(fused, p) - f) ** 2 + (kl(p, fused) - g) ** 2


@pytest.mark.parametrize(("width", "count"), [(1, 1), (7, 3), (300, 1), (300, 3), (1025, 3), (2100, 1)])
@pytest.mark.parametrize("refine", [False, True])
def test_the_kernels_solve_as_the_solver_does(width: int, count: int, refine: bool) -> None:
    check(fusion_weights, rows(width, 2, 2 + count, width), refine)


@pytest.mark.parametrize("refine", [False, True])
def test_the_reference_is_the_solver(refine: bool) -> None:
    base, small, *experts = (row.double() for row in rows(1, 40, 4, 60))
    found = fusion_weights_reference(base, small, experts, 2.0, 0.1, refine)
    for mine, want in zip(found, Fusion(refine).solve(base, small, experts), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 40.0])
def test_rows_that_nearly_agree_and_rows_far_apart(scale: float) -> None:
    check(fusion_weights, rows(5, 2, 3, 1500, scale), refine=True)


def test_a_coarse_grid_and_one_point() -> None:
    given = rows(6, 2, 3, 100)
    check(fusion_weights, given, refine=True, step=2.0)  # two points, one cell
    check(fusion_weights, given, refine=True, step=0.5)
    alpha, _, _ = fusion_weights(given[0], given[1], given[2:], 0.0, 0.1, True, kernel=True)
    assert (alpha == 0).all()


def test_closed_forms() -> None:
    base, small, expert = rows(7, 3, 3, 1100)
    alpha, chosen, loss = fusion_weights(base, base, [expert], 2.0, 0.1, True, kernel=True)
    assert torch.equal(alpha, torch.ones(3))  # small = base: the expert itself, and no loss
    assert loss.max() < (20 * EPS * 40) ** 2
    assert (chosen == 0).all()
    alpha, chosen, _ = fusion_weights(base, small, [small, small], 2.0, 0.1, True, kernel=True)
    assert torch.equal(alpha, torch.zeros(3))  # experts that change nothing
    assert (chosen == 0).all()  # ties: the earlier


@pytest.mark.parametrize("refine", [False, True])
def test_tokens_that_some_row_cannot_say_are_left_out(refine: bool) -> None:
    given = rows(8, 3, 3, 2100)
    given[0][:, 2060:], given[1][:, 2048:2070], given[2][:, 7] = -torch.inf, -torch.inf, -torch.inf
    given[2][0, 3], given[2][1, :1100], given[0][2, 9] = torch.nan, -torch.inf, torch.inf
    check(fusion_weights, given, refine)
    none = [row.clone() for row in given]
    none[2][1] = torch.nan  # a row without any token: no answer, and no harm to the others
    alpha, expert, _ = fusion_weights(none[0], none[1], none[2:], 2.0, 0.1, refine, kernel=True)
    want = fusion_weights(given[0], given[1], given[2:], 2.0, 0.1, refine, kernel=True)
    assert alpha[1] == expert[1] == 0
    for row in (0, 2):
        assert (alpha[row], expert[row]) == (want[0][row], want[1][row])


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_offsets_of_raw_logits_change_nothing(shift: float) -> None:
    given = rows(9, 2, 3, 1000)
    want = fusion_weights(given[0], given[1], given[2:], 2.0, 0.1, False, kernel=True)
    for i in range(3):
        moved = [row + shift if j == i else row for j, row in enumerate(given)]
        found = fusion_weights(moved[0], moved[1], moved[2:], 2.0, 0.1, False, kernel=True)
        assert torch.equal(found[0], want[0])
        assert torch.equal(found[1], want[1])
    check(fusion_weights, [row + shift for row in given], refine=True)


def test_strided_rows_low_precision_and_no_rows() -> None:
    wide = rows(10, 4, 3, 700)
    check(fusion_weights, [row[::2, :333] for row in wide], refine=True)
    check(fusion_weights, [row[:1].t().contiguous().t() for row in wide], refine=False)
    low = [row.bfloat16() for row in wide]
    alpha, _, _ = fusion_weights(low[0], low[1], low[2:], 2.0, 0.1, False, kernel=True)
    want, _, _ = fusion_weights(*(row.float() for row in low[:2]), [low[2].float()], 2.0, 0.1, False, kernel=True)
    assert torch.equal(alpha, want.bfloat16())
    alpha, expert, loss = fusion_weights(*(row[:0] for row in wide[:2]), [wide[2][:0]], 2.0, 0.1, True, kernel=True)
    assert alpha.shape == expert.shape == loss.shape == (0,)
    assert expert.dtype == torch.int64


def test_the_solver_asks_the_kernels_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    base, small, *experts = rows(11, 3, 4, 200)
    asked: list[bool] = []

    def spy(*args: object, kernel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        asked.append(kernel)
        return fusion_weights(*args, kernel=kernel)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fusion_weights", spy)
    weights = Fusion(kernel=True).weights([base, small, *experts], [None] * 3, torch.zeros(200, dtype=torch.bool))
    assert asked == [True]
    want = Fusion().weights([base, small, *experts], [None] * 3, torch.zeros(200, dtype=torch.bool))
    assert asked == [True]
    torch.testing.assert_close(weights, want)


def test_rows_that_do_not_fit_are_refused() -> None:
    base, small, expert = rows(12, 2, 3, 10)
    with pytest.raises(ValueError, match="one shape"):
        fusion_weights(base, small, [expert[:, :9]], 2.0, 0.1, True)
    with pytest.raises(ValueError, match="at least one expert"):
        fusion_weights(base, small, [], 2.0, 0.1, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(usable, base - base_top, -1e30)", "tl.where(usable, base, -1e30)"),
        ("tl.where(usable, small - small_top, -1e30)", "small - small_top"),
        ("tl.sum(q * d, 0))", "tl.sum(p * d, 0))"),
        ("expert - small - tl.load(centre_ptr + row * experts + i)", "expert - small"),
        ("tl.sum(tilted * d[None, :], 1)", "tl.sum(tilted, 1)"),
        ("p * offset", "offset"),
        ("alpha * left", "alpha * centre"),
        ("alpha_ptr + row * alpha_stride + i", "alpha_ptr + i"),
        ("totals_ptr, at + 2 + i, inside", "totals_ptr, at + 2, inside"),
        ("triton.cdiv(width, _TILE)", "width // _TILE"),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutated(Path(module.__file__), old, new, tmp_path).fusion_weights
    given = rows(13, 2, 4, 2100)
    given[3][:, 100:200] = -torch.inf
    with pytest.raises(AssertionError):
        check(broken, given, refine=True)


def test_the_kernels_pass_what_broken_ones_fail() -> None:
    given = rows(13, 2, 4, 2100)
    given[3][:, 100:200] = -torch.inf
    check(fusion_weights, given, refine=True)
