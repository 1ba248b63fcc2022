"""Answers: the whole one of a request that does not stream, and what streamed and whole answers share.

`Progress` reads a job's events once, for either: who finished and why, usage, the `decoding` report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.events import Delta, Done, Event, Failed, PromptLogprobs, SearchReport, TokenLogprob
from decoding.events import Progress as SearchProgress
from server.errors import from_failed
from server.generation import Job
from server.logprobs import TextLogprobs, chat_logprobs, joined, reported


class Progress:
    """What is known of a running job. Events go in through `take`, which yields those of choices, renumbered.

    Raises ApiError when the request has failed inside the engine.
    """

    def __init__(self, job: Job, positions: dict[str, int]) -> None:
        self.job = job
        self._positions = positions
        self._left = len(positions)
        self.completion_tokens = self.cached_tokens = self.preemptions = 0
        self.drafted = self.accepted = self.passes = 0
        self.forwards: dict[str, int] = {}
        self._searches: dict[int, SearchReport] = {}
        self.stop_reasons: list[int | str | None] = [None] * job.choices
        self.unfinished = job.choices

    @property
    def done(self) -> bool:
        """Every engine request has ended."""
        return self._left == 0

    @property
    def searches(self) -> list[SearchReport]:
        """Reports of the searches that have ended, in the order of their prompts."""
        return [report for _, report in sorted(self._searches.items())]

    def take(self, events: Sequence[Event]) -> list[tuple[int, Delta | PromptLogprobs | SearchProgress]]:
        """Counts the events; returns deltas with their choice, and other ones with their prompt's position."""
        shown: list[tuple[int, Delta | PromptLogprobs | SearchProgress]] = []
        for event in events:
            position = self._positions[event.request_id]
            if isinstance(event, Delta):
                choice = position * self.job.n + event.index
                if self.job.program.search is None:
                    self.completion_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    self.stop_reasons[choice] = event.stop_reason
                    self.unfinished -= 1
                shown.append((choice, event))
            elif isinstance(event, PromptLogprobs | SearchProgress):
                shown.append((position, event))
            elif isinstance(event, Failed):
                raise from_failed(event)
            elif isinstance(event, Done):
                self._end(position, event)
        return shown

    def _end(self, position: int, event: Done) -> None:
        self._left -= 1
        if event.usage.search is not None:  # every hypothesis counts, not only those that are shown
            self._searches[position] = event.usage.search
            self.completion_tokens += event.usage.completion_tokens
        self.cached_tokens += event.usage.cached_tokens
        self.preemptions += event.usage.preemptions
        self.drafted += event.usage.drafted
        self.accepted += event.usage.accepted
        self.passes += event.usage.passes
        for model, passes in event.usage.forwards:
            self.forwards[model] = self.forwards.get(model, 0) + passes

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, as of now."""
        prompt, completion = self.job.prompt_tokens, self.completion_tokens
        made = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.job.program.speculation is not None:
            made["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            }
        return made

    def decoding(self) -> dict[str, Any]:
        """The report of how the answer was made. `stop_reasons`: one per choice, a stop string or id, null else."""
        program, spec = self.job.program, self.job.program.speculation
        drafts = None
        if spec is not None:
            drafts = {
                "draft": spec.draft,
                "accept": spec.accept,
                "drafted": self.drafted,
                "accepted": self.accepted,
                "block_efficiency": round(self.completion_tokens / self.passes, 4) if self.passes else None,
            }
        return {
            "strategy": program.strategy,
            "lossless": program.lossless and program.search is None,
            "models": list(dict.fromkeys([*program.models, *self.forwards])),
            "forwards": self.forwards,
            "preemptions": self.preemptions,
            "speculation": drafts,
            "stop_reasons": self.stop_reasons,
            "search": self._search(),
        }

    def _search(self) -> Any:
        """The report of the search; a list of them where there are several prompts."""
        if self.job.program.search is None:
            return None
        reports = [search_report(report) for report in self.searches]
        if len(self.job.requests) > 1:
            return reports
        return reports[0] if reports else None


def search_report(report: SearchReport) -> dict[str, Any]:
    """How a search went, as JSON. `scored`: tokens that scorer models computed; they are not in `usage`."""
    made: dict[str, Any] = {
        "kind": report.kind,
        "reason": report.reason or None,
        "exhausted": report.exhausted,
        "branches": report.branches,
        "generated_tokens": report.generated,
        "scored_tokens": dict(report.scored),
        "details": _plain(dict(report.details)),
    }
    if report.candidates:
        made["candidates"] = [
            {
                "text": each.text,
                "tokens": each.tokens,
                "finish_reason": each.finish_reason,
                "score": number(each.score),
                "scores": [number(value) for value in each.scores],
                "answer": each.answer,
                "note": each.note or None,
            }
            for each in report.candidates
        ]
    return made


def number(value: float | None) -> float | None:
    """JSON has no infinities."""
    return None if value is None or not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """`value` as JSON can say it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return number(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def trace_entries(delta: Delta) -> list[dict[str, Any]]:
    """The traces of a delta's tokens as JSON; infinities are reported as in log-probs."""
    return [
        {
            "token_id": entry.token_id,
            "logprob": reported(entry.logprob),
            "rank": entry.rank,
            "drafted": entry.drafted,
            "accepted": entry.accepted,
            "roles": [
                {"role": role.role, "logprob": reported(role.logprob), "weight": role.weight} for role in entry.roles
            ],
        }
        for entry in delta.trace
    ]


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)


