"""Broken copies of a kernel file: a comparison that passes them is not one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def mutated(path: str | Path, old: str, new: str, tmp_path: Path) -> ModuleType:
    """The module at `path` with `old`, which must be there, replaced by `new`; its file lies in `tmp_path`."""
    source = Path(path).read_text()
    assert old in source, f"{path} has no {old!r}"
    name = f"mutant_{Path(path).stem}_{len(list(tmp_path.iterdir()))}"
    file = tmp_path / f"{name}.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
