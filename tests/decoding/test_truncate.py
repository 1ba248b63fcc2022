"""Truncation by kernel and by torch against float64 sums over sorted rows, on rows that are hard to cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from decoding.core import Sampling
from decoding.host_build import load_kernels
from decoding.truncate import (
    cut_below,
    keep_mask,
    keep_rows,
    keep_sorted,
    kernel_edges,
    listed,
    top_p_listed,
    top_p_mask,
    truncate,
)

WIDTHS = [1, 2, 15, 17, 63, 65, 129, 1000, 4099, 32001]
# How far sums may be off: the kernel's probabilities have 24 bits and a polynomial's 2e-7, torch's an fp32 normaliser.
KERNEL, TORCH = 5e-7, 5e-6


def _noise(width: int, scale: float) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width)) * scale


def _some_impossible(width: int) -> torch.Tensor:
    row = _noise(width, 2.0)
    row[1::3] = -torch.inf
    return row


def _one_possible(width: int) -> torch.Tensor:
    row = torch.full((width,), -torch.inf)
    row[width // 2] = -3.5
    return row


def _zeros_of_both_signs(width: int) -> torch.Tensor:
    row = torch.zeros(width)
    row[::2] = -0.0
    row[3::5] = -1.0
    return row


def _outlier(width: int) -> torch.Tensor:
    row = _noise(width, 1.0)
    row[width // 3] = -3.4e38
    row[-1] = 3.0
    return row


def _masked_by_numbers(width: int) -> torch.Tensor:
    row = _noise(width, 0.6)
    row[1::2] = torch.finfo(torch.float32).min
    return row


ROWS: dict[str, Callable[[int], torch.Tensor]] = {
    "flat": lambda w: _noise(w, 0.6),
    "flatter": lambda w: _noise(w, 1e-4) - 10,
    "peaked": lambda w: _noise(w, 9.0),
    "equal": lambda w: torch.full((w,), 0.7),
    "bf16": lambda w: _noise(w, 0.6).bfloat16().float() + 5,
    "few values": lambda w: (_noise(w, 1.0) * 2).round() / 2,
    "some impossible": _some_impossible,
    "one possible": _one_possible,
    "zeros": _zeros_of_both_signs,
    "denormal": lambda w: _noise(w, 1.0).round() * 1e-45,
    "outlier": _outlier,
    "masked by numbers": _masked_by_numbers,
    "huge ties": lambda w: _noise(w, 1.0).round() * 1e37 - 2e38,
    "huge": lambda w: _noise(w, 5e37),
}
PARAMS = [
    Sampling(top_p=1e-9),
    Sampling(top_p=0.1013),
    Sampling(top_p=0.9003),
    Sampling(top_p=0.999937),
    Sampling(top_p=0.0),
    Sampling(),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=128),
    Sampling(top_k=129),
    Sampling(top_k=1000),
    Sampling(top_k=1 << 70),
    Sampling(min_p=1e-6),
    Sampling(min_p=0.4771),
    Sampling(min_p=1.0),
    Sampling(top_k=200, top_p=0.7003, min_p=0.01),
    Sampling(top_k=200, top_p=0.999, min_p=0.6013),
    Sampling(top_k=3, top_p=0.37, min_p=1e-3),
]


def counts_allowed(row: torch.Tensor, p: Sampling, slack: float) -> tuple[np.ndarray, int, int]:
    """The ids best first, and between which counts of them a truncation may keep, sums being off by `slack`."""
    x = row.double().numpy()
    order = np.argsort(-x, kind="stable")
    order = order[np.isfinite(x[order])][: p.top_k or None]
    values = x[order]
    mass = np.exp(values - values[0])
    # The normaliser is the same whether a row was cut by top-k or holds -inf: what is left sums to 1.
    before = (np.cumsum(mass) - mass) / mass.sum()
    likely = max(1, int((values - values[0] >= (math.log(p.min_p) if p.min_p else -math.inf)).sum()))

    def count(top_p: float) -> int:
        return len(order) if p.top_p >= 1 else max(1, int((before < top_p).sum()))

    return order, min(likely, count(p.top_p - slack)), min(likely, count(p.top_p + slack))


def agrees(kept: torch.Tensor, row: torch.Tensor, p: Sampling, slack: float) -> bool:
    """Whether kept [W] bool is a set that `p` allows for the row."""
    order, least, most = counts_allowed(row, p, slack)
    count = int(kept.sum())
    return least <= count <= most and bool(kept[torch.from_numpy(order[:count].copy())].all())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_kept_sets_are_those_of_exact_sums(kind: str, width: int) -> None:
    row = ROWS[kind](width)
    kept = torch.isfinite(keep_rows(row.repeat(len(PARAMS), 1), PARAMS))  # [params, W]
    slack = KERNEL if load_kernels() else TORCH
    for i, p in enumerate(PARAMS):
        assert agrees(kept[i], row, p, slack), p
        assert agrees(torch.isfinite(keep_sorted(row, p)), row, p, TORCH), p


@pytest.mark.parametrize("kind", ROWS)
def test_one_token_more_or_less_would_be_seen(kind: str) -> None:
    row = ROWS[kind](1000)
    seen = 0
    for p in PARAMS:
        order, least, most = counts_allowed(row, p, KERNEL)
        if least != most or least == len(order):
            continue  # the sum is within rounding of top_p, or there is no token more
        kept = torch.zeros(1000, dtype=torch.bool)
        kept[torch.from_numpy(order[:least].copy())] = True
        assert agrees(kept, row, p, KERNEL)
        for position in (least - 1, least):  # the last one out; the next one in
            kept[order[position]] ^= True
            assert not agrees(kept, row, p, KERNEL), p
            kept[order[position]] ^= True
        seen += 1
    assert seen > 3 or kind == "one possible"


@pytest.mark.parametrize("width", [16, 64, 4096, 32768])
def test_exact_sums_are_cut_exactly(width: int) -> None:
    """Equal tokens: every sum is a whole number of them, so the crossing is no matter of rounding."""
    if not load_kernels():
        pytest.skip("float32 sums of torch are not exact")
    row = torch.full((1, width), -7.25)
    row[0, width // 2 :] = -torch.inf
    for share in (0.25, 0.5, 0.75):
        kept = torch.isfinite(keep_rows(row, [Sampling(top_p=share)]))[0].nonzero()[:, 0]
        assert kept.tolist() == list(range(int(share * width / 2))), share
        more = torch.isfinite(keep_rows(row, [Sampling(top_p=math.nextafter(share, 1.0))]))
        assert int(more.sum()) == int(share * width / 2) + 1


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("width", [1, 17, 128, 129, 4099])
def test_short_lists_hold_the_kept_tokens_best_first(kind: str, width: int) -> None:
    row = ROWS[kind](width)
    z = row.repeat(len(PARAMS), 1)
    values, ids, wide = truncate(z, PARAMS)
    kept = torch.isfinite(keep_rows(z, PARAMS))
    assert wide == [i for i in range(len(PARAMS)) if int(kept[i].sum()) > 128] or not load_kernels()
    for i in set(range(len(PARAMS))).difference(wide):
        order = [j for j in np.argsort(-row.numpy(), kind="stable").tolist() if kept[i, j]]
        assert ids[i, : len(order)].tolist() == order, PARAMS[i]
        assert values[i, : len(order)].tolist() == row[order].tolist()
        assert (values[i, len(order) :] == -torch.inf).all()


def test_the_lists_of_torch_are_the_kernels() -> None:
    z = torch.stack([_noise(1000, 3.0), ROWS["few values"](1000), _some_impossible(1000)])
    compared = set()
    for p in PARAMS:
        values, _, wide = listed(z, [p] * 3)
        mine, _, mine_wide = truncate(z, [p] * 3)
        for i in set(range(3)).difference(wide, mine_wide):
            assert torch.equal(values[i], mine[i]), (i, p)
            compared.add(p)
    assert len(compared) > 6
    # Top-p is of what top-k keeps: of 200, not of the 128 that the list holds.
    assert listed(z, [Sampling(top_k=200, top_p=0.7003, min_p=0.01)] * 3)[2] == [0, 1, 2]


@pytest.mark.parametrize("width", WIDTHS)
def test_edges_of_some_rows_of_a_wider_matrix(width: int) -> None:
    if not load_kernels():
        pytest.skip("needs a C++ compiler")
    rows = torch.stack([_noise(width + 9, scale) for scale in (0.6, 3.0, 0.0, 9.0)]).bfloat16()
    index = torch.tensor([3, 0, 0, 2, 1])
    top_p = [0.3, 0.9, 0.2, 0.5, 0.999]
    got = kernel_edges(rows, index, width, [0] * 5, top_p, [0.0] * 5)
    alone = [
        kernel_edges(rows[i : i + 1, :width].float().contiguous(), torch.tensor([0]), width, [0], [p], [0.0])
        for i, p in zip(index.tolist(), top_p, strict=True)
    ]
    assert got[0].tolist() == [float(least) for least, _ in alone]
    assert got[1].tolist() == [int(last) for _, last in alone]
    assert bool((got[1] < width).all())


def test_zeros_of_both_signs_tie() -> None:
    row = torch.tensor([-0.0, 0.0, 0.0, -0.0])
    for p, count in ((Sampling(top_k=1), 1), (Sampling(top_k=3), 3), (Sampling(top_p=0.6), 3), (Sampling(min_p=1), 4)):
        for kept in (keep_mask(row, p), keep_sorted(row, p)):
            assert torch.isfinite(kept).tolist() == [i < count for i in range(4)], p


@pytest.mark.parametrize("width", [1, 17, 4099])
def test_rows_are_cut_by_others(width: int) -> None:
    z, by = _noise(width, 1.0).repeat(3, 1), _noise(width + 3, 1.0)[:width].repeat(3, 1)
    least = torch.stack([by[0, -1], torch.tensor(-torch.inf), torch.tensor(torch.inf)])
    got = cut_below(z, by, least)
    assert torch.equal(got[0], torch.where(by[0] >= by[0, -1], z[0], -torch.inf))  # the bound itself stays
    assert torch.equal(got[1], z[1])
    assert (got[2] == -torch.inf).all()
    assert torch.equal(cut_below(z.double(), by.double(), least.double()), got.double())


def test_nothing_is_cut_from_a_row_that_is_broken() -> None:
    """Whatever uses the row sees that it is: a gate does not hide it."""
    good = _noise(300, 1.0)
    nan, infinite, empty = good.clone(), good.clone(), torch.full((300,), -torch.inf)
    nan[250], infinite[7] = torch.nan, torch.inf
    rows = torch.stack([good, nan, infinite, empty])
    for mask in (top_p_mask(rows, [0.5] * 4), top_p_listed(rows, [Sampling(top_p=0.5)] * 4)):
        assert mask.all(1).tolist() == [False, True, True, True]
