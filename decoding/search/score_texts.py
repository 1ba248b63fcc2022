"""Scores of texts that are already there; what `/v1/score` runs. Not offered as a search."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from decoding.core import BadRequest, Sampling
from decoding.scorers.rules import aggregate
from decoding.scorers.spec import Aggregate, Hypothesis, ScorerParams, ScorerSpec
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Drop, Feed, Judge, Open, Outcome, Score, Search, Steps
from decoding.text import Prompt


@dataclass(frozen=True, slots=True)
class ScoreTexts:
    """texts: (prompt, answer in steps). writer: the model whose likelihood is meant, if the scorer asks for one."""

    texts: tuple[tuple[Prompt, tuple[str, ...]], ...]
    scorer: ScorerSpec
    aggregate: Aggregate = "last"
    writer: str | None = None


def run(search: Search, params: ScoreTexts) -> Steps:
    """One candidate per text, in their order."""
    if weighs(params.scorer):
        found: list[list[float]] = yield from _under_the_policy(params)
    else:
        found = yield [Judge(Hypothesis(prompt, steps, True), params.scorer) for prompt, steps in params.texts]
    return Outcome(
        [
            Candidate(Branch(), aggregate(values, params.aggregate), tuple(values), "".join(steps))
            for values, (_, steps) in zip(found, params.texts, strict=True)
        ]
    )


def _under_the_policy(params: ScoreTexts) -> Generator[Any, Any, list[list[float]]]:
    """Scores that need the texts' log-probabilities: each is fed to the model. Raises BadRequest for one too long.

    A text is fed in one piece: its tokens do not depend on where steps end, and none of these scorers reads steps.
    """
    branches = yield [Open(prompt, params.writer, Sampling(ignore_eos=True)) for prompt, _ in params.texts]
    wholes = ["".join(steps) for _, steps in params.texts]
    yield [Feed(branch, whole, step=True, logprobs=True) for branch, whole in zip(branches, wholes, strict=True)]
    for branch, whole in zip(branches, wholes, strict=True):
        if branch.finished == "length" and branch.text != whole:
            raise BadRequest(
                f"A text is too long: with its prompt it does not fit into the context of '{branch.model}'.",
                "max_tokens",
                "context_length_exceeded",
            )
    found: list[list[float]] = yield [Score(branch, params.scorer) for branch in branches]
    yield [Drop(branch) for branch in branches]
    return found


def weighs(scorer: ScorerSpec) -> bool:
    """Whether it, or a part of it, reads the policy's log-probability."""
    if not isinstance(scorer, ScorerParams):
        return False
    return scorer.rule in ("likelihood", "mean_likelihood") or any(weighs(part) for part in scorer.parts)


KIND = SearchKind("score", "Scores of given texts.", ScoreTexts, run, scorers=lambda params: (params.scorer,))
