"""JSON values as dataclasses: what a schema would have said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from decoding.scorers.spec import ScorerParams, ScorerSpec
from decoding.search import SEARCHES
from decoding.search.typed import typed


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Outer:
    n: int
    scorer: ScorerSpec | None = None
    how: Literal["a", "b"] = "a"
    inner: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (1, "x")
    free: dict[str, Any] | None = None
    flag: bool = False


def test_values_become_what_the_fields_say() -> None:
    made = typed(
        Outer,
        {
            "n": 3,
            "scorer": {"parts": [{"rule": "length", "weight": 2}, {"keywords": ["a", "b"]}]},
            "how": "b",
            "inner": [{"name": "x", "share": 2}, {"name": "y"}],
            "pair": [2, "y"],
            "free": {"any": [1]},
            "flag": True,
        },
    )
    parts = (ScorerParams(rule="length", weight=2.0), ScorerParams(keywords=("a", "b")))
    inner = (Inner("x", 2.0), Inner("y"))
    assert made == Outer(3, ScorerParams(parts=parts), "b", inner, (2, "y"), {"any": [1]}, True)
    assert hash(made.scorer) == hash(ScorerParams(parts=parts)), "scorers are keys"
    assert typed(Outer, {"n": 1, "scorer": "prm"}) == Outer(1, "prm")
    assert typed(Outer, {"n": 1, "scorer": ScorerParams(json=True), "free": None}).scorer == ScorerParams(json=True)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "lacks a parameter: 'n'"),
        ({"n": 1, "m": 2}, "has no parameter 'm', but n, scorer"),
        ({"n": "1"}, "'n' cannot be '1'"),
        ({"n": True}, "'n' cannot be True"),
        ({"n": 1.0}, "'n' cannot be 1.0"),
        ({"n": 1, "flag": 1}, "'flag' cannot be 1"),
        ({"n": 1, "how": "c"}, "'how' cannot be 'c'"),
        ({"n": 1, "scorer": 5}, "'scorer' cannot be 5"),
        ({"n": 1, "scorer": {"x": 1}}, "has no parameter 'x', but model"),
        ({"n": 1, "scorer": {"regex": 1}}, "'regex' cannot be 1"),
        ({"n": 1, "inner": {}}, "'inner' cannot be {}"),
        ({"n": 1, "inner": [{}]}, "lacks a parameter: 'name'"),
        ({"n": 1, "pair": [1]}, "'pair' cannot be"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError) as refused:
        typed(Outer, values)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", SEARCHES)
def test_it_understands_every_searchs_parameters(name: str) -> None:
    """Each kind's own defaults fit."""
    params = SEARCHES[name].params
    given: dict[str, Any] = {"scorer": "prm", "draft": "a", "small": "a", "nudger": "a", "references": []} | {
        "threshold": 0.5
    }
    mine = {key: value for key, value in given.items() if key in params.__dataclass_fields__}
    made = typed(params, mine)
    again = typed(params, {key: getattr(made, key) for key in params.__dataclass_fields__})
    assert made == again
