"""Prometheus metrics `trimtab_*`: what clients asked for and got, and what the engine last told of itself.

One registry per `Metrics`, so that several servers (or tests) in a process do not meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from decoding.events import SearchReport, Stats
from server.bridge import Bridge
from server.generation import Job

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class EngineCollector(Collector):
    """The engine's own numbers, read from its last snapshot when Prometheus asks."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Gauges and counters of the last snapshot."""
        yield GaugeMetricFamily("trimtab_up", "Whether the engine runs", float(self._bridge.alive))
        yield GaugeMetricFamily("trimtab_sequences", "Sequences in the engine", float(self._bridge.sequences))
        stats = self._bridge.stats
        if stats is None:
            return
        yield GaugeMetricFamily("trimtab_running_sequences", "Sequences that run", stats.running)
        yield GaugeMetricFamily("trimtab_waiting_sequences", "Sequences that wait", stats.waiting)
        yield CounterMetricFamily("trimtab_ticks", "Ticks of the engine", stats.ticks)
        yield CounterMetricFamily("trimtab_preemptions", "Sequences preempted for memory", stats.preemptions)
        yield CounterMetricFamily("trimtab_aborts", "Requests aborted", stats.aborts)
        yield from self._models(stats)

    def _models(self, stats: Stats) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        used = GaugeMetricFamily("trimtab_kv_used_ratio", "Share of KV blocks in use", labels=["model"])
        counters = {
            "forwards": CounterMetricFamily("trimtab_forwards", "Forward passes", labels=["model"]),
            "tokens": CounterMetricFamily("trimtab_forward_tokens", "Positions computed", labels=["model"]),
            "forward_seconds": CounterMetricFamily("trimtab_forward_seconds", "Time in forwards", labels=["model"]),
            "prefix_hits": CounterMetricFamily("trimtab_prefix_hits", "Prefix cache blocks hit", labels=["model"]),
            "prefix_queries": CounterMetricFamily(
                "trimtab_prefix_queries", "Prefix cache blocks asked for", labels=["model"]
            ),
        }
        for model in stats.models:
            used.add_metric([model.id], model.kv_used)
            for name, family in counters.items():
                family.add_metric([model.id], getattr(model, name))
        yield used
        yield from counters.values()
        labels = ["draft", "model", "position"]
        drafted = CounterMetricFamily("trimtab_drafted_tokens", "Drafts verified, by place in the draft", labels=labels)
        accepted = CounterMetricFamily(
            "trimtab_accepted_tokens", "Drafts accepted, by place in the draft", labels=labels
        )
        for pair in stats.drafts:
            for family, counts in ((drafted, pair.drafted), (accepted, pair.accepted)):
                for position, count in enumerate(counts):
                    family.add_metric([pair.draft, pair.target, str(position)], count)
        yield drafted
        yield accepted


class Metrics:
    """Counters and histograms of the HTTP side; `text()` is the exposition."""

    def __init__(self, bridge: Bridge) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(bridge))
        labels = ["model", "strategy"]
        self.requests = Counter(
            "trimtab_requests", "Requests by how they ended", [*labels, "outcome"], registry=self.registry
        )
        self.refused = Counter(
            "trimtab_refused", "Requests refused before they ran", ["status"], registry=self.registry
        )
        self.tokens = Counter("trimtab_tokens", "Tokens of requests", [*labels, "kind"], registry=self.registry)
        self.searches = Counter(
            "trimtab_searches", "Searches by how they ended", ["model", "search", "outcome"], registry=self.registry
        )
        self.candidates = Counter(
            "trimtab_search_branches", "Hypotheses of searches", ["model", "search"], registry=self.registry
        )
        self.scored = Counter(
            "trimtab_scored_tokens", "Tokens that scorers computed for searches", ["scorer"], registry=self.registry
        )
        self.first_token = Histogram(
            "trimtab_time_to_first_token_seconds", "From request to first token", labels, buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "trimtab_inter_token_seconds",
            "Between a request's tokens",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def searched(self, model: str, report: SearchReport) -> None:
        """Counts a search that has come to its end."""
        self.searches.labels(model, report.kind, "exhausted" if report.exhausted else "ok").inc()
        self.candidates.labels(model, report.kind).inc(report.branches)
        for scorer, tokens in report.scored:
            self.scored.labels(scorer).inc(tokens)

    def track(self, job: Job) -> Tracker:
        """Follows one job from now on."""
        return Tracker(self, job)


class Tracker:
    """Times of one job. `progressed` after each batch of events, `end` once."""

    def __init__(self, metrics: Metrics, job: Job) -> None:
        self._labels = (job.name, job.program.strategy)
        self._metrics, self._job = metrics, job
        self._first = metrics.first_token.labels(*self._labels)
        self._between = metrics.between_tokens.labels(*self._labels)
        self._last, self._begun, self._ended = time.monotonic(), False, False

    def progressed(self) -> None:
        """Something has come from the engine."""
        now = time.monotonic()
        (self._between if self._begun else self._first).observe(now - self._last)
        self._last, self._begun = now, True

    def end(self, outcome: str, completion_tokens: int, searches: Sequence[SearchReport] = ()) -> None:
        """`outcome`: ok, error or abort. `searches`: of the job, those that came to their end.

        A search that came to its end is ok, or exhausted if a budget ended it; the others share the job's outcome.
        """
        if self._ended:
            return
        self._ended = True
        self._metrics.requests.labels(*self._labels, outcome).inc()
        self._metrics.tokens.labels(*self._labels, "prompt").inc(self._job.prompt_tokens)
        self._metrics.tokens.labels(*self._labels, "completion").inc(completion_tokens)
        plan = self._job.program.search
        if plan is None:
            return
        for report in searches:
            self._metrics.searched(self._job.name, report)
        lost = len(self._job.requests) - len(searches)
        if lost:
            self._metrics.searches.labels(self._job.name, plan.kind, outcome).inc(lost)
