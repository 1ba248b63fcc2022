"""Compiles the C++ kernels once per machine and loads them as torch operators `torch.ops.trimtab.*`.

The library is kept under the user's cache directory ($TRIMTAB_CACHE, or $XDG_CACHE_HOME/trimtab), named by a hash of
everything it depends on. It uses torch's stable ABI and torch's own thread pool, so no second OpenMP runtime is
loaded. Without a C++ compiler there are no kernels, one warning, and the torch path serves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
SOURCES = tuple(HERE / f"host_{name}.cpp" for name in ("attention", "linear", "fusion", "lora"))
HEADER = HERE / "host_vectors.h"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11


def cache_directory() -> Path:
    """Where compiled kernels are kept between runs."""
    own = os.environ.get("TRIMTAB_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "trimtab"


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, else g++; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


@cache
def load_kernels() -> bool:
    """Make `torch.ops.trimtab` available; False (after one warning) where it cannot be built."""
    program = compiler()
    if program is None:
        log.warning("No C++ compiler found: attention and matrix products run in plain torch, which is slower.")
        return False
    try:
        torch.ops.load_library(_build(program))  # type: ignore[no-untyped-call]
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("The CPU kernels could not be built, plain torch serves instead: %s", str(detail)[-500:])
        return False
    _register_shapes()
    return True


def _build(program: str) -> str:
    target = cache_directory() / f"host_kernels_{_fingerprint(program)}.so"
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    # Two processes may build at once: each writes its own file, and the rename is atomic.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [program, *FLAGS, STABLE_ABI, f"-I{root / 'include'}", *map(str, SOURCES), "-o", str(made)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        made.replace(target)
    return str(target)


def _fingerprint(program: str) -> str:
    """Hash of source, flags, compiler, torch and this processor's features (-march=native)."""
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    processor = Path("/proc/cpuinfo")
    features = ""
    if processor.exists():
        lines = processor.read_text(errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    parts = [
        *(file.read_text() for file in (*SOURCES, HEADER)),
        *FLAGS,
        STABLE_ABI,
        version,
        torch.__version__,
        platform.machine(),
        features,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _register_shapes() -> None:
    """Tell torch.compile the outputs' shapes, so that it can go round the operators."""

    def attend(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_rest: object) -> torch.Tensor:
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])

    def linear(x: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def lora(*_: object) -> None:
        pass

    torch.library.register_fake("trimtab::attend", attend)
    torch.library.register_fake("trimtab::lora", lora)
    torch.library.register_fake("trimtab::linear", linear)
