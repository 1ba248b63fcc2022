"""Drafts without a model: what followed the last tokens earlier in the text, or in a text that the client predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

CANDIDATES = 64  # earlier places that are looked at, the latest first


class Source:
    """Ids in which runs are looked up, indexed once, when first needed. Shared by the choices of a request."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self._places: dict[int, list[int]] | None = None

    def places(self, token: int) -> Sequence[int]:
        """Where `token` stands, ascending."""
        if self._places is None:
            self._places = {}
            for at, each in enumerate(self.ids):
                self._places.setdefault(each, []).append(at)
        return self._places.get(token, ())


class Lookup:
    """Proposes what followed the last occurrence of the longest recent run of tokens (prompt lookup decoding).

    With a prediction, `source` is that text, and drafts come from it alone, from its start while nothing has been
    generated. Otherwise `source` is the prompt, and drafts come from prompt and output; a draft that reaches the end of
    the text goes on with itself, so that repetitions go on. Runs of up to `max_ngram` tokens are compared.
    """

    def __init__(self, prompt: Sequence[int], source: Source, max_ngram: int, predicted: bool = False) -> None:
        self._prompt, self._source, self._max, self._predicted = prompt, source, max_ngram, predicted
        self._output: list[int] = []
        self._places: dict[int, list[int]] = {}  # of output tokens with something behind them
        self._at: int | None = 0 if predicted else None  # of a prediction: where the text goes on, while it fits

    def push(self, token: int) -> None:
        """`token` is part of the text now."""
        if self._output:
            self._places.setdefault(self._output[-1], []).append(len(self._output) - 1)
        self._output.append(token)
        if self._at is not None:
            ids = self._source.ids
            self._at = self._at + 1 if self._at < len(ids) and ids[self._at] == token else None

    def fork(self) -> Lookup:
        """Another one for a text that begins in the same way."""
        made = Lookup(self._prompt, self._source, self._max, self._predicted)
        for token in self._output:
            made.push(token)
        return made

    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next; none if the last token never occurred before."""
        start = self._at if self._at is not None else self._longest()
        if start is None:
            return []
        if self._predicted:
            return list(self._source.ids[start : start + count])
        found: list[int] = []
        length = len(self._prompt) + len(self._output)
        for at in range(start, start + count):
            found.append(self._token(at) if at < length else found[at - length])
        return found

    def _longest(self) -> int | None:
        """What follows the longest run that ends as the text does; of equally long ones the latest."""
        recent = [*self._prompt[-self._max :], *self._output[-self._max :]][-self._max :]
        if not recent:
            return None
        best, start = 0, None
        for _, end in zip(range(CANDIDATES), self._ends(recent[-1])):
            size = 1
            while size < len(recent) and size <= end and self._token(end - size) == recent[-1 - size]:
                size += 1
            if size > best:
                best, start = size, end + 1
            if best == len(recent):
                break
        return start

    def _ends(self, token: int) -> Iterator[int]:
        """Where `token` stands with something behind it, the latest first."""
        first = reversed(self._source.places(token))
        if self._predicted:
            return iter(first)
        offset = len(self._prompt)
        own = (offset + at for at in reversed(self._places.get(token, [])))
        last = offset - 1 if not self._output else -1  # the prompt's last id has nothing behind it yet
        return chain(own, (at for at in first if at != last))

    def _token(self, at: int) -> int:
        if self._predicted:
            return self._source.ids[at]
        return self._prompt[at] if at < len(self._prompt) else self._output[at - len(self._prompt)]
