"""A generator, a verifier and a refiner in turn.

Motwani et al. 2024, MALT: Improving Reasoning with Multi-Agent LLM Training, arXiv:2412.01928, section 3.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

from decoding.core import Sampling, says
from decoding.search.common import concluded, drop, ranked
from decoding.search.prompts import asked, check_template, filled, question
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Open, Run, Search, Steps

VERIFY = """Question:
{question}

Proposed answer:
{answer}

Check the proposed answer step by step. Say for each step whether it holds, name every mistake, and end with what an \
improved answer would have to change.

Review:
"""
REFINE = """Question:
{question}

Proposed answer:
{answer}

Review of it:
{review}

Write the final answer to the question. Keep what is right in the proposed answer and mend what the review finds wrong.

Final answer:
"""

TOO_LONG = "The answer was not refined: with it, the next agent's prompt does not fit into the context."


@dataclass(frozen=True, slots=True)
class Agents:
    """Parameters of `agents`. Models that are not named are the request's own, with its policy."""

    generator: str | None = field(default=None, metadata=says("Answers."))
    verifier: str | None = field(default=None, metadata=says("Reviews the answer."))
    refiner: str | None = field(default=None, metadata=says("Writes the final answer from both."))
    verify: str = field(
        default=VERIFY, metadata=says("What the verifier is shown, with {question} and {answer} in their places.")
    )
    refine: str = field(
        default=REFINE, metadata=says("What the refiner is shown, with {question}, {answer} and {review}.")
    )


def run(search: Search, params: Agents) -> Steps:
    """An answer, a review of it, and the answer that is refined by the review."""
    answer = search.root
    if params.generator is not None:
        yield from drop([search.root])
        answer = yield Open(search.prompt, params.generator)
    yield Run(answer)
    search.progress("an answer is there", tokens=len(answer.tokens))
    found = {"question": question(search.prompt), "answer": answer.text, "review": ""}
    review: Branch | None = None
    if not search.exhausted:
        review = yield from _written(search, filled(params.verify, found), params.verifier)
        if review is not None:
            yield from drop([review])
            found["review"] = review.text
            search.progress("it is reviewed", tokens=len(review.tokens))
    candidates = [Candidate(answer, note="not refined")]
    refined = None
    if review is not None and not search.exhausted:
        refined = yield from _written(search, filled(params.refine, found), params.refiner)
        if refined is not None and (refined.tokens or not search.exhausted):  # a bound may have left no room for it
            candidates.insert(0, Candidate(refined))
    outcome = concluded(search, ranked(candidates), details={"answer": answer.text, "review": found["review"]})
    cut = refined is None and not search.exhausted
    return replace(outcome, reason=outcome.reason or TOO_LONG) if cut else outcome


def _written(search: Search, text: str, model: str | None) -> Generator[Any, Any, Branch | None]:
    """What a model says to a text; None if that does not fit into its context."""
    branch: Branch | None = yield Open(asked(search.prompt, text), model, optional=True)
    if branch is not None:
        yield Run(branch)
    return branch


def check(params: Agents, _sampling: Sampling) -> None:
    """Raises BadRequest for templates without their places."""
    check_template("verify", params.verify, "answer")
    check_template("refine", params.refine, "answer", "review")


KIND = SearchKind(
    "agents",
    "One model answers, one reviews the answer, one refines it.",
    Agents,
    run,
    "y_0 ~ G(x), v ~ V(x, y_0), y ~ R(x, y_0, v)",
    check,
    models=lambda params: (params.generator, params.verifier, params.refiner),
    answers=lambda _params: 2,
    paper="Motwani et al. 2024, MALT, arXiv:2412.01928",
)
