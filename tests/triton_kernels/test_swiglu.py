"""Gated activations: the kernel in the interpreter against the reference, and its formulas against fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from triton_kernels import swiglu as file
from triton_kernels.swiglu import Activation, swiglu, swiglu_reference

ACTIVATIONS: list[Activation] = ["silu", "gelu_tanh", "gelu"]
SHAPES = [(1, 1), (3, 7), (2, 5, 33), (2, 1025)]


def worst(
    shape: tuple[int, ...], activation: Activation, dtype: torch.dtype, fused: bool, run: Callable[..., Any] = swiglu
) -> float:
    """Largest error of `run`, as a multiple of what is allowed: see below."""
    torch.manual_seed(0)
    both = torch.randn(*shape[:-1], 2 * shape[-1]) * 4
    both[..., 0] = 300.0  # what overflows in exp(x) and in x^3 of a half
    both[..., shape[-1] // 2] = -300.0
    both = both.to(dtype)
    gate, up = both.chunk(2, -1)
    want = swiglu_reference(gate, up, activation)
    got = run(both, None, activation, kernel=True) if fused else run(gate, up, activation, kernel=True)
    assert got.dtype == dtype
    assert got.is_contiguous()
    # bf16: the interpreter cuts off where torch rounds, an ulp for the activation and one for the product. fp32: a few
    # roundings of exp, erf and their sums, which are of size one and are multiplied with gate and up.
    eps = torch.finfo(dtype).eps
    size = (gate.float() * up.float()).abs().clamp_max(1e9)
    allowed = 2 * eps * want.float().abs() + 4 * 2**-23 * size + 1e-30
    return float(((got.float() - want.float()).abs() / allowed).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernel_does_what_the_reference_does(
    shape: tuple[int, ...], activation: Activation, dtype: torch.dtype, fused: bool
) -> None:
    assert worst(shape, activation, dtype, fused) <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_formula_in_double(activation: Activation) -> None:
    gate, up = torch.linspace(-9, 9, 1001), torch.randn(1001)
    x = gate.double()
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    shares = {"silu": x.sigmoid(), "gelu": (1 + (x * 0.5**0.5).erf()) / 2, "gelu_tanh": (1 + inner.tanh()) / 2}
    exact = x * shares[activation] * up.double()
    assert torch.allclose(swiglu_reference(gate, up, activation).double(), exact, rtol=1e-6, atol=1e-6)


def test_strided_and_empty() -> None:
    gate, up = torch.randn(6, 5).T, torch.randn(5, 12)[:, ::2]
    assert torch.allclose(swiglu(gate, up, kernel=True), swiglu_reference(gate, up), rtol=1e-6, atol=1e-6)
    assert swiglu(torch.zeros(0, 8), kernel=True).shape == (0, 4)


def test_arguments_that_do_not_fit_are_refused() -> None:
    for gate, up in ((torch.zeros(2, 3), None), (torch.zeros(2, 3), torch.zeros(2, 4)),
                     (torch.zeros(2), torch.zeros(2).bfloat16())):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            swiglu(gate, up)
    with pytest.raises(ValueError, match="no activation"):
        swiglu(torch.zeros(2), activation="relu")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(x >= 0, 1.0, e)", "tl.where(x >= 0, e, 1.0)"),
        ("0.044715 * x", "0.0447 * x"),
        ("0.7071067811865476 * x", "0.70710 * x"),
        ("up_ptr + row * up_stride", "up_ptr + row * width"),
        ("tl.program_id(1) * BLOCK", "0 * BLOCK"),
    ],
)
def test_broken_kernels_fail(old: str, new: str, tmp_path: Path) -> None:
    broken = mutated(file.__file__, old, new, tmp_path).swiglu
    errors = [worst(shape, name, torch.float32, True, run=broken) for shape in SHAPES for name in ACTIVATIONS]
    assert not all(error <= 1 for error in errors)
