"""Cutoffs: the kernel in the interpreter against sorting, the engine's own truncation and the formula in fp64."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from decoding.core import Sampling
from decoding.truncate import keep_sorted
from tests.triton_kernels.mutate import mutated
from triton_kernels import cutoffs as subject
from triton_kernels.cutoffs import Cutoffs, cutoffs, cutoffs_reference

Tensor = torch.Tensor
Limits = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
PLAIN: Limits = (1.0, 0, 1.0, 0.0)


def limits(*rows: Limits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, k, p, m = zip(*rows)
    return torch.tensor(t), torch.tensor(k, dtype=torch.int32), torch.tensor(p), torch.tensor(m)


def kept(z: Tensor, cut: Cutoffs) -> Tensor:
    """[n, W] bool."""
    ids = torch.arange(z.shape[1])[None]
    least = cut.least[:, None]
    return torch.isfinite(z) & ((z > least) | ((z == least) & (ids <= cut.last[:, None])))


def wanted(z: Tensor, rows: list[Limits]) -> Tensor:
    """[n, W] bool: what `decoding.truncate` keeps."""
    out = []
    for row, (t, k, p, m) in zip(z, rows):
        if row.amax() == -torch.inf:
            out.append(torch.zeros_like(row, dtype=torch.bool))
        elif t == 0:
            out.append(torch.arange(len(row)) == row.argmax())
        else:
            d = (row - row.amax()) / t
            out.append(torch.isfinite(keep_sorted(d, Sampling(top_k=k, top_p=p, min_p=m))))
    return torch.stack(out)


def check(
    source: Tensor, index: Tensor, width: int, rows: list[Limits], module: ModuleType = subject, known: bool = False
) -> None:
    """known: the rows' maxima are given, but for every fourth."""
    chosen = (7 * torch.arange(len(rows)) - 1).int() % width
    chosen[1::5] = -1
    z = source[index.long(), :width].float()
    best = z.amax(1).masked_fill(torch.arange(len(rows)) % 4 == 3, torch.nan) if known else None
    cut = module.cutoffs(source, index, width, *limits(*rows), chosen, best, kernel=True)
    mask = kept(z, cut)
    assert torch.equal(mask, wanted(z, rows))
    assert torch.equal(cut.best, z.amax(1))
    assert not cut.total.isnan().any()
    for row, (t, *_), got, keep, best, token, prob in zip(
        z.double(), rows, cut.total.double(), mask, cut.best.double(), chosen, cut.prob.double()
    ):
        if not keep.any():
            assert (got, prob) == (-torch.inf, 0.0)
            continue
        exact = torch.logsumexp(((row - best) / (t or 1.0))[keep], 0)
        # A sum of fp32 terms by lanes and then as a tree: a few roundings of 6e-8 each, and those of exp.
        assert abs(float(got - exact)) < 1e-6 * max(1.0, float(exact)), (got, exact)
        want = ((row[token] - best) / (t or 1.0) - exact).exp() if token >= 0 and keep[token] else 0.0
        # Its exponent has a rounding of the number it is, at most 87 here.
        assert abs(float(prob - want)) <= 6e-6 * float(want) + 1e-37


