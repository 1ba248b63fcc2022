"""Row statistics: the kernels in the interpreter against torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from triton_kernels import row_stats as subject
from triton_kernels.row_stats import row_stats, row_stats_reference


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[6, 150] in wider storage."""
    torch.manual_seed(0)
    x = torch.randn(6, 170)[:, 3:153] * 5
    x[1] = -torch.inf
    x[2, ::2] = -torch.inf
    x[3] -= 1000.0
    x[4, 11], x[5, 140] = torch.nan, torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 33, 150])
def test_the_kernels_do_what_the_reference_does(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "CHUNK", 32)
    x, index = rows(dtype), torch.tensor([3, 0, 1, 5, 4, 2, 0])
    best, lse = row_stats(x, index, width, kernel=True)
    want_best, want_lse = row_stats_reference(x, index, width)
    assert torch.equal(best, want_best)
    # The sum is below `width`, its logarithm below 6: a few roundings of that and one of the result.
    assert torch.allclose(lse, want_lse, rtol=2e-7, atol=2e-6, equal_nan=True)


def test_the_reference_is_the_formula_in_double() -> None:
    x = rows()[[0, 2, 3]]
    assert torch.allclose(row_stats_reference(x, torch.arange(3), 150)[1].double(), x.double().logsumexp(1), rtol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        row_stats(torch.zeros(2, 8), torch.arange(2), 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.sum(sums * tl.exp(bests - finite_or_0(best)), axis=0)", "tl.sum(sums, axis=0)"),
        ("mask=at < width", "mask=at < width - 1"),
        ("at = chunk * BLOCK + ", "at = "),
        ("best + tl.where(total > 0,", "tl.where(total > 0,"),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    module.CHUNK = 32  # type: ignore[attr-defined]
    x, index = rows()[[0, 2, 3]], torch.arange(3)
    _, lse = module.row_stats(x, index, 150, kernel=True)
    assert not torch.allclose(lse, row_stats_reference(x, index, 150)[1], rtol=2e-7, atol=2e-6)
