"""The packed forwards of a tick, one per model: run, counted, and tried again without the drafters if one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial

from decoding.decide import add_drafted_rows, judged
from decoding.events import ModelStats
from decoding.hosting import ModelRunner, Rows, SpanInput
from decoding.kv import BlockPool
from decoding.pace import Clock
from decoding.plan import Plan, Span
from decoding.scheduler import Scheduler
from decoding.state import Group, Stream
from decoding.streams import Streams, Timer

logger = logging.getLogger("trimtab.engine")


class Forwards:
    """`clock` is told what forwards took; `fail` ends a request, with a sentence. `beside`: see `Streams`."""

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        scheduler: Scheduler,
        clock: Clock,
        fail: Callable[[Group, str], None],
        beside: bool = True,
    ) -> None:
        self._streams = Streams({model: runner.device for model, runner in runners.items()}, beside)
        self._timer = Timer()
        self._runners, self._scheduler, self._clock, self._fail = runners, scheduler, clock, fail
        self._forwards = dict.fromkeys(runners, 0)
        self._tokens = dict.fromkeys(runners, 0)
        self._seconds = dict.fromkeys(runners, 0.0)

    def run_plan(self, plan: Plan) -> dict[str, Rows]:
        """One packed forward per model. A forward that fails takes down the requests in it, nothing else.

        Spans and samples of requests that have failed are gone from the plan afterwards.
        """
        rows: dict[str, Rows] = {}
        read = {s.sequence.tracks[s.sequence.group.term_tracks[0]].model for s in plan.samples if judged(s)}
        read |= {model for model, spans in plan.spans.items() if _wants_hidden(spans)}
        # All inputs first: a failed request gives its blocks back, and other models' forwards still name them.
        inputs = {model: [_span_input(span) for span in spans] for model, spans in plan.spans.items()}
        self._timer.settle()
        for model, spans in plan.spans.items():
            size = sum(s.count for s in spans) if all(span.rows == span.count for span in spans) else 0
            try:
                rows[model] = self._begin(model, inputs[model], _payers(spans), model in read, size)
            except Exception as error:
                found = self._without_drafters(plan, model, error, model in read)
                if found is not None:
                    rows[model] = found
        for model, found in rows.items():
            self._streams.join(model, found)
        for model in plan.spans:
            plan.spans[model] = [span for span in plan.spans[model] if not span.sequence.finished]
        plan.samples = [sample for sample in plan.samples if not sample.sequence.finished]
        add_drafted_rows(plan.samples, rows)
        return rows

    def run(self, model: str, spans: list[SpanInput], payers: set[Group], want_hidden: bool = False) -> Rows:
        """One packed forward, counted. Raises what the runner raises."""
        rows = self._begin(model, spans, payers, want_hidden)
        self._streams.join(model, rows)
        return rows

    def _begin(
        self, model: str, spans: list[SpanInput], payers: set[Group], want_hidden: bool = False, size: int = 0
    ) -> Rows:
        """A forward that may still run; size: how many tokens it is like a decode step of, 0 if it is like none."""
        runner = self._runners[model]
        with self._streams.of(model):
            began = self._timer.begin(runner.device)
            rows = runner.forward(spans, want_hidden)
            self._timer.end(began, partial(self._took, model, size))
        self._forwards[model] += 1
        self._tokens[model] += sum(len(span.token_ids) for span in spans)
        for group in payers:
            group = group.payer
            group.forwards[model] = group.forwards.get(model, 0) + 1
        return rows

    def _took(self, model: str, size: int, seconds: float) -> None:
        self._seconds[model] += seconds
        if size:
            self._clock.saw(("forward", model), size, seconds)

    def stats(self, pools: Mapping[str, BlockPool]) -> tuple[ModelStats, ...]:
        """Counters by model."""
        return tuple(
            ModelStats(
                model,
                self._forwards[model],
                self._tokens[model],
                self._seconds[model],
                pool.used,
                pool.hits,
                pool.queries,
            )
            for model, pool in pools.items()
        )

    def _without_drafters(self, plan: Plan, model: str, error: Exception, want_hidden: bool) -> Rows | None:
        """A forward has failed: without the drafters that were catching up in it, once more; else its requests fail."""
        logger.error("the forward of '%s' failed", model, exc_info=error)
        own = [s for s in plan.spans[model] if s.sequence.draft and s.track is s.sequence.draft.own]
        for span in own:
            if span.sequence.draft:
                self._scheduler.drafts.retire(span.sequence.draft)
        rest = plan.spans[model] = [span for span in plan.spans[model] if span not in own]
        if own and rest:
            try:
                return self._begin(model, [_span_input(span) for span in rest], _payers(rest), want_hidden)
            except Exception as again:
                error = again
                logger.exception("the forward of '%s' failed again", model)
        for group in _payers(rest):
            self._fail(group, f"The forward pass of '{model}' failed: {type(error).__name__}.")
        return None


def _payers(spans: Seq[Span]) -> set[Group]:
    return {span.sequence.group.payer for span in spans}


def _wants_hidden(spans: Seq[Span]) -> bool:
    """Whether a scorer wants hidden states of a model's rows."""
    return any(isinstance(s.sequence, Stream) and s.sequence.wants_hidden and s.marks for s in spans)


def _span_input(span: Span) -> SpanInput:
    return SpanInput(
        span.sequence.ids(span.track, span.start, span.start + span.count),
        span.start,
        span.track.blocks,
        span.offsets,
        span.track.adapter,
    )
