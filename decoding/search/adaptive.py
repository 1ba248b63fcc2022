"""As many samples as the model itself thinks are worth it.

Manvi et al. 2024, Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation,
arXiv:2410.02725, section 3: self-evaluation, adaptive sampling with rising temperature, early pruning.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from decoding.core import BadRequest, Sampling, says
from decoding.scorers.spec import ScorerSpec
from decoding.search.common import MAX_CANDIDATES, concluded, drop, ranked, spent, whole
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Fork, Probe, Run, Score, Search, Steps, Until
from decoding.strategies.spec import finite

QUESTION = "\n\nWould a fresh attempt at this lead to a better response? Answer yes or no.\nAnswer:"


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Parameters of `adaptive`."""

    max_samples: int = field(default=16, metadata=says("Samples at most."))
    threshold: float = field(
        default=0.9, metadata=says("Stop once some sample is, so probably, as good as a fresh one would be.")
    )
    wave: int = field(default=5, metadata=says("Samples that are drawn together, after the first one."))
    schedule: tuple[float, ...] = field(
        default=(0.0, 0.5, 0.75, 0.875, 1.0),
        metadata=says("Each sample's temperature as a share of the request's; the last share holds from there on."),
    )
    prune_at: int | None = field(default=None, metadata=says("Tokens after which the weakest of a wave are dropped."))
    prune_fraction: float = field(default=0.5, metadata=says("The share of a wave that is then dropped."))
    self_eval: ScorerSpec | None = field(
        default=None, metadata=says("A model that was trained to say so, instead of asking the request's model.")
    )
    question: str = field(default=QUESTION, metadata=says("What the request's model is asked after its answer."))
    choices: tuple[str, str] = field(
        default=(" no", " yes"), metadata=says("Its two answers: nothing better would come, something would.")
    )


def run(search: Search, params: Adaptive) -> Steps:
    """Sample in waves until some answer is probably no worse than a restart's; the best by the same estimate."""
    done, pruned = list[Candidate](), list[Candidate]()
    while len(done) + len(pruned) < params.max_samples and not spent(search):
        start = len(done) + len(pruned)
        count = min(params.wave, params.max_samples - start) if start else 1
        wave: list[Branch] = yield Fork(search.root, count)
        if not wave and start:
            break
        wave = wave or [search.root]
        draws = [_hotter(search.sampling, params.schedule, start + i) for i in range(len(wave))]
        if params.prune_at is not None and len(wave) > 1:
            yield [Run(b, Until(params.prune_at, step=False), draw) for b, draw in zip(wave, draws)]
            weak = yield from _weakest(params, wave)
            yield from drop(each.branch for each in weak)
            pruned += weak
        gone = {each.branch for each in pruned}
        going = [(b, draw) for b, draw in zip(wave, draws) if b not in gone and not b.finished]
        if going:
            yield [Run(b, Until(step=False), draw) for b, draw in going]
        whole_ones = [b for b in wave if b not in gone]
        sure = yield from _estimates(params, whole_ones)
        done += [Candidate(b, p, (p,)) for b, p in zip(whole_ones, sure, strict=True)]
        best = max(each.score or 0.0 for each in done)
        search.progress(f"{start + len(wave)} samples: {best:.0%} sure", samples=start + len(wave), sure=best)
        if best >= params.threshold:
            break
    yield from drop({search.root} - {each.branch for each in done})
    pruned.sort(key=lambda each: -(each.score or 0.0))
    return concluded(search, ranked(done) + pruned, details={"samples": len(done) + len(pruned), "pruned": len(pruned)})


def _hotter(sampling: Sampling, schedule: Sequence[float], index: int) -> Sampling:
    return replace(sampling, temperature=sampling.temperature * schedule[min(index, len(schedule) - 1)])


def _weakest(params: Adaptive, wave: Sequence[Branch]) -> Generator[Any, Any, list[Candidate]]:
    """Those of the weakest `prune_fraction` that are not finished; ties keep the one that came first."""
    sure = yield from _estimates(params, wave)
    order = sorted(range(len(wave)), key=lambda i: (sure[i], -i))[: int(params.prune_fraction * len(wave))]
    return [Candidate(wave[i], sure[i], (sure[i],), note="pruned") for i in order if not wave[i].finished]


def _estimates(params: Adaptive, branches: Sequence[Branch]) -> Generator[Any, Any, list[float]]:
    """P(no better on a restart) of each: a self-evaluation model's score, or p(no) / (p(no) + p(yes))."""
    if params.self_eval is not None:
        found = yield [Score(b, params.self_eval) for b in branches]
        return [values[-1] if values and not math.isnan(values[-1]) else 0.0 for values in found]
    found = yield [Probe(b, params.question, params.choices) for b in branches]
    return [_share(no, yes) for no, yes in found]


def _share(a: float, b: float) -> float:
    top = max(a, b)
    if top == -math.inf:
        return 0.0
    return math.exp(a - top) / (math.exp(a - top) + math.exp(b - top))


def check(params: Adaptive, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("max_samples", params.max_samples, 1, MAX_CANDIDATES)
    whole("wave", params.wave, 1, MAX_CANDIDATES)
    finite("threshold", params.threshold, 0.0, 1.0)
    if params.prune_at is not None:
        whole("prune_at", params.prune_at, 1)
    finite("prune_fraction", params.prune_fraction, 0.0, 1.0)
    if params.prune_fraction == 1.0:
        raise BadRequest("'prune_fraction' must be below 1: some samples must go on.", "prune_fraction")
    shares = [finite("schedule", share, 0.0) for share in params.schedule]
    if not shares or shares != sorted(shares):
        raise BadRequest("'schedule' must be one or more numbers that do not fall.", "schedule")
    if not all(params.choices) or params.choices[0] == params.choices[1]:
        raise BadRequest("'choices' must be two different texts.", "choices")


KIND = SearchKind(
    "adaptive",
    "Samples until the model itself expects nothing better, and drops weak ones part-way.",
    Adaptive,
    run,
    "sample while max P(no better on a restart) < threshold",
    check,
    scorers=lambda params: (params.self_eval,),
    temperature=1.0,
    independent=lambda params: params.max_samples,
    paper="Manvi et al. 2024, arXiv:2410.02725",
)
