"""A small model's answer where it can be relied on, else the large one's (Meta Ranking).

Liu et al. 2024, Enabling Weak LLMs to Judge Response Reliability via Meta Ranking, arXiv:2402.12146: the small model
compares its (query, answer) with a few of known reliability, across queries.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from decoding.core import BadRequest, Sampling, says
from decoding.scorers.spec import STRICT
from decoding.search.common import concluded, drop, spent, whole
from decoding.search.prompts import asked, check_template, filled, question
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Open, Probe, Run, Search, Steps
from decoding.strategies.spec import finite

COMPARE = """Here are two questions, each with an answer.

Question A:
{reference_query}
Answer A:
{reference_answer}

Question B:
{query}
Answer B:
{answer}

Which answer is the more reliable one for its own question? Reply (A), (B), or (C) if neither is.

Reply: """
VERDICTS = {"A": -1, "B": 1, "C": 0}  # of the answer against the reference


@dataclass(frozen=True, slots=True)
class Reference:
    """A question with an answer, and whether that is right."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    query: str = field(metadata=says("A question."))
    answer: str = field(metadata=says("An answer to it."))
    reliable: bool = field(metadata=says("Whether the answer is right."))


@dataclass(frozen=True, slots=True)
class Cascade:
    """Parameters of `cascade`."""

    small: str = field(metadata=says("The model that answers first, and compares."))
    references: tuple[Reference, ...] = field(
        metadata=says("Questions with answers of known reliability, right and wrong ones; about five.")
    )
    threshold: float = field(
        default=0.0, metadata=says("Of the mean vote, from -1 to 1; above it the small model's answer is taken.")
    )
    compare: str = field(
        default=COMPARE,
        metadata=says("The comparison, with {reference_query}, {reference_answer}, {query}, {answer}; A, B or C."),
    )


def run(search: Search, params: Cascade) -> Steps:
    """The small model's answer if its comparisons find that reliable, else the request's own model's.

    One of the large model's that was cut does not replace one of the small model's that has ended.
    """
    small: Branch = yield Open(search.prompt, params.small)
    yield Run(small)
    votes = [] if search.exhausted else (yield from _votes(search, params, small.text))
    reliability = sum(votes) / len(votes) if votes else 0.0
    search.progress(f"reliability {reliability:g} of the small model's answer", score=reliability)
    first = Candidate(small, reliability, tuple(votes))
    details = {"votes": votes, "model": params.small}
    if reliability > params.threshold or spent(search):
        yield from drop([search.root])
        return concluded(search, [first], details=details)
    large = search.root
    yield Run(large)
    candidates = [Candidate(large), Candidate(small, reliability, tuple(votes), note="unreliable")]
    candidates.sort(key=lambda each: (each.branch.finished != "stop", not each.branch.tokens))
    model = large.model if candidates[0].branch is large else params.small
    return concluded(search, candidates, details={**details, "model": model})


def _votes(search: Search, params: Cascade, answer: str) -> Generator[Any, Any, list[float]]:
    """One vote per reference."""
    target = {"query": question(search.prompt), "answer": answer}
    shown = [
        filled(params.compare, {**target, "reference_query": each.query, "reference_answer": each.answer})
        for each in params.references
    ]
    opened: list[Branch] = yield [Open(asked(search.prompt, text), params.small) for text in shown]
    found = yield [Probe(branch, "(", tuple(VERDICTS)) for branch in opened]
    yield from drop(opened)
    return [vote(each.reliable, _verdict(lps)) for each, lps in zip(params.references, found, strict=True)]


def _verdict(lps: Sequence[float]) -> int:
    """The likeliest of -1 worse than the reference, 1 better, 0 like it; ties to the earlier one."""
    return list(VERDICTS.values())[max(range(len(lps)), key=lambda i: lps[i])]


def vote(reliable: bool, verdict: int) -> float:
    """(s + r) / 2 with s = 1 for a reliable reference, else -1, and the verdict r.

    What could be expected, worse than a right answer or better than a wrong one, says nothing: 0. Like a reference is
    half a vote, better than a right or worse than a wrong one a whole vote.
    """
    return ((1 if reliable else -1) + verdict) / 2


def check(params: Cascade, _sampling: Sampling) -> None:
    """Raises BadRequest without references, for thresholds out of range, for a template without its places."""
    if not params.references:
        raise BadRequest(
            "'references' must hold one or more, about five, with 'query', 'answer', 'reliable'.", "references"
        )
    whole("references", len(params.references), 1, 32)
    finite("threshold", params.threshold, -1.0, 1.0)
    check_template("compare", params.compare, "reference_query", "reference_answer", "query", "answer")


KIND = SearchKind(
    "cascade",
    "A small model answers; where its answer does not look reliable beside known ones, the large model does.",
    Cascade,
    run,
    "small's y if mean vote of its comparisons > threshold, else large's",
    check,
    models=lambda params: (params.small,),
    answers=lambda _params: 2,
    needs=("small: a smaller causal model", "references: about five answers of known reliability"),
    paper="Liu et al. 2024, Meta Ranking, arXiv:2402.12146",
)
