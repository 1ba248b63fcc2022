"""Weighted sums of models' rows: the kernels against torch, and both against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from decoding.combine import Gating, KernelRows, TorchRows, Track
from decoding.host_build import load_kernels

Gatings = list[Gating | None]
WEIGHTS = [1.0, -0.7, 1.3, 0.31, -2.0]


def tracks_of(width: int, n: int, scale: float = 1.0) -> list[Track]:
    """Four models' rows: two dtypes, wider than the mix, picked out of order."""
    g = torch.Generator().manual_seed(width + n)
    made: list[Track] = []
    for t, dtype in enumerate((torch.bfloat16, torch.float32, torch.bfloat16, torch.float32)):
        logits = (torch.randn(n + 2, width + 3 * t, generator=g) * scale + 20 * t).to(dtype)
        made.append((logits, [(i * i + t) % (n + 2) for i in range(n)]))
    return made


def both(tracks: list[Track], width: int, logprobs: bool) -> tuple[TorchRows, KernelRows | TorchRows]:
    kernel = KernelRows.of(tracks, width, logprobs)
    assert (kernel is not None) == load_kernels()
    reference = TorchRows(tracks, width, logprobs)
    return reference, kernel or reference


def rounding(tracks: list[Track], weights: torch.Tensor) -> float:
    """Each of J terms is rounded when shifted, weighted and added; no partial sum exceeds J times the largest."""
    largest = max(float(logits[logits.abs() < torch.inf].abs().max()) for logits, _ in tracks) + 20
    count = weights.shape[1]
    return 2**-23 * count * (2 * count) * largest * float(weights.abs().max())


def gates(n: int, width: int) -> dict[str, Gatings]:
    p = tuple(0.9003 - 0.31 * (i % 3) for i in range(n))
    q = (0.5003,) * n
    one, other = Gating(1, p, "base"), Gating(2, q, "base")
    return {
        "none": [None] * 5,
        "base": [None, one, one, other, other],
        "between others": [one, None, other, one, None],
        "of": [None, Gating(1, p, "of"), Gating(1, p, "of"), None, None],
        "drop": [None, Gating(1, p, "drop"), Gating(3, q, "drop"), other, None],
        "all gated": [Gating(0, p, "of"), one, one, other, Gating(3, (1.0,) * n, "base")],
    }


