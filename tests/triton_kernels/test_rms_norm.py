"""RMS norm: the kernel in the interpreter against the reference, and the reference against fp64."""

from __future__ import annotations

import pytest
import torch

from triton_kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(1, 1), (1, 7), (3, 64), (2, 5, 33), (4, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_kernel_does_what_the_reference_does(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float, with_residual: bool
) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    given = residual if with_residual else None
    y, r = rms_norm(x, weight, 1e-6, given, offset, kernel=True)
    want, total = rms_norm_reference(x, weight, 1e-6, given, offset)
    # The interpreter cuts bf16 off where torch rounds: a unit in the last place each for the sum, the normed row
    # and the product. In fp32 nothing is cut off; sums in another order remain.
    ulp = torch.finfo(dtype).eps
    assert torch.allclose(r.float(), total.float(), rtol=ulp if dtype == torch.bfloat16 else 0.0, atol=0.0)
    assert torch.allclose(y.float(), want.float(), rtol=3 * ulp, atol=1e-6)


def test_the_reference_is_the_formula_in_double() -> None:
    x, weight = torch.randn(5, 48), torch.randn(48)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert torch.allclose(rms_norm_reference(x, weight, 1e-6)[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
