"""Scorers at work for one search: what models read is kept per text, so that only what is new is computed."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch

from decoding.core import BadRequest
from decoding.scorers.spec import Hypothesis, Reading, Remote, Rule, Scorer, ScorerSpec, Sum
from decoding.search.host import Host
from decoding.state import Group, Stream

Work = Generator[None, None, Any]  # asked once a tick; it returns its result when it has one
Streams = dict[tuple[ScorerSpec, int], Stream]  # of one text: by scorer, and which part of a sum it is

_threads = ThreadPoolExecutor(16, "trimtab-remote")


def together(works: list[Work]) -> Work:
    """All of `works`, at once; their results in order."""
    results: list[Any] = [None] * len(works)
    left = dict(enumerate(works))
    try:
        while left:
            for i, work in list(left.items()):
                try:
                    next(work)
                except StopIteration as end:
                    results[i] = end.value
                    del left[i]
            if left:
                yield
    finally:
        for work in left.values():
            work.close()
    return results


class Scoring:
    """Scores of one search's texts. `calls`: those to scorers elsewhere that are under way."""

    def __init__(self, owner: Group, host: Host) -> None:
        self._owner, self._host = owner, host
        self._scorers: dict[ScorerSpec, Scorer] = {}
        self.calls: set[Future[list[float]]] = set()

    def score(self, spec: ScorerSpec, text: Hypothesis, streams: Streams) -> Work:
        """The numbers that the scorer gives `text`; `streams` keeps what its models have read. Raises BadRequest."""
        if spec not in self._scorers:
            self._scorers[spec] = self._host.make_scorer(spec, self._owner.request.text_model)
        scorer = self._scorers[spec]
        parts = scorer.parts if isinstance(scorer, Sum) else ((1.0, scorer),)
        found = yield from together([
            self._ask(part, text, streams, (spec, i)) for i, (_, part) in enumerate(parts)
        ])  # fmt: skip
        lengths = {len(values) for values in found}
        if len(lengths) > 1:
            told = " and ".join(str(len(values)) for values in found)
            raise BadRequest(
                f"The parts of a scorer give {told} numbers for one text: they cannot be added.", "decoding"
            )
        return [sum(weight * value for (weight, _), value in zip(parts, column)) for column in zip(*found)]

    def _ask(self, scorer: Scorer, text: Hypothesis, streams: Streams, key: tuple[ScorerSpec, int]) -> Work:
        if hasattr(scorer, "render"):
            return self._read(cast(Reading, scorer), text, streams, key)
        if getattr(scorer, "blocks", False):
            return self._call(cast(Remote, scorer), text)
        return _at_once(cast(Rule, scorer), text)

    def _read(self, reading: Reading, text: Hypothesis, streams: Streams, key: tuple[ScorerSpec, int]) -> Work:
        rendered = reading.render(text)
        stream = streams.get(key)
        if stream is None:
            stream = streams[key] = self._host.stream(self._owner, reading.model)
            stream.wants_hidden = reading.hidden
        self._host.rewrite(stream, rendered.ids, rendered.marks)
        if stream.marks:
            while stream.marks:
                yield
            self._host.rest(stream)
        found = [stream.read[mark] for mark in rendered.marks]
        hidden = [state for _, state in found if state is not None]
        rows = torch.stack([row for row, _ in found]) if found else torch.zeros(0, 1)
        return reading.read(rows, torch.stack(hidden) if hidden else None)

    def _call(self, scorer: Remote, text: Hypothesis) -> Work:
        future = _threads.submit(scorer.score, text)
        self.calls.add(future)
        try:
            while not future.done():
                yield
        finally:
            self.calls.discard(future)
            future.cancel()
        return future.result()


def _at_once(rule: Rule, text: Hypothesis) -> Work:
    yield from ()
    return rule.score(text)


__all__ = ["Scoring", "Streams", "Work", "together"]
