"""The gate of a gated MLP: act(gate) * up.

    y = cast(act(gate)) * up        act: silu(x) = x s(x), gelu_tanh(x) = x s(2 sqrt(2 / pi) (x + 0.044715 x^3)),
                                    gelu(x) = x / 2 (1 + erf(x / sqrt(2)));  s(x) = 1 / (1 + exp(-x))

(Shazeer 2020, arXiv:2002.05202, equations 5 and 6; 1 + tanh(x) = 2 s(2 x).) The activation is fp32 and rounded before
the product, as models do it. gate and up are two tensors, or the halves of one's columns, as Phi-3's projection makes
them. Forward only.

Launches: 1. Bytes: gate and up read and y written once.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from triton_kernels.dispatch import on_kernel

Tensor = torch.Tensor
Activation = Literal["silu", "gelu_tanh", "gelu"]

BLOCK = 1024  # numbers of one program


def swiglu_reference(gate: Tensor, up: Tensor | None = None, activation: Activation = "silu") -> Tensor:
    """See `swiglu`."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


@triton.jit
def _sigmoid(x):
    """No exponential of a positive number, which would overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    if ACTIVATION == "silu":
        active = x * _sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        active = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        active = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    y = active.to(gate.dtype).to(tl.float32) * up
    tl.store(y_ptr + row * width + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def swiglu(
    gate: Tensor, up: Tensor | None = None, activation: Activation = "silu", *, kernel: bool | None = None
) -> Tensor:
    """act(gate) * up [.., m], contiguous: gate and up [.., m], or gate [.., 2 m], whose second half is up.

    One dtype, fp32, bf16 or fp16; rows of any stride. Raises ValueError if the shapes do not fit.
    """
    if activation not in ("silu", "gelu_tanh", "gelu"):
        raise ValueError(f"swiglu: no activation '{activation}'")
    if (gate.shape[-1] % 2 != 0) if up is None else (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up do not fit")
    if not on_kernel(gate, kernel):
        return swiglu_reference(gate, up, activation)
    if up is None:
        gate, up = gate.chunk(2, -1)
    width = gate.shape[-1]
    gates, ups = (x.reshape(-1, width) for x in (gate, up))
    gates, ups = (x if x.stride(1) == 1 else x.contiguous() for x in (gates, ups))
    y = torch.empty(gates.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        _swiglu_kernel[(gates.shape[0], triton.cdiv(width, BLOCK))](
            gates, ups, y, width, gates.stride(0), ups.stride(0), activation, BLOCK
        )
    return y.view(gate.shape)