def shapes(width: int) -> list[Tensor]:
    """Rows [width] that are hard to cut."""
    torch.manual_seed(width)
    some = torch.randn(width) * 3
    holes = some.clone()
    holes[::3] = -torch.inf
    one = torch.full((width,), -torch.inf)
    one[width // 2] = -2.5
    masked = some.clone()
    masked[1::2] = -1e38  # masks that are finite numbers
    negative = some.abs().neg() - 1000.0
    zeros = torch.zeros(width)
    zeros[::2] = -0.0
    return [some, holes, one, masked, negative, zeros, some.round(), torch.full((width,), -torch.inf)]


ROWS: list[Limits] = [
    PLAIN,
    (0.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (0.9, 0, 0.73, 0.0),
    (1.3, 6, 0.81, 0.0),
    (1.0, 9, 0.91, 0.07),
    (2.0, 0, 1.0, 0.03),
    (1.0, 1, 0.5, 0.5),
    (1e-31, 0, 0.93, 0.0),
    (1.0, 0, 0.0, 0.0),
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("width", "asked"),
    [
        (1, ROWS[:2]),
        (2, ROWS[3:5]),
        (37, ROWS[4:7]),
        (201, ROWS[3:4]),
        pytest.param(1, ROWS[2:4], marks=pytest.mark.slow),
        pytest.param(2, ROWS[5:6], marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_is_what_sorting_keeps(width: int, asked: list[Limits], known: bool) -> None:
    rows = torch.stack(shapes(width))
    for each in asked:
        check(rows, torch.arange(len(rows)), width, [each] * len(rows), known=known)


@pytest.mark.parametrize("asked", [ROWS[3:6:2], pytest.param([*ROWS[1::2], *ROWS[2:7:2]], marks=pytest.mark.slow)])
def test_given_maxima_change_no_cut(asked: list[Limits]) -> None:
    rows = torch.stack(shapes(150))
    for each in asked:
        given = (rows, torch.arange(len(rows)), 150, *limits(*[each] * len(rows)))
        plain, quick = (cutoffs(*given, best=best, kernel=True) for best in (None, rows.amax(1)))
        assert torch.equal(plain.least, quick.least)
        assert torch.equal(plain.last, quick.last)
        assert torch.equal(plain.best, quick.best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_with_many_ties(dtype: torch.dtype) -> None:
    rows = torch.stack(shapes(83)).to(dtype)[[0, 1, 6]]
    for each in ROWS[4:6]:
        check(rows, torch.arange(3), 83, [each] * 3)


def test_each_row_has_limits_of_its_own_and_rows_may_be_anywhere() -> None:
    store = torch.randn(9, 150) * 2
    source = store[:, 10:140]  # rows further apart than they are wide, more columns than are asked for
    index = torch.tensor([8, 0, 3, 3, 5, 1, 7, 2, 2, 6], dtype=torch.int32)
    check(source, index, 101, ROWS)
    check(source, index, 101, ROWS, known=True)
    columns = torch.randn(101, 4).t()  # columns that are not next to each other
    check(columns, torch.tensor([3, 1]), 101, [ROWS[4], ROWS[3]])


WIDE: list[Limits] = [(1.0, 0, 0.93, 0.0), (1.0, 0.52, 0.71, 0.0), (1.0, 0.52, 1.0, 0.3), (5.0, 0.8, 1.0, 0.0)]


def check_wide(
    width: int, asked: Limits, module: ModuleType = subject, which: slice = slice(None), known: bool = False
) -> None:
    """Rows that keep much; top_k is a share of the width."""
    t, k, p, m = asked
    torch.manual_seed(1)
    near = torch.randn(width) * 0.3  # most of it between two pivots
    steps = (torch.randn(width) * 2).round().clamp(-1, 1)  # more ties than a list holds
    holes = near.clone()
    holes[::4] = -torch.inf
    far = torch.randn(width)
    far[1::3] -= 1e30
    rows = torch.stack([near, steps, far, holes, torch.zeros(width)])[which]
    check(rows, torch.arange(len(rows)), width, [(t, int(k * width), p, m)] * len(rows), module, known)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("asked", WIDE)
def test_a_short_list_leaves_most_to_the_pivots(asked: Limits, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_LIST", 16)
    check_wide(301, asked, known=known)


@pytest.mark.parametrize(
    "asked", [(1.0, 20, 1.0, 0.0), (0.02, 20, 0.9, 0.0), (0.3, 0, 0.999, 0.0), (9.0, 0, 0.99, 0.0)]
)
def test_edges_far_below_a_given_maximum_are_found(asked: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below all of the first pivots but the last, and at temperatures at which these lie close together."""
    monkeypatch.setattr(subject, "_LIST", 16)
    torch.manual_seed(2)
    rows = torch.stack([torch.randn(200) - gap for gap in (5.0, 50.0, 500.0, 1e5, 1e30)])
    rows[:, 77] = 3.0
    check(rows, torch.arange(5), 200, [asked] * 5, known=True)


def test_rows_that_keep_more_than_the_list_holds() -> None:
    check_wide(5003, WIDE[1])


def test_rows_with_nan_or_infinity_are_not_cut() -> None:
    z = torch.randn(2, 40)
    z[0, 3], z[1, 7] = torch.nan, torch.inf
    for found in (
        cutoffs(z, torch.arange(2), 40, *limits(ROWS[4], ROWS[1]), kernel=True),
        cutoffs_reference(z, torch.arange(2), 40, *limits(ROWS[4], ROWS[1])),
    ):
        assert found.least.tolist() == [-torch.inf] * 2
        assert found.last.tolist() == [40, 40]
        assert torch.isfinite(found.best).all()


def test_the_reference_keeps_what_the_engine_keeps() -> None:
    for asked in ROWS:
        rows = torch.stack(shapes(120))
        cut = cutoffs_reference(rows, torch.arange(len(rows)), 120, *limits(*[asked] * len(rows)))
        assert torch.equal(kept(rows, cut), wanted(rows, [asked] * len(rows)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        cutoffs(torch.zeros(2, 8), torch.arange(2), 9, *limits(PLAIN, PLAIN))
    with pytest.raises(ValueError, match="do not fit"):
        cutoffs(torch.zeros(2, 8), torch.arange(2), 8, *limits(PLAIN, PLAIN), best=torch.zeros(3))


def reads(asked: Limits, known: bool, tmp_path: Path) -> int:
    """How often the kernel reads a row whose edge is found at the first pivots."""
    head = "def _read(row, start, width, BLOCK: tl.constexpr):\n"
    module = mutated(subject.__file__, head, f"{head}    COUNTED.append(start)\n", tmp_path)
    counted: list[object] = []
    module.COUNTED, module._LIST = counted, 16  # type: ignore[attr-defined]
    row = -torch.arange(64.0)[None]
    best = row.amax(1) if known else None
    module.cutoffs(row, torch.arange(1), 64, *limits(asked), best=best, kernel=True)
    return len(counted)  # a row is one block


@pytest.mark.parametrize(
    ("asked", "plain", "quick"),
    [
        (PLAIN, 1, 1),
        ((0.0, 5, 0.9, 0.1), 1, 1),
        ((0.8, 5, 1.0, 0.0), 3, 2),
        ((0.8, 30, 1.0, 0.0), 3, 2),
        ((0.8, 0, 0.9, 0.0), 3, 2),
        ((0.8, 5, 0.9, 0.0), 3, 2),
        ((0.8, 5, 0.9, 0.5), 4, 3),
        ((0.8, 0, 1.0, 0.1), 2, 2),
    ],
)
def test_how_often_a_row_is_read(asked: Limits, plain: int, quick: int, tmp_path: Path) -> None:
    assert (reads(asked, False, tmp_path), reads(asked, True, tmp_path)) == (plain, quick)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "asked", "known"),
    [
        ("tl.cumsum(same, axis=0) == n)", "tl.cumsum(same, axis=0) == n + 1)", WIDE[0], False),
        ("mass_middle = base_mass + ", "mass_middle = ", WIDE[0], False),
        ("mass = mass_hi + ties.to(tl.float32) * one", "mass = mass_hi + one", WIDE[1], False),
        ("at_middle.to(tl.float32)) >= target", "at_middle.to(tl.float32)) > target", WIDE[3], False),
        ("size = tl.where(base > 0, -1, size)", "size = size", WIDE[1], False),
        ("bound = top + ", "bound = ", WIDE[2], False),
        (
            "image(best - down * unit).to(tl.int64), _LOWEST)",
            "image(best - down * unit).to(tl.int64), 0)",
            WIDE[3],
            True,
        ),
        ("mass, count = tl.max(masses, axis=0), ", "mass, count = tl.min(masses, axis=0), ", WIDE[0], True),
        ("tl.max(counts, axis=0)", "tl.min(counts, axis=0)", WIDE[3], True),
        ('(tl.abs(known) < float("inf")) & (greedy == 0)', "(greedy == 0)", WIDE[0], True),
        ('(tl.abs(known) < float("inf")) & (greedy == 0) & ', "(tl.abs(known) < 9e9) & ", (0.0, 0.5, 0.9, 0.0), True),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, asked: Limits, known: bool, tmp_path: Path) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    module._LIST = 16  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        check_wide(301, asked, module, slice(4), known)
