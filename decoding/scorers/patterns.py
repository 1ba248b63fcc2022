"""Regular expressions from clients: searched within limits of length and time, so that none can hold the engine."""

from __future__ import annotations

import collections
import functools
from typing import Any

from decoding.core import BadRequest

MAX_PATTERN = 1000  # characters
MAX_TEXT = 100_000  # characters that are searched: the last ones
SECONDS = 0.5  # of processor time


@functools.lru_cache(256)
def compiled(pattern: str, param: str | None = None) -> Any:
    """The pattern, ready to search. Raises BadRequest if it is none, or too long."""
    import regex  # type: ignore[import-untyped]

    if not pattern or len(pattern) > MAX_PATTERN:
        raise BadRequest(f"A regular expression has 1 to {MAX_PATTERN} characters, not {len(pattern)}.", param)
    try:
        return regex.compile(pattern)
    except RecursionError as error:
        raise BadRequest("A regular expression's groups are nested too deeply.", param) from error
    except (regex.error, ValueError) as error:  # the latter for flags that exclude each other
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