@pytest.mark.parametrize("name", gates(1, 1))
@pytest.mark.parametrize(("width", "n"), [(1, 1), (17, 3), (2049, 2), (32001, 3)])
def test_the_kernels_equal_their_specification(name: str, width: int, n: int) -> None:
    tracks, order = tracks_of(width, n), [0, 1, 3, 2, 1]
    weights = torch.tensor([WEIGHTS] * n) * torch.linspace(0.5, 1.0, n)[:, None]
    reference, kernel = both(tracks, width, True)
    wanted, got = (source.mix(order, weights, gates(n, width)[name]) for source in (reference, kernel))
    assert torch.equal(torch.isfinite(wanted), torch.isfinite(got))
    bound = rounding(tracks, weights)
    torch.testing.assert_close(got, wanted, rtol=0, atol=bound)
    for t in range(4):
        torch.testing.assert_close(kernel.rows(t), reference.rows(t), rtol=0, atol=bound)
    if width > 1:  # the comparison can fail: another gate, or a weight that is off by a thousandth
        assert not torch.allclose(kernel.mix(order, weights * 1.001, gates(n, width)[name]), wanted, rtol=0, atol=bound)
        if name not in ("none", "all gated"):
            assert not torch.allclose(kernel.mix(order, weights, [None] * 5), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_sum_is_what_it_says(logprobs: bool) -> None:
    tracks, weights = tracks_of(300, 4), torch.tensor([WEIGHTS] * 4)
    rows = [logits[index, :300].double() for logits, index in tracks]
    if logprobs:
        rows = [torch.log_softmax(row, 1) for row in rows]
    closed = torch.ones(4, 300, dtype=torch.bool)
    for i in range(4):  # the shortest prefix that reaches 0.7003
        order = rows[1][i].sort(descending=True, stable=True).indices
        before = torch.softmax(rows[1][i], 0)[order].cumsum(0)
        closed[i, order[: int((before < 0.7003).sum()) + 1]] = False
    for outside in ("base", "of", "drop"):
        z = rows[0] * WEIGHTS[0] + rows[3] * WEIGHTS[2]
        z = torch.where(closed, {"base": z, "of": rows[1], "drop": torch.tensor(-torch.inf).double()}[outside], z)
        z += (rows[1] * WEIGHTS[1] + rows[2] * WEIGHTS[3]).masked_fill(closed, 0.0)
        gate = Gating(1, (0.7003,) * 4, outside)  # type: ignore[arg-type]
        for source in both(tracks, 300, logprobs):
            got = source.mix([0, 1, 3, 2], weights[:, :4], [None, gate, None, gate])
            torch.testing.assert_close(got.double(), z, rtol=0, atol=rounding(tracks, weights))


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    tracks = tracks_of(40, 3)
    tracks[1][0][:, 4] = -torch.inf
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 0.0]])
    for gate in (None, Gating(1, (1.0,) * 3, "base")):
        for source in both(tracks, 40, False):
            z = source.mix([0, 1], weights, [None, gate])
            assert torch.equal(z[0], source.rows(0)[0])
            assert torch.isfinite(z[:, 4]).tolist() == [True, gate is not None, True]
            assert z[2].tolist() == [0.0] * 40
            assert not torch.equal(z[1], source.rows(0)[1])


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_impossible_in_the_mix(broken: float, logprobs: bool) -> None:
    """One token's -inf is that token's; log-probs of a row with NaN or +inf are all NaN, gated or not."""
    tracks = tracks_of(2100, 3)
    tracks[1][0][tracks[1][1][1], 2060] = broken
    weights = torch.tensor([[1.0, -0.5]] * 3)
    gate = Gating(1, (1.0,) * 3, "base")
    for gating in (None, gate) if logprobs else (None,):
        for source in both(tracks, 2100, logprobs):
            z = source.mix([0, 1], weights, [None, gating])
            assert not z.isnan().any()
            assert not (z == torch.inf).any()
            whole = logprobs and broken != -math.inf
            lost = (~torch.isfinite(z)).sum(1).tolist()
            assert lost == [0, 2100 if whole else int(gating is None), 0]


def test_a_row_without_a_finite_number_is_not_hidden_by_its_gate() -> None:
    tracks = tracks_of(50, 2)
    tracks[1][0][tracks[1][1][0]] = -torch.inf
    for source in both(tracks, 50, True):
        z = source.mix([0, 1], torch.ones(2, 2), [None, Gating(1, (0.5, 0.5), "base")])
        assert torch.isfinite(z).sum(1).tolist() == [0, 50]


def test_rows_do_not_depend_on_the_others() -> None:
    tracks = tracks_of(2500, 4)
    weights = torch.tensor([WEIGHTS[:3]] * 4)
    gating: Gatings = [None, Gating(2, (0.8003,) * 4, "base"), None]
    alone_gating: Gatings = [None, Gating(2, (0.8003,), "base"), None]
    together = both(tracks, 2500, True)[1].mix([0, 2, 1], weights, gating)
    for i in range(4):
        alone = [(logits, index[i : i + 1]) for logits, index in tracks]
        assert torch.equal(both(alone, 2500, True)[1].mix([0, 2, 1], weights[:1], alone_gating), together[i : i + 1])


def test_other_dtypes_go_through_torch() -> None:
    logits = torch.randn(2, 20).half()
    assert KernelRows.of([(logits, [0, 1])], 20, True) is None
    assert KernelRows.of([(torch.randn(20, 2).T, [0, 1])], 20, True) is None
    assert TorchRows([(logits, [1])], 20, False).rows(0).dtype == torch.float32
