"""A small model drafts steps, a reward of steps decides which are kept, the base writes the others.

RSD: Liao et al. 2025, Reward-Guided Speculative Decoding, arXiv:2501.19324, algorithm 1. GSI: Geuter et al. 2025,
Guided Speculative Inference, arXiv:2506.04118, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from decoding.core import Sampling, says
from decoding.scorers.spec import ScorerSpec
from decoding.search.common import MAX_CANDIDATES, check_steps, concluded, drop, spent, steps, whole
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Drop, Feed, Fork, Open, Run, Score, Search, Steps
from decoding.strategies.spec import finite


@dataclass(frozen=True, slots=True)
class StepSpeculative:
    """Parameters of `step_speculative`."""

    draft: str = field(metadata=says("The small model."))
    scorer: ScorerSpec = field(metadata=says("What scores the last step: usually a process reward model."))
    mode: Literal["rsd", "gsi"] = field(
        default="rsd", metadata=says("One draft that must reach the threshold; or n that are tilted to the base.")
    )
    threshold: float = field(default=0.7, metadata=says("rsd: the score from which a drafted step is kept."))
    n: int = field(default=4, metadata=says("gsi: steps to choose from."))
    beta: float = field(default=20.0, metadata=says("gsi: weight of the score against log-probabilities."))
    u: float = field(default=10.0, metadata=says("gsi: the tilted score above which a drafted step is kept."))
    separator: str = field(default="\n\n", metadata=says("What ends a step."))
    step_tokens: int | None = field(default=None, metadata=says("Steps of so many tokens, whatever they hold."))
    max_steps: int = field(default=100, metadata=says("Steps after which the search ends."))


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Both models' branches, with the same text, after a step. score: the draft's, in GSI tilted."""

    base: Branch
    small: Branch
    drafted: bool
    score: float


def run(search: Search, params: StepSpeculative) -> Steps:
    """Step by step; the base's and the small model's branch are kept at the same text."""
    take = _reward_guided if params.mode == "rsd" else _tilted
    base, small = search.root, (yield Open(search.prompt, params.draft))
    scores, drafted = list[float | None](), 0
    while not base.finished and not small.finished and len(scores) < params.max_steps and not spent(search):
        step = yield from take(search, params, base, small)
        if step is None:  # no more forks: as the base would go on
            yield Run(base)
            break
        base, small = step.base, step.small
        scores.append(step.score if math.isfinite(step.score) else None)
        drafted += step.drafted
        search.progress(f"step {len(scores)}: {drafted} drafted", steps=len(scores), drafted=drafted)
    if small.finished == "length" and not base.finished:  # it has no room left; the base has
        yield Run(base)
    answer = small if small.finished == "stop" and not base.finished else base
    yield from drop({base, small} - {answer})
    details = {"steps": len(scores), "drafted": drafted, "scores": scores}
    limit = "" if answer.finished else f"'max_steps' is {params.max_steps}"
    return concluded(search, [Candidate(answer)], limit, details)


def _reward_guided(
    search: Search, params: StepSpeculative, base: Branch, small: Branch
) -> Generator[Any, Any, _Step | None]:
    """RSD: the small model's step if its score is at least `threshold`, else the base's."""
    until, start = steps(params.separator, params.step_tokens), len(base.text)
    drafts: list[Branch] = yield Fork(small, 1)
    if not drafts:
        return None
    (draft,) = drafts
    tokens = yield Run(draft, until)
    score = tilt(1.0, (yield Score(draft, params.scorer)))
    if score >= params.threshold:
        yield [Drop(small), _tell(search, draft, tokens, len(small.text), base)]
        return _Step(base, draft, True, score)
    yield from drop([draft])
    tokens = yield Run(base, until)
    yield _tell(search, base, tokens, start, small)
    return _Step(base, small, False, score)


