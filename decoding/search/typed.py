"""JSON values as what a dataclass's fields say, for parameters that no schema has checked."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def typed(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """`cls` of JSON values, as strict as requests are.

    Raises TypeError, a sentence without subject, for a parameter that is lacking, unknown, or of a wrong type.
    """
    resolved = typing.get_type_hints(cls)
    hints = {each.name: resolved[each.name] for each in fields(cls)}
    needed = [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]
    if lacking := [name for name in needed if name not in values]:
        raise TypeError(f"lacks a parameter: '{lacking[0]}'")
    if unknown := [name for name in values if name not in hints]:
        raise TypeError(f"has no parameter '{unknown[0]}', but {', '.join(hints)}")
    return cls(**{name: _fit(name, value, hints[name]) for name, value in values.items()})


def _fit(name: str, value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (is_dataclass(hint) and type(value) is hint):
        return value
    if origin in (typing.Union, types.UnionType):
        return _first(name, value, args)
    if origin is typing.Literal and any(type(value) is type(each) and value == each for each in args):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        each = [args[0]] * len(value) if args[1:] == (...,) else args
        if len(each) == len(value):
            return tuple(_fit(name, part, hint) for part, hint in zip(value, each))
    if is_dataclass(hint) and isinstance(value, Mapping):
        return typed(typing.cast(type[Any], hint), value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(origin or hint, type) and type(value) is (origin or hint):
        return value
    raise TypeError(f"has a parameter of a wrong type: '{name}' cannot be {value!r:.60}")


def _first(name: str, value: Any, hints: tuple[Any, ...]) -> Any:
    """As the first of `hints` that it fits; of an object, what it lacks says more than that it is no text."""
    said: list[TypeError] = []
    for hint in hints:
        try:
            return _fit(name, value, hint)
        except TypeError as error:
            said.insert(0 if is_dataclass(hint) and isinstance(value, Mapping) else len(said), error)
    raise said[0]
