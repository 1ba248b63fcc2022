"""What a strategy is: parameters as a frozen dataclass, and a builder that turns them into a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decoding.core import BadRequest, Program


@dataclass(frozen=True, slots=True)
class Strategy:
    """A row of the strategies dict.

    `params`: a frozen dataclass whose fields are the request's parameters; `build(params, model)` makes the program
    for a request to `model` and raises `BadRequest` with `param` naming the offending field. `needs`: what must be
    served for it, in words. `negative_by_definition`: its minus sign is part of the method.
    """

    name: str
    summary: str
    params: type[Any]
    build: Callable[[Any, str], Program]
    needs: tuple[str, ...] = ()
    lossless: bool = True
    negative_by_definition: bool = False
    paper: str = ""


def finite(name: str, value: float) -> float:
    """`value`, or a BadRequest naming the parameter if it is NaN or infinite."""
    if not math.isfinite(value):
        raise BadRequest(f"'{name}' must be a finite number, not {value}.", name)
    return value
