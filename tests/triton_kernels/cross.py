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

from triton_kernels.cutoffs import Cutoffs, cutoffs
from triton_kernels.draw import Residual, draw
from triton_kernels.mix import Edits, Gates, mix
from triton_kernels.rms_norm import rms_norm
from triton_kernels.row_stats import row_stats
from triton_kernels.sample_verify import verify
from triton_kernels.top_logprobs import top_logprobs


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


def _cutoffs() -> None:
    for dtype, rows in ((torch.float32, torch.int32), (torch.bfloat16, torch.int64)):
        limits = (torch.ones(2), torch.ones(2, dtype=torch.int32), torch.ones(2), torch.ones(2))
        x, index = torch.zeros(2, 4096, dtype=dtype), torch.zeros(2, dtype=rows)
        cutoffs(x, index, 4096, *limits, kernel=True)
        cutoffs(x, index, 4096, *limits, index.int(), kernel=True)


def _mix() -> None:
    wide, narrow = torch.zeros(2, 4096), torch.zeros(2, 4100, dtype=torch.bfloat16)
    index, weights = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 3)
    mix([wide, narrow, narrow], index, 4096, weights, [0, 1, 2], kernel=True)
    ints = torch.zeros(3, dtype=torch.int32)
    gates = Gates([1, 2], [1, 2], torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32))
    edits = Edits(ints, ints, torch.zeros(3), torch.zeros(3), torch.zeros(2, dtype=torch.bool))
    masks = (torch.zeros(1, 128, dtype=torch.int32), ints[:2])
    floor = (0, torch.zeros(2))
    shifts = torch.zeros(3, 2)
    mix(
        [wide, narrow, narrow],
        index,
        4096,
        weights,
        [0, 1, 2],
        shifts,
        [-1, 0, 1],
        gates,
        floor,
        *masks,
        edits,
        kernel=True,
    )

    mix([wide[:, :1]], index[:1, :1], 1, weights[:1, :1], [0], kernel=True)  # 1 is a constant to the compiler


def _draw() -> None:
    z, ints, floats = torch.zeros(2, 4096), torch.zeros(2, dtype=torch.int32), torch.zeros(2)
    given = (z, floats, Cutoffs(floats, ints, floats, floats), torch.zeros(2, 2, dtype=torch.int32))
    draw(*given, kernel=True)
    draw(*given, ints[:1], Residual(None, None, ints), kernel=True)
    draw(*given, ints, Residual(z[:, :4000], ints, ints), kernel=True)


def _sample_verify() -> None:
    flags = torch.zeros(2, dtype=torch.bool)
    verify(flags, torch.zeros(3, dtype=torch.int32), flags, kernel=True)


def _top_logprobs() -> None:
    x, index = torch.zeros(2, 262144, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    top_logprobs(x, index, 262144, torch.zeros(2), index, 32, kernel=True)
    top_logprobs(x.float(), index, 1000, torch.zeros(2), index, 1, kernel=True)


def _row_stats() -> None:
    row_stats(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1, kernel=True)
    row_stats(torch.zeros(2, 4096, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32), 4096, kernel=True)


CASES: dict[str, Callable[[], None]] = {
    "cutoffs": _cutoffs,
    "draw": _draw,
    "mix": _mix,
    "rms_norm": _rms_norm,
    "row_stats": _row_stats,
    "sample_verify": _sample_verify,
    "top_logprobs": _top_logprobs,
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