def _tilted(search: Search, params: StepSpeculative, base: Branch, small: Branch) -> Generator[Any, Any, _Step | None]:
    """GSI: of n small steps one by softmax(beta r + lp_base - lp_small), kept if that is above u; else n base steps."""
    until, start, beta = steps(params.separator, params.step_tokens), len(base.text), params.beta
    drafts, mirrors = yield [Fork(small, params.n), Fork(base, params.n)]
    yield from drop([*drafts[len(mirrors) :], *mirrors[len(drafts) :]])
    pairs: list[tuple[Branch, Branch]] = list(zip(drafts, mirrors))
    if not pairs:
        return None
    said = yield [Run(draft, until) for draft, _ in pairs]
    told = yield [
        *(_tell(search, d, tokens, len(small.text), m, True) for (d, m), tokens in zip(pairs, said, strict=True)),
        *(Score(draft, params.scorer) for draft, _ in pairs),
    ]
    values = [
        tilt(beta, rewards) + sum(lps) - (draft.logprob - small.logprob)
        for (draft, _), lps, rewards in zip(pairs, told, told[len(pairs) :])
    ]
    chosen = draw(search, values)
    if values[chosen] > params.u:
        draft, mirror = pairs[chosen]
        yield from drop({b for pair in pairs for b in pair} - {draft, mirror} | {base, small})
        return _Step(mirror, draft, True, values[chosen])
    yield from drop(b for pair in pairs for b in pair)
    own: list[Branch] = (yield Fork(base, params.n)) or [base]
    said = yield [Run(branch, until) for branch in own]
    rewards = yield [Score(branch, params.scorer) for branch in own]
    best = draw(search, [tilt(beta, each) for each in rewards])
    yield _tell(search, own[best], said[best], start, small)
    yield from drop({base, *own} - {own[best]})
    return _Step(own[best], small, False, values[chosen])


def _tell(
    search: Search, source: Branch, tokens: Sequence[int], start: int, target: Branch, logprobs: bool = False
) -> Feed:
    """Continue `target` with what `source` says from `start` on: its tokens, or its text to another tokenizer.

    A text does not hold the token that ended it; log-probabilities then leave that out.
    """
    same = search.same_ids(source, target)
    return Feed(target, tokens if same else source.text[start:], step=True, logprobs=logprobs)


def tilt(beta: float, values: Sequence[float]) -> float:
    """beta times the last step's score; minus infinity if the scorer has none."""
    tilted = beta * values[-1] if values else math.nan
    return -math.inf if math.isnan(tilted) else tilted


def draw(search: Search, values: Sequence[float]) -> int:
    """An index by softmax(values); what is no number is as good as minus infinity."""
    known = [-math.inf if math.isnan(value) else value for value in values]
    highest = max(known)
    if highest == -math.inf:
        return 0
    weights = [1.0 if value == highest else math.exp(value - highest) for value in known]
    return search.rng.choices(range(len(values)), weights)[0]


def check(params: StepSpeculative, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("n", params.n, 1, MAX_CANDIDATES)
    whole("max_steps", params.max_steps, 1)
    check_steps(params.separator, params.step_tokens)
    finite("threshold", params.threshold)
    finite("beta", params.beta, 0.0)
    finite("u", params.u)


KIND = SearchKind(
    "step_speculative",
    "A small model drafts steps; a scorer of steps says which stay, and the base writes the others.",
    StepSpeculative,
    run,
    "rsd: r ≥ threshold; gsi: i ~ softmax(β r + lp_base − lp_small), kept if that is > u",
    check,
    scorers=lambda params: (params.scorer,),
    models=lambda params: (params.draft,),
    temperature=0.7,
    independent=lambda params: params.n if params.mode == "gsi" else 1,
    answers=lambda _params: 1,
    needs=("draft: a small causal model", "scorer: what scores steps"),
    paper="Liao et al. 2025, RSD, arXiv:2501.19324; Geuter et al. 2025, GSI, arXiv:2506.04118",
)
