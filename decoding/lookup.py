"""Drafts without a model: what followed the last tokens earlier in the text, or in a text that the client predicted."""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """Proposes what followed the last occurrence of the longest recent run of tokens (prompt lookup decoding).

    With `prediction`, drafts come from that text alone, from its start while nothing has been generated. Otherwise
    they come from `prompt` and the output. Runs of `max_ngram` tokens down to one are tried, the longest first.
    """

    def __init__(self, prompt: Sequence[int], max_ngram: int, prediction: Sequence[int] | None = None) -> None:
        self._own = prediction is None
        self._max = max_ngram
        self._source = list(prompt if prediction is None else prediction)  # what drafts are taken from
        self._recent = list(prompt[-max_ngram:])
        self._ends: dict[tuple[int, ...], int] = {}  # run -> where what followed it starts, the last time
        self._at: int | None = 0 if prediction else None  # of a prediction: where the text goes on, while it fits
        self._indexed = 0
        self._index(len(self._source) - 1)

    def push(self, token: int) -> None:
        """`token` is part of the text now."""
        self._recent = [*self._recent, token][-self._max :]
        if self._own:
            self._source.append(token)
            # The run that ends with the newest token has nothing behind it yet: it is indexed with the next one.
            self._index(len(self._source) - 1)
        elif self._at is not None:
            fits = self._at < len(self._source) and self._source[self._at] == token
            self._at = self._at + 1 if fits else None

    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next; none if the last token never occurred before."""
        start = self._at
        for size in range(min(self._max, len(self._recent)), 0, -1):
            if start is not None:
                break
            start = self._ends.get(tuple(self._recent[-size:]))
        return [] if start is None else self._source[start : start + count]

    def _index(self, end: int) -> None:
        """Index every run that ends before position `end` and has something behind it."""
        for stop in range(self._indexed + 1, end + 1):
            for size in range(1, min(self._max, stop) + 1):
                self._ends[tuple(self._source[stop - size : stop])] = stop
        self._indexed = max(self._indexed, end)
