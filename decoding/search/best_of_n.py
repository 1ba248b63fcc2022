"""Several samples, and the best of them: by a scorer, by a vote over their answers, or by the model's own likelihood.

Votes: Wang et al. 2022, Self-Consistency, arXiv:2203.11171; weighted by a verifier: Li et al. 2022, arXiv:2206.02336.
Sharpening: Huang et al. 2024, arXiv:2412.01951.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from decoding.answers import check_extraction, extract
from decoding.core import BadRequest, Sampling, says
from decoding.scorers.spec import Aggregate, Hypothesis, ScorerSpec
from decoding.search.common import MAX_CANDIDATES, concluded, ranked, sample, verdict, whole, worth
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Judge, Search, Steps
from decoding.search.voting import squashed, weighted


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Parameters of `best_of_n`."""

    n: int = field(default=4, metadata=says("How many samples."))
    scorer: ScorerSpec | None = field(default=None, metadata=says("What scores them; a majority needs none."))
    vote: Literal["max", "weighted", "majority"] = field(
        default="max",
        metadata=says("The best score; the answer whose samples' scores add up to most; the most frequent answer."),
    )
    aggregate: Aggregate = field(default="last", metadata=says("How the scores of the steps become one."))
    separator: str = field(default="\n\n", metadata=says("What ends a step, for scorers of steps."))
    squash: Literal["auto", "sigmoid", "none"] = field(
        default="auto",
        metadata=says("weighted: scores through a sigmoid first; auto: if any lies outside 0 to 1."),
    )
    answer: Literal["auto", "last_number", "boxed"] = field(
        default="auto", metadata=says("Votes: what of a text is its answer.")
    )
    answer_regex: str | None = field(
        default=None, metadata=says("Votes: the answer is what this matches last, or its group.")
    )


def run(search: Search, params: BestOfN) -> Steps:
    """Samples, their scores, and the best one or a vote. Only samples that have ended vote, if there are any."""
    samples = yield from sample(search, params.n)
    search.progress(f"{len(samples)} samples", samples=len(samples))
    judged = [Candidate(branch) for branch in samples]
    if params.scorer is not None:
        texts = [_whole(search, branch, params.separator) for branch in samples]
        found: list[list[float]] = yield [Judge(text, params.scorer) for text in texts]
        judged = [verdict(branch, values, params.aggregate) for branch, values in zip(samples, found, strict=True)]
    if params.vote == "max":
        return concluded(search, ranked(judged))
    how = params.answer if params.answer_regex is None else params.answer_regex
    judged = [replace(each, answer=extract(each.branch.text, how)) for each in judged]
    answered = [each for each in judged if each.answer is not None]
    voters = [each for each in answered if each.branch.finished == "stop"] or answered
    scores = [worth(each) for each in voters]
    weights = [1.0] * len(voters) if params.vote == "majority" else _weights(scores, params)
    order, votes = weighted([each.answer or "" for each in voters], weights, scores)
    first = [voters[i] for i in order]
    tally: dict[str, float] = {}
    for i in order:
        tally.setdefault(voters[i].answer or "", votes[i])
    return concluded(search, [*first, *ranked(each for each in judged if each not in first)], details={"votes": tally})


def _whole(search: Search, branch: Branch, separator: str) -> Hypothesis:
    """A sample, cut into steps."""
    parts = branch.text.split(separator)
    cut = (*(part + separator for part in parts[:-1]), *filter(None, parts[-1:]))
    return Hypothesis(search.prompt, cut, branch.finished == "stop", branch.logprob, len(branch.tokens))


def _weights(scores: list[float], params: BestOfN) -> list[float]:
    outside = any(not 0.0 <= score <= 1.0 for score in scores if score > -math.inf)
    if params.squash == "sigmoid" or (params.squash == "auto" and outside):
        return squashed(scores)
    return [score if math.isfinite(score) else 0.0 for score in scores]


def check(params: BestOfN, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range, and without a scorer where one is needed."""
    whole("n", params.n, 1, MAX_CANDIDATES)
    if not params.separator:
        raise BadRequest("'separator' must not be empty.", "separator")
    if params.scorer is None and params.vote != "majority":
        raise BadRequest(f"The vote '{params.vote}' needs a 'scorer'; only 'majority' does without one.", "scorer")
    if params.answer_regex is not None:
        check_extraction(params.answer_regex, "answer_regex")


@dataclass(frozen=True, slots=True)
class Sharpen:
    """Parameters of `sharpen`."""

    n: int = field(default=4, metadata=says("How many samples."))


def run_sharpen(search: Search, params: Sharpen) -> Steps:
    """The sample with the greatest log-probability, summed over its tokens."""
    samples = yield from sample(search, params.n)
    search.progress(f"{len(samples)} samples", samples=len(samples))
    return concluded(search, ranked(Candidate(branch, branch.logprob) for branch in samples))


def check_sharpen(params: Sharpen, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("n", params.n, 1, MAX_CANDIDATES)


KIND = SearchKind(
    "best_of_n",
    "Several samples; the best by a scorer, or the answer that most of them agree on.",
    BestOfN,
    run,
    "argmax_i score(y_i), or argmax_a Σ_i [a_i = a] w_i",
    check,
    scorers=lambda params: (params.scorer,),
    temperature=0.8,
    independent=lambda params: params.n,
    needs=("scorer: what scores whole texts or steps, unless the vote is a majority",),
    paper="Cobbe et al. 2021, arXiv:2110.14168; Wang et al. 2022, Self-Consistency, arXiv:2203.11171",
)
SHARPEN = SearchKind(
    "sharpen",
    "Several samples; the one that the model itself finds likeliest.",
    Sharpen,
    run_sharpen,
    "argmax_i log p(y_i)",
    check_sharpen,
    temperature=1.0,
    independent=lambda params: params.n,
    paper="Huang et al. 2024, Self-Improvement in Language Models: The Sharpening Mechanism, arXiv:2412.01951",
)
