"""Broken copies of a kernel: what a test must notice."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_NUMBERS = itertools.count()


def mutated(path: str | Path, old: str, new: str, tmp_path: Path) -> ModuleType:
    """The module at `path` with `old` replaced by `new`, from a file of its own: triton reads the source of kernels."""
    source = Path(path).read_text()
    assert old in source, f"{path} has no {old!r}"
    name = f"mutant_{next(_NUMBERS)}"
    file = tmp_path / f"{name}.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
