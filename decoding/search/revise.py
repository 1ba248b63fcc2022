"""Answers revised one after the other, in chains side by side.

Snell et al. 2024, Scaling LLM Test-Time Compute Optimally, arXiv:2408.03314, section 6.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from decoding.answers import check_extraction, extract
from decoding.core import BadRequest, Sampling, says
from decoding.scorers.spec import Aggregate, Hypothesis, ScorerSpec
from decoding.search.common import MAX_CANDIDATES, concluded, ranked, sample, verdict, whole
from decoding.search.prompts import continued
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Judge, Open, Run, Search, Steps
from decoding.search.voting import weighted

REQUEST = "Go through the answer above, find what is wrong or could be better in it, and write an improved answer."

TOO_LONG = "A chain ended early: what its next answer would have been shown does not fit into the context."


@dataclass(frozen=True, slots=True)
class Revise:
    """Parameters of `revise`; chains x length answers in all."""

    chains: int = field(default=1, metadata=says("Chains of answers, side by side."))
    length: int = field(default=4, metadata=says("Answers in each chain, the first one counted."))
    context: int = field(default=4, metadata=says("The last answers of a chain that a revision is shown."))
    scorer: ScorerSpec | None = field(default=None, metadata=says("Picks the best answer; without it the majority."))
    aggregate: Aggregate = field(default="last", metadata=says("How the scores of the steps become one."))
    answer: Literal["auto", "last_number", "boxed"] = field(
        default="auto", metadata=says("Majority: what of a text is its answer.")
    )
    answer_regex: str | None = field(
        default=None, metadata=says("Majority: the answer is what this matches last, or its group.")
    )
    request: str = field(default=REQUEST, metadata=says("What is said after every earlier answer."))


def run(search: Search, params: Revise) -> Steps:
    """Every answer but a chain's first is asked for with the earlier ones of its chain shown."""
    chains = [[branch] for branch in (yield from sample(search, params.chains))]
    going = chains
    for length in range(2, params.length + 1):
        if search.exhausted or not going:
            break
        shown = [[branch.text for branch in chain[-params.context :]] for chain in going]
        prompts = [continued(search.prompt, texts, params.request) for texts in shown]
        opened: list[Branch | None] = yield [Open(prompt, optional=True) for prompt in prompts]
        revisions = {i: branch for i, branch in enumerate(opened) if branch is not None}
        if revisions:
            yield [Run(branch) for branch in revisions.values()]
        for i, revision in revisions.items():
            if revision.tokens or not search.exhausted:  # a bound may have left no room for it
                going[i].append(revision)
        going = [going[i] for i in revisions]
        search.progress(f"answer {length} of {params.length}", answers=length)
    answers = [branch for chain in chains for branch in chain]
    if params.scorer is None:
        found = by_majority(answers, params.answer if params.answer_regex is None else params.answer_regex)
    else:
        found = ranked((yield from _scored(search, params, answers)))
    outcome = concluded(search, found, details={"chains": [[branch.text for branch in chain] for chain in chains]})
    return outcome if len(going) == len(chains) else replace(outcome, reason=outcome.reason or TOO_LONG)


def _scored(search: Search, params: Revise, answers: Sequence[Branch]) -> Generator[Any, Any, list[Candidate]]:
    """All answers as answers to the request itself, whatever they were shown."""
    assert params.scorer is not None
    hypotheses = [
        Hypothesis(search.prompt, tuple(b.steps), b.finished == "stop", b.logprob, len(b.tokens)) for b in answers
    ]
    found = yield [Judge(hypothesis, params.scorer) for hypothesis in hypotheses]
    return [verdict(branch, values, params.aggregate) for branch, values in zip(answers, found, strict=True)]


def by_majority(branches: Sequence[Branch], how: str) -> list[Candidate]:
    """The most frequent final answer first, with its number of votes. Only whole texts vote, if there are any."""
    judged = [Candidate(branch, answer=extract(branch.text, how)) for branch in branches]
    answered = [each for each in judged if each.answer is not None]
    voters = [each for each in answered if each.branch.finished == "stop"] or answered
    order, votes = weighted([each.answer or "" for each in voters], [1.0] * len(voters), [0.0] * len(voters))
    first = [replace(voters[i], score=votes[i]) for i in order]
    return [*first, *ranked(each for each in judged if each not in voters)]


def check(params: Revise, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("chains", params.chains, 1, MAX_CANDIDATES)
    whole("length", params.length, 1, MAX_CANDIDATES)
    whole("context", params.context, 1)
    if params.chains * params.length > MAX_CANDIDATES:
        raise BadRequest(f"'chains' times 'length' must be at most {MAX_CANDIDATES}.", "length")
    if params.answer_regex is not None:
        check_extraction(params.answer_regex, "answer_regex")
    if not params.request.strip():
        raise BadRequest("'request' must say what is to be done with an answer.", "request")


KIND = SearchKind(
    "revise",
    "The model revises its own answers, one after the other; the best or the most frequent one wins.",
    Revise,
    run,
    "y_{i+1} ~ P(. | x, y_{i-3}, .., y_i); best by scorer or majority",
    check,
    scorers=lambda params: (params.scorer,),
    temperature=0.8,
    independent=lambda params: params.chains,
    paper="Snell et al. 2024, arXiv:2408.03314",
)