class Answer:
    """A whole answer, gathered from a job's events."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self._choices = [_Choice() for _ in range(job.choices)]
        self._prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}

    def take(self, events: Sequence[Event]) -> None:
        """Adds events. Raises ApiError when the request has failed."""
        for index, event in self.progress.take(events):
            if isinstance(event, PromptLogprobs):
                self._prompt_logprobs[index] = event.logprobs
                continue
            if isinstance(event, SearchProgress):
                continue
            choice = self._choices[index]
            choice.texts.append(event.text)
            choice.token_ids.extend(event.token_ids)
            choice.logprobs.extend(event.logprobs)
            choice.trace.extend(trace_entries(event))
            choice.finish_reason = event.finish_reason or choice.finish_reason

    def body(self) -> dict[str, Any]:
        """The response's body."""
        job = self.job
        report = self.progress.decoding()
        if job.program.trace:
            report["trace"] = [choice.trace for choice in self._choices]
        return {
            "id": job.id,
            "object": "chat.completion" if job.chat else "text_completion",
            "created": job.created,
            "model": job.name,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": self.progress.usage(),
            "system_fingerprint": None,
            "decoding": report,
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        job, text = self.job, "".join(choice.texts)
        made: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason}
        if job.chat:
            made["message"] = {"role": "assistant", "content": text, "refusal": None}
            made["logprobs"] = None if job.logprobs is None else chat_logprobs(job.text.vocabulary, choice.logprobs)
        else:
            position = index // job.n
            made["text"] = job.echoes[position] + text if job.echoes else text
            made["logprobs"] = None if job.logprobs is None else self._text_logprobs(position, choice)
        if job.return_token_ids:
            made["token_ids"] = choice.token_ids
            made["prompt_token_ids"] = list(job.requests[index // job.n].prompts[0])
        return made

    def _text_logprobs(self, position: int, choice: _Choice) -> dict[str, Any] | None:
        job = self.job
        made = TextLogprobs(job.text.vocabulary, job.skip_special_tokens)
        parts = []
        if job.echoes:
            ids = job.requests[position].prompts[0]
            entries = self._prompt_logprobs.get(position, (None,) * len(ids))  # none are sent for a single token
            parts.append(made.prompt(ids, entries, job.echoes[position]))
        parts.append(made.answer(choice.logprobs))
        return joined(parts)
