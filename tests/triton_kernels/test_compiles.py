"""Every kernel compiles for a Hopper GPU, fits its shared memory, and spills next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "triton_kernels").glob("*.py") if "_kernel[" in path.read_text())
SHARED = 227 * 1024  # bytes a block may use on compute capability 9.0
STACK = 256  # bytes a thread may spill: they stay in the first-level cache


@pytest.mark.parametrize("kernels", [KERNELS[i::3] for i in range(3)], ids="+".join)
def test_kernels_compile_for_hopper(kernels: list[str]) -> None:
    command = [sys.executable, "-m", "tests.triton_kernels.cross", *kernels]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["case"] for each in made} == set(kernels), "a kernel has no case in cross.py that launches anything"
    for each in made:
        assert each["shared"] <= SHARED, each
        assert each["spilled"] <= STACK, each
