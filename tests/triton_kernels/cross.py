"""Compile the launches of a kernel's wrapper for a GPU that need not be there; run by `test_compiles.py`.

The interpreter accepts what the compiler refuses (types, shapes of products, shared memory), so each wrapper is called
on small CPU tensors with launches turned into compilations for compute capability 9.0. `python -m
tests.triton_kernels.cross NAME` compiles `CASES[NAME]` and prints one JSON line per kernel made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from triton_kernels.lora import lora_
from triton_kernels.rms_norm import rms_norm
from triton_kernels.rope import rope
from triton_kernels.swiglu import Activation, swiglu


class _Driver:
    """Answers what compilation asks; there is no device behind it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launches compile and do nothing; yields the compiled kernels."""
    made: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return made[-1]

    driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        yield made
    finally:
        JITFunction.run = run


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, which is where they are spilled to) a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":") for part in shown.split() if part.startswith(("REG:", "STACK:")))
    return int(usage["REG"]), int(usage["STACK"])


def _rms_norm() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.zeros(3, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
        rms_norm(x, weight, 1e-6, kernel=True)
        rms_norm(x, weight, 1e-6, x, 1.0, kernel=True)
        rms_norm(torch.zeros(9, 32, 128, dtype=dtype), weight[:128], 1e-6, cast_last=True, kernel=True)


def _lora() -> None:
    table = torch.zeros(4, 3, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, rank in ((8, 16), (8, 64), (100, 8), (2000, 16), (2000, 64)):
            x, y = torch.zeros(tokens, 4096, dtype=dtype), torch.zeros(tokens, 4096, dtype=dtype)
            lora_(x, y, torch.zeros(tokens, dtype=torch.int32), table, rank)


def _rope() -> None:
    """Llama's, Phi-3's part of a head, GPT-OSS's half a cosine, Cohere's and GLM's."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k = torch.zeros(32, 5, 128, dtype=dtype).transpose(0, 1), torch.zeros(5, 8, 128, dtype=dtype)
        cos = torch.zeros(5, 128, dtype=dtype)
        rope(q, k, cos, cos, kernel=True)
        rope(q, k, cos, cos, in_place=True, kernel=True)
        rope(q, k, cos[:, :96], cos[:, :96], kernel=True)
        rope(q, k, cos[:, :64], cos[:, :64], paired=True, rotated=128, kernel=True)
        rope(q, k, cos.float(), cos.float(), interleaved=True, wide=True, kernel=True)
        rope(q, k, cos[:, :64], cos[:, :64], interleaved=True, paired=True, kernel=True)


def _swiglu() -> None:
    activations: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
    for dtype in (torch.bfloat16, torch.float32):
        for activation in activations:
            swiglu(torch.zeros(3, 2 * 14336, dtype=dtype), None, activation, kernel=True)
        swiglu(torch.zeros(3, 1000, dtype=dtype), torch.zeros(3, 1000, dtype=dtype), kernel=True)


CASES: dict[str, Callable[[], None]] = {"lora": _lora, "rms_norm": _rms_norm, "rope": _rope, "swiglu": _swiglu}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        with compiling() as made:
            CASES[name]()
        for each in made:
            registers, spilled = resources(each.asm["cubin"])
            line = {"kernel": each.metadata.name, "shared": each.metadata.shared, "registers": registers}
            print(json.dumps({"case": name, **line, "spilled": spilled}))


if __name__ == "__main__":
    main()
