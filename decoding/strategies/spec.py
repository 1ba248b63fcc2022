"""What a strategy is: parameters as a frozen dataclass, and a builder that turns them into a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from decoding.core import MAX_WEIGHT, BadRequest, Program, View, ViewKind

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}  # how nested parameters are read from JSON
ViewParam = str | dict[str, Any]
_VIEW_HELP = '"auto", "plain", "chat", {"system": text}, {"prefix": text}, {"messages": [...]} or {"text": text}'


@dataclass(frozen=True, slots=True)
class Strategy:
    """A row of the strategies dict.

    `params`: a frozen dataclass whose fields are the request's parameters; `build(params, model)` makes the program
    for a request to `model` and raises `BadRequest` with `param` naming the offending field. `formula`: the mixed
    logits. `needs`: what must be served for it, in words.
    """

    name: str
    summary: str
    params: type[Any]
    build: Callable[[Any, str], Program]
    formula: str = "z"
    needs: tuple[str, ...] = ()
    lossless: bool = True
    paper: str = ""


def finite(name: str, value: float, low: float | None = None, high: float | None = None) -> float:
    """`value`, or a BadRequest naming the parameter if it is NaN, infinite, or outside low .. high."""
    if not math.isfinite(value):
        raise BadRequest(f"'{name}' must be a finite number, not {value}.", name)
    if (low is not None and value < low) or (high is not None and value > high):
        span = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise BadRequest(f"'{name}' must be {span}, not {value:g}.", name)
    return value


def bounded(name: str, value: float) -> float:
    """`value`, or a BadRequest naming the parameter if no term may have that weight."""
    return finite(name, value, -MAX_WEIGHT, MAX_WEIGHT)


def some(name: str, values: list[Any] | Any) -> list[Any]:
    """A list of one or more, from a list or a single value; BadRequest if it is empty."""
    listed = values if isinstance(values, list) else [values]
    if not listed:
        raise BadRequest(f"'{name}' must not be empty.", name)
    return listed


def parse_view(value: ViewParam | None, name: str = "view") -> View:
    """A view as requests write it. Raises BadRequest naming the parameter."""
    if value is None:
        return View()
    if isinstance(value, str) and value in ("auto", "plain", "chat"):
        return View(cast(ViewKind, value))
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind in ("system", "prefix", "text") and isinstance(content, str):
            return View(cast(ViewKind, kind), text=content)
        if kind == "messages" and isinstance(content, list) and content and all(_is_message(m) for m in content):
            return View("messages", messages=tuple(content))
    raise BadRequest(f"'{name}' must be {_VIEW_HELP}.", name)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value
