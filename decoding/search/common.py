"""What searches share: checks of parameters, scores of several branches together, candidates in their order."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from decoding.core import BadRequest, Sampling
from decoding.scorers.rules import aggregate
from decoding.scorers.spec import Aggregate, ScorerSpec
from decoding.search.verbs import Branch, Candidate, Drop, Fork, Outcome, Run, Score, Search, Until

MAX_CANDIDATES = 64  # that one parameter may ask for


def whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """BadRequest naming the parameter if it lies outside low .. high."""
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise BadRequest(f"'{name}' must be {span}, not {value}.", name)


def steps(separator: str, step_tokens: int | None) -> Until:
    """Where a step ends: after `step_tokens` tokens if that is given, else with `separator`."""
    return Until(tokens=step_tokens) if step_tokens is not None else Until(separator=separator)


def check_steps(separator: str, step_tokens: int | None) -> None:
    """BadRequest if no step could end there."""
    if step_tokens is not None:
        whole("step_tokens", step_tokens, 1)
    elif not separator:
        raise BadRequest("'separator' must not be empty; give 'step_tokens' for steps of equal length.", "separator")


def greedy(sampling: Sampling) -> Sampling:
    """The same, but always the likeliest token."""
    return replace(sampling, temperature=0.0)


def spent(search: Search) -> bool:
    """Whether tokens or time are used up. Where only candidates are, what there is can still go on."""
    return search.exhausted not in (None, "max_candidates")


def drop(branches: Iterable[Branch]) -> Generator[Any, Any, None]:
    """Give up branches, if there are any."""
    if gone := [Drop(branch) for branch in branches if not branch.dropped]:
        yield gone


def sample(search: Search, n: int) -> Generator[Any, Any, list[Branch]]:
    """n texts from the root, to their ends; fewer when the budget of candidates is used up, but at least one."""
    samples: list[Branch] = (yield Fork(search.root, n)) or [search.root]
    yield from drop({search.root}.difference(samples))
    yield [Run(branch) for branch in samples]
    return samples


def distinct(branches: Sequence[Branch]) -> tuple[list[Branch], list[Branch]]:
    """The first branch of each text, and the others. A text that has ended is not one that may go on."""
    first: dict[tuple[str, object], Branch] = {}
    for branch in branches:
        first.setdefault((branch.text, branch.finished), branch)
    kept = list(first.values())
    return kept, [branch for branch in branches if branch not in kept]


def judge(
    branches: Sequence[Branch], scorer: ScorerSpec, how: Aggregate, ahead: Mapping[Branch, Branch] | None = None
) -> Generator[Any, Any, list[Candidate]]:
    """Each branch with its score; `ahead`: branches in whose place a longer one is scored."""
    longer = ahead or {}
    found: list[list[float]] = (yield [Score(longer.get(b, b), scorer) for b in branches]) if branches else []
    return [
        verdict(branch, values, how, len(branch.steps) if branch in longer else None)
        for branch, values in zip(branches, found, strict=True)
    ]


def verdict(branch: Branch, values: Sequence[float], how: Aggregate, steps: int | None = None) -> Candidate:
    """A branch with its score. Of the scorer's numbers only the first `steps` are its own.

    Without a number, or with one that cannot be compared, the score is None, and it comes last.
    """
    score = aggregate(values, how) if values else math.nan
    own = values if steps is None else values[: max(1, steps)]
    return Candidate(branch, None if math.isnan(score) else score, tuple(own))


def worth(candidate: Candidate) -> float:
    """Its score, minus infinity if it has none."""
    return -math.inf if candidate.score is None else candidate.score


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Best first: those that ended by themselves, by score, then the others. Ties go to the one that came first."""
    return sorted(candidates, key=lambda each: (each.branch.finished != "stop", -worth(each)))


def concluded(
    search: Search, candidates: Sequence[Candidate], limit: str = "", details: dict[str, Any] | None = None
) -> Outcome:
    """The outcome, with a note on every candidate that is no full answer, and a reason if none of them is one.

    limit: what ended the search, if it was no budget and not the length of the texts.
    """
    noted = [each if each.note else replace(each, note=_note(search, each.branch)) for each in candidates]
    why = f"'{search.exhausted}' is used up" if search.exhausted else limit
    reason = ""
    if all(each.branch.finished != "stop" for each in candidates):
        why = why or "all of them were cut by 'max_tokens' or the context"
        reason = f"No hypothesis reached its end: {why}. The answer is the best unfinished one."
    elif search.exhausted:
        reason = f"The search was cut short: {why}."
    return Outcome(noted, reason, details or {})


def _note(search: Search, branch: Branch) -> str:
    if branch.finished == "stop":
        return ""
    if branch.finished == "length":
        return "cut by max_tokens or the context"
    return f"cut by {search.exhausted}" if search.exhausted else "unfinished"
