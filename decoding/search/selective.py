"""Answers that are declined when their predicted quality is low (Self-J).

Ye et al. 2024, Self-Judge: Selective Instruction Following with Alignment Self-Evaluation, arXiv:2409.00935.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.core import Sampling, says
from decoding.scorers.rules import aggregate
from decoding.scorers.spec import Aggregate, ScorerSpec
from decoding.search.common import concluded
from decoding.search.spec import SearchKind
from decoding.search.verbs import Candidate, Run, Score, Search, Steps
from decoding.strategies.spec import finite


@dataclass(frozen=True, slots=True)
class Selective:
    """Parameters of `selective`."""

    scorer: ScorerSpec = field(
        metadata=says("What predicts the quality, say a judge, whose score is a mean over digits.")
    )
    threshold: float = field(metadata=says("Below it the answer is declined; of a judge from 0 to 9."))
    decline: str = field(
        default="I would rather not answer this: my answer would probably not be good enough.",
        metadata=says("What is then answered."),
    )
    aggregate: Aggregate = field(default="last", metadata=says("How the scores of the steps become one."))


def run(search: Search, params: Selective) -> Steps:
    """Answer, judge the answer, decline below the threshold."""
    branch = search.root
    yield Run(branch)
    values: list[float] = yield Score(branch, params.scorer)
    quality = aggregate(values, params.aggregate)
    search.progress(f"predicted quality {quality:g}", score=quality)
    if quality >= params.threshold:
        return concluded(search, [Candidate(branch, quality, tuple(values))], details={"declined": False})
    declined = Candidate(branch, quality, tuple(values), text=params.decline, note="declined")
    return concluded(search, [declined], details={"declined": True, "answer": branch.text})


def check(params: Selective, _sampling: Sampling) -> None:
    """Raises BadRequest for a threshold that is no number."""
    finite("threshold", params.threshold)


KIND = SearchKind(
    "selective",
    "An answer whose predicted quality is too low is declined.",
    Selective,
    run,
    "y if quality(x, y) ≥ threshold, else a refusal",
    check,
    scorers=lambda params: (params.scorer,),
    answers=lambda _params: 1,
    needs=("scorer: what predicts an answer's quality",),
    paper="Ye et al. 2024, Self-Judge, arXiv:2409.00935",
)
