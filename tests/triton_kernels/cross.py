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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.triton_kernels.cases import CASES


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
