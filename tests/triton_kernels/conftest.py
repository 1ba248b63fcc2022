"""Triton's interpreter keeps bf16 as 16-bit integers and multiplies them as such in `tl.dot`: products are widened."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

_dot = InterpreterBuilder.create_dot


def _wide(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)


def _widened(self: Any, a: Any, b: Any, *args: Any) -> Any:
    return _dot(self, _wide(a), _wide(b), *args)


InterpreterBuilder.create_dot = _widened
