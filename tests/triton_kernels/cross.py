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

from triton_kernels.distill_loss import KINDS, distill_loss
from triton_kernels.fusion_weights import fusion_weights
from triton_kernels.preference_loss import token_logprobs
from triton_kernels.rms_norm import rms_norm


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
    """(registers, bytes spilled to local memory) a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":") for part in shown.split() if part.startswith(("REG:", "LOCAL:")))
    return int(usage["REG"]), int(usage["LOCAL"])


def _rms_norm() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.zeros(3, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
        rms_norm(x, weight, 1e-6, kernel=True)
        rms_norm(x, weight, 1e-6, x, 1.0, kernel=True)


def _fusion_weights() -> None:
    for m in (1, 3):
        rows = [torch.zeros(2, 152_064) for _ in range(2 + m)]
        fusion_weights(rows[0], rows[1], rows[2:], 2.0, 0.1, True, kernel=True)


def _distill_loss() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = torch.zeros(2, 4, dtype=dtype, requires_grad=True), torch.zeros(152_064, 4, dtype=dtype)
        for kind in KINDS:
            distill_loss(hidden, weight, None, torch.zeros(2, 152_064), kind, per_position=True, kernel=True)
        distill_loss(hidden, weight, None, torch.zeros(2, 152_064, dtype=dtype), "lk", decay=3.0, kernel=True)


def _preference_loss() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = torch.zeros(2, 4, dtype=dtype, requires_grad=True), torch.zeros(152_064, 4, dtype=dtype)
        token_logprobs(hidden, weight, None, torch.zeros(2, dtype=torch.int64), kernel=True).sum().backward()


CASES: dict[str, Callable[[], None]] = {
    "distill_loss": _distill_loss,
    "fusion_weights": _fusion_weights,
    "preference_loss": _preference_loss,
    "rms_norm": _rms_norm,
}


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
