"""Kernels broken on purpose: a test that accepts them could not fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def mutated(path: str | Path, old: str, new: str, tmp_path: Path) -> ModuleType:
    """The module of `path`, with every `old` of its source replaced; kept under `tmp_path`, for triton reads it."""
    source = Path(path).read_text()
    assert old in source, f"{old!r} is not in {path}: the mutation is out of date"
    file = tmp_path / f"mutated_{len(list(tmp_path.iterdir()))}_{Path(path).name}"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[file.stem]
    return module
