"""Strategies from outside the tree, found by their entry points."""

from __future__ import annotations

from pathlib import Path

import pytest

from decoding.core import ModelLoadError
from decoding.strategies import STRATEGIES, discover

EXAMPLE = Path(__file__).parent.parent.parent / "examples/strategy_plugin"


def installed(folder: Path, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with one entry point, as pip leaves it, on the path."""
    info = folder / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[trimtab.strategies]\n{entry}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_example_is_found_and_builds_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert discover() == STRATEGIES
    monkeypatch.syspath_prepend(str(EXAMPLE))
    installed(tmp_path, "ensemble = trimtab_ensemble:STRATEGY", monkeypatch)
    found = discover()
    assert list(found) == [*STRATEGIES, "ensemble"]
    program = found["ensemble"].build(found["ensemble"].params(others=["expert"]), "base")
    assert [(term.role.model, term.weight) for term in program.policy.terms] == [("base", 0.5), ("expert", 0.5)]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("ensemble = no_such_module:STRATEGY", "cannot be loaded"),
        ("ensemble = json:dumps", "not a Strategy"),
        ("other = trimtab_ensemble:STRATEGY", "not a Strategy of that name"),
        ("plain = decoding.strategies.plain:STRATEGY", "in use"),
    ],
)
def test_a_broken_plugin_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, says: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    installed(tmp_path, entry, monkeypatch)
    with pytest.raises(ModelLoadError, match=says):
        discover()
