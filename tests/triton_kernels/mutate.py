"""Broken copies of a kernel file, which the tests of that kernel must notice."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def mutated(path: Path, old: str, new: str, tmp_path: Path) -> ModuleType:
    """The module at `path` with `old`, which it must hold, replaced by `new`; a file, as Triton reads sources."""
    source = path.read_text()
    assert old in source, f"{path.name} holds no {old!r} to break"
    name = f"mutated_{path.stem}_{next(_numbers)}"
    copy = tmp_path / f"{name}.py"
    copy.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
