"""Scorers that need no model, and how the numbers of several steps become one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.core import BadRequest
from decoding.scorers.patterns import compiled, search
from decoding.scorers.spec import Hypothesis

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    "min": min,
    "prod": math.prod,
    "mean": lambda values: math.fsum(values) / len(values),
}


def aggregate(values: Sequence[float], how: str) -> float:
    """One number of a scorer's numbers: the last, the smallest, their product or mean. Raises BadRequest.

    What is made of a NaN is NaN.
    """
    if how not in AGGREGATES:
        raise BadRequest(f"'aggregate' must be one of {', '.join(AGGREGATES)}, not '{how}'.", "aggregate")
    if not values:
        raise BadRequest("The scorer gave no number, so there is nothing to aggregate.", "aggregate")
    if how == "min" and any(map(math.isnan, values)):
        return math.nan  # which is as small as any number, and as large
    return float(AGGREGATES[how](values))


def count_words(text: str) -> int:
    """Words as white space parts them."""
    return len(text.split())


@dataclass(frozen=True, slots=True)
class Keywords:
    """The share of `words` that the text holds, as whole words, whatever their case."""

    words: tuple[str, ...]
    one_number: bool = True
    _patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.words, "at least one keyword"
        patterns = (re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in self.words)
        object.__setattr__(self, "_patterns", tuple(patterns))

    def score(self, text: Hypothesis) -> list[float]:
        return [sum(bool(pattern.search(text.text)) for pattern in self._patterns) / len(self.words)]


@dataclass(frozen=True, slots=True)
class WordRange:
    """1 for `low` to `high` words; below n / low, 0 at no words; above 2 - n / high, 0 at twice `high` words."""

    low: int = 0
    high: int | None = None
    one_number: bool = True

    def score(self, text: Hypothesis) -> list[float]:
        words = count_words(text.text)
        if words < self.low:
            return [words / self.low]
        if self.high is not None and words > self.high:
            return [max(0.0, 2.0 - words / self.high)]
        return [1.0]


@dataclass(frozen=True, slots=True)
class Regex:
    """1 if the pattern is found in the text, else 0."""

    pattern: str
    one_number: bool = True

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def score(self, text: Hypothesis) -> list[float]:
        return [float(search(self.pattern, text.text) is not None)]


@dataclass(frozen=True, slots=True)
class ValidJson:
    """1 if the whole text is one JSON value (RFC 8259: no NaN, no Infinity), else 0."""

    one_number: bool = True

    def score(self, text: Hypothesis) -> list[float]:
        try:
            json.loads(text.text, parse_constant=_refuse, parse_int=len, parse_float=len)  # only whether it parses
        except (ValueError, RecursionError):
            return [0.0]
        return [1.0]


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that is known of every text: `name` says which (`MEASURES`)."""

    name: str
    one_number: bool = True

    def score(self, text: Hypothesis) -> list[float]:
        return [MEASURES[self.name](text)]


MEASURES: dict[str, Callable[[Hypothesis], float]] = {
    "likelihood": lambda text: text.logprob,
    "mean_likelihood": lambda text: text.logprob / text.tokens if text.tokens else 0.0,
    "length": lambda text: float(count_words(text.text)),
}
