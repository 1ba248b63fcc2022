"""Regular expressions from clients: within limits of length, size and time, so that none can hold the engine."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

from decoding.core import BadRequest

MAX_PATTERN = 1000  # characters
MAX_TEXT = 100_000  # characters that are searched: the last ones
SECONDS = 0.5  # of processor time
MAX_ITEMS = 10_000  # of a pattern whose least repeats are written out, as its compiler does: 300 bytes each

_PARTS = re.compile(r"\\.|\[\^?[^\]\\]*(?:\\.[^\]\\]*)*\]?|\{\s*(\d+)[^{}]*\}|([()])|.", re.DOTALL)
_TWISTED = re.compile(r"\(\?#|\(\?[A-Za-z0-9-]*x|\[\^?\]|\[[^\]]*\[")  # comments, and sets that may end elsewhere


@functools.lru_cache(256)
def compiled(pattern: str, param: str | None = None) -> Any:
    """The pattern, ready to search. Raises BadRequest if it is none, or too long."""
    import regex  # type: ignore[import-untyped]

    if not pattern or len(pattern) > MAX_PATTERN:
        raise BadRequest(f"A regular expression has 1 to {MAX_PATTERN} characters, not {len(pattern)}.", param)
    if _items(pattern) > MAX_ITEMS:
        raise BadRequest(
            f"The repeats of '{pattern}' come to more than {MAX_ITEMS} items; use smaller counts, or * and +.", param
        )
    try:
        return regex.compile(pattern)
    except RecursionError as error:
        raise BadRequest("The groups of a regular expression are nested too deep.", param) from error
    except (regex.error, ValueError) as error:  # ValueError: flags that exclude each other
        raise BadRequest(f"'{pattern}' is not a regular expression: {error}.", param) from error


def search(pattern: str, text: str, last: bool = False, param: str | None = None) -> Any:
    """The first match, or the last one, in the last MAX_TEXT characters; None if there is none. Raises BadRequest."""
    expression = compiled(pattern, param)
    tail = text[-MAX_TEXT:]
    try:
        if not last:
            return expression.search(tail, timeout=SECONDS)
        matches = collections.deque(expression.finditer(tail, timeout=SECONDS), 1)
        return matches[0] if matches else None
    except TimeoutError as error:
        raise BadRequest(
            f"Searching for '{pattern}' took too long; a pattern without repeats inside repeats is fast.", param
        ) from error


def _items(pattern: str) -> int:
    """How many items a pattern has at most when `a{3}` and `a{3,}` are written as aaa: what compiling it costs."""
    if not _TWISTED.search(pattern):
        return _written_out(pattern)
    spellings = (pattern, re.sub(r"#[^\n]*|\s", "", pattern))  # with white space and comments as they are, or without
    return max(math.prod(_counts(each)) for each in spellings) * len(pattern)


def _counts(pattern: str) -> Iterable[int]:
    return (max(1, int(count)) for count in re.findall(r"\{\s*(\d+)", pattern))


def _written_out(pattern: str) -> int:
    """The sum over all items of the product of the counts around each."""
    before, last = [0], [0]  # of each open group: its items, and those of what a repeat would be of
    for part in _PARTS.finditer(pattern):
        count, bracket = part.groups()
        if count is not None:
            last[-1] *= max(1, int(count))
            continue
        if bracket == "(":
            before.append(0)
            last.append(0)
            continue
        whole = before[-1] + last[-1]
        if bracket is None:
            before[-1], last[-1] = whole, 1
        elif len(before) > 1:
            before.pop()
            last.pop()
            before[-1], last[-1] = before[-1] + last[-1], whole + 1
        else:
            before[-1], last[-1] = 0, whole
    return sum(before) + sum(last)
