"""Parameter sets of which only some cases run by default, and all of them with the tests that take minutes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def thinned(cases: Iterable[Sequence[Any]], every: int = 2, start: int = 0) -> list[Any]:
    """Sets of parameters; but for each `every`-th, from `start` on, they are marked as slow."""
    return [
        pytest.param(*case, marks=() if i % every == start else pytest.mark.slow, id="-".join(map(_short, case)))
        for i, case in enumerate(cases)
    ]


def _short(value: Any) -> str:
    return "-".join(value) if isinstance(value, dict) else str(value)
