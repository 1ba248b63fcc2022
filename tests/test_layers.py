"""The layers: what may import what, and that the engine's process never loads a web framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from decoding.search import SEARCHES
from decoding.search import table as searches_table
from decoding.strategies import STRATEGIES, table

ROOT = Path(__file__).parent.parent
OURS = {"server", "decoding", "triton_kernels", "training", "clients"}
MAY = {
    "triton_kernels": set(),
    "decoding": {"triton_kernels"},
    "training": {"decoding", "triton_kernels"},
    "server": {"decoding"},
    "clients": set(),
}
WEB = {"fastapi", "pydantic", "starlette", "uvicorn", "sse_starlette"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(OURS))
def test_packages_import_only_the_layers_below(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        used = imports(path)
        assert used & OURS <= MAY[package] | {package}, path
        if package in ("decoding", "triton_kernels"):
            assert not used & WEB, path


def test_the_engine_loads_no_web_framework() -> None:
    code = f"import sys, decoding.engine, decoding.models; print(*sorted(set(sys.modules) & {WEB!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_strategy_is_named_outside_its_own_file() -> None:
    names = set(STRATEGIES) - {"plain"}
    for package in ("decoding", "server"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent.name == "strategies" or path.name == "family.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.Constant) and node.value in names), f"{path} names {node.value!r}"


def test_no_search_is_named_outside_the_searches() -> None:
    shared = {"auto", "lookahead", "beam"}  # words of other meanings too
    for package in ("decoding", "server"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent.name == "search":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                found = isinstance(node, ast.Constant) and node.value in set(SEARCHES) - shared
                assert not found, f"{path} names a search"


def test_the_readmes_table_of_searches_is_generated() -> None:
    """`python -m decoding.search` prints it."""
    assert searches_table() in (ROOT / "README.md").read_text()


def test_the_readmes_table_of_strategies_is_generated() -> None:
    """`python -m decoding.strategies` prints it."""
    assert table() in (ROOT / "README.md").read_text()
