"""RMS norm: the kernel in the interpreter against the reference, and the reference against fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from triton_kernels import rms_norm as file
from triton_kernels.rms_norm import rms_norm, rms_norm_reference

Tensor = torch.Tensor

SHAPES = [(1, 1), (1, 7), (3, 64), (2, 5, 33), (4, 1000)]


def close(
    x: Tensor, weight: Tensor, residual: Tensor | None, offset: float = 0.0, cast_last: bool = False,
    run: Callable[..., Any] = rms_norm,
) -> bool:  # fmt: skip
    y, r = run(x, weight, 1e-6, residual, offset, cast_last, kernel=True)
    want, total = rms_norm_reference(x, weight, 1e-6, residual, offset, cast_last)
    # The interpreter cuts bf16 off where torch rounds: a unit in the last place each for the sum, the normed row
    # and the product. In fp32 nothing is cut off; sums in another order remain.
    ulp = torch.finfo(x.dtype).eps
    same = torch.allclose(r.float(), total.float(), rtol=ulp if x.dtype == torch.bfloat16 else 0.0, atol=0.0)
    return same and torch.allclose(y.float(), want.float(), rtol=3 * ulp, atol=1e-6) and y.dtype == want.dtype


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a residual."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    return x, torch.randn(shape[-1]).to(dtype), residual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "cast_last"), [(0.0, False), (0.0, True), (1.0, False)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_kernel_does_what_the_reference_does(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float, cast_last: bool, with_residual: bool
) -> None:
    x, weight, residual = draw(shape, dtype)
    assert close(x, weight, residual if with_residual else None, offset, cast_last)


@pytest.mark.parametrize("with_residual", [False, True])
def test_rows_that_do_not_lie_behind_each_other(with_residual: bool) -> None:
    x, weight, other = draw((6, 40), torch.float32)
    residual = other if with_residual else None
    assert close(x[:, 3:36], weight[3:36], None if residual is None else residual[:, 3:36])
    assert close(x[::2], weight, None if residual is None else residual[1::2])
    assert close(x.T, weight[:6], None if residual is None else residual.T)
    assert close(x.view(2, 3, 40).transpose(0, 1), weight, None if residual is None else residual.view(3, 2, 40))
    assert close(x[:1].expand(4, 40), weight, residual if residual is None else residual[:4])
    assert close(x[:, ::2], weight[::2], None if residual is None else residual[:, ::2])
    assert rms_norm(x[:0], weight, 1e-6, kernel=True)[0].shape == (0, 40)


def test_the_reference_is_the_formula_in_double() -> None:
    x, weight = torch.randn(5, 48), torch.randn(48)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert torch.allclose(rms_norm_reference(x, weight, 1e-6)[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(torch.zeros(2, 8).bfloat16(), torch.zeros(8), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/ width + eps", "/ BLOCK + eps"),
        ("weight.to(tl.float32) + offset", "weight.to(tl.float32)"),
        ("x_ptr + row * stride", "x_ptr + row * width"),
        ("tl.store(sum_ptr + row * width + at, x,", "tl.store(sum_ptr + row * width + at, x - x,"),
        ("y * (weight", "(y + 0.001) * (weight"),
    ],
)
def test_broken_kernels_fail(old: str, new: str, tmp_path: Path) -> None:
    broken = mutated(file.__file__, old, new, tmp_path).rms_norm
    x, weight, residual = draw((6, 40), torch.float32)
    x, weight, residual = x[:, :33], weight[:33], residual[:, :33]
    assert not all(close(x, weight, residual, offset, run=broken) for offset in (0.0, 1.0))
