"""Search with a look ahead for every next token (DeAL).

Huang et al. 2024, DeAL: Decoding-time Alignment for Large Language Models, arXiv:2402.06147, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.core import BadRequest, Sampling, says
from decoding.scorers.build import bounds
from decoding.scorers.spec import ScorerParams, ScorerSpec
from decoding.search.common import MAX_CANDIDATES, concluded, drop, greedy, ranked, spent, whole
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Feed, Fork, Run, Score, Search, Steps, Top, Until, Verb
from decoding.strategies.spec import finite


@dataclass(frozen=True, slots=True)
class Deal:
    """Parameters of `deal`."""

    k: int = field(default=5, metadata=says("The likeliest next tokens that are tried."))
    lookahead: int = field(default=10, metadata=says("Greedy tokens after each of them, before it is scored."))
    weight: float = field(default=1.0, metadata=says("Of the score against the log-probability."))
    scorer: ScorerSpec | None = field(default=None, metadata=says("What scores the text with its look ahead."))
    constraint: ScorerParams | None = field(
        default=None, metadata=says("Instead of a scorer: keywords, min_words, max_words, regex.")
    )
    beams: int = field(default=1, metadata=says("Hypotheses that are kept at every token."))


@dataclass(slots=True, eq=False)
class _Partial:
    """A hypothesis y_1:t. head: a branch of y_1:t alone. ahead: one of y_1:t and its greedy look-ahead.

    lp: log P(y_1:t). own: log P(y_t). nexts: the k likeliest next tokens. value: lp + weight h(ahead).
    """

    parent: _Partial | None
    token: int
    lp: float
    head: Branch | None
    ahead: Branch
    own: float = 0.0
    drafts: Sequence[int] = ()
    nexts: Sequence[tuple[int, float]] = ()
    value: float = -math.inf


def run(search: Search, params: Deal) -> Steps:
    """At each token: the next tokens that maximise lp(y_1:t) + weight h(y_1:t and look-ahead) are kept."""
    first = yield Top(search.root, params.k)
    live, ended = [_Partial(None, 0, 0.0, search.root, search.root, nexts=first)], list[_Partial]()
    stuck: list[_Partial] = []
    step = 0
    while live and not search.exhausted:
        options = yield from _options(live, params)
        if not options:
            break
        yield from _look_ahead(search, params, options)
        if spent(search):  # looked ahead unevenly: what was kept before is returned
            yield from drop({o.ahead for o in options} - {p.ahead for p in live})
            yield from drop(o.head for o in options if o.head)
            break
        ranking = sorted(options, key=lambda o: (-o.value, o.token))
        kept = ranking[: params.beams - len(ended)]
        yield from _commit(live, options, kept)
        step += 1
        ended += [p for p in kept if p.head and p.head.finished]
        stuck += [p for p in kept if not p.head]
        live = [p for p in kept if p.head and not p.head.finished]
        search.progress(f"token {step}: the best value is {ranking[0].value:g}", tokens=step)
    rest = live + stuck
    yield from drop(p.head for p in rest if p.head and p.head is not p.ahead)
    if rest and not spent(search):  # no more forks: as they would go on
        yield [Run(p.ahead, Until(step=False), greedy(search.sampling)) for p in rest if not p.ahead.finished]
    return concluded(search, ranked(_candidate(p) for p in ended + rest), details={"steps": step})


def _candidate(partial: _Partial) -> Candidate:
    return Candidate(partial.ahead, partial.value if math.isfinite(partial.value) else None)


def _options(live: Sequence[_Partial], params: Deal) -> Generator[Any, Any, list[_Partial]]:
    """Every hypothesis with every one of its next tokens. The one that its look-ahead begins with keeps that."""
    tries = [(p, p.head, _open_entries(p, live, params)) for p in live if p.head]
    forked = yield [Fork(head, len(entries)) for _, head, entries in tries]
    fresh = [
        (p, child, token, lp)
        for (p, _, entries), children in zip(tries, forked, strict=True)
        for child, (token, lp) in zip(children, entries)
    ]
    if fresh:
        yield [Feed(child, [token], lp=lp) for _, child, token, lp in fresh]
    options = []
    for p, child, token, lp in fresh:
        assert p.head
        follows = p.ahead.tokens[len(p.head.tokens) :]
        if child.finished:
            option = _Partial(p, token, p.lp + lp, child, child, lp)
        elif follows[:1] == [token]:
            option = _Partial(p, token, p.lp + lp, child, p.ahead, lp)
        else:
            rejoins = follows.index(token, 1) + 1 if token in follows[1:] else 1
            option = _Partial(p, token, p.lp + lp, None, child, lp, follows[rejoins:])
        options.append(option)
    return options


def _open_entries(p: _Partial, live: Sequence[_Partial], params: Deal) -> list[tuple[int, float]]:
    """The next tokens that may still be chosen: where h is bounded, some are out before anything is looked at."""
    possible = [(token, lp) for token, lp in p.nexts if lp > -math.inf]
    ends = bounds(params.scorer or params.constraint or "")
    if ends is None:
        return possible
    low, high = sorted(params.weight * end for end in ends)
    sure = sorted((each.lp + lp + low for each in live for _, lp in each.nexts), reverse=True)[: params.beams]
    return [(token, lp) for token, lp in possible if len(sure) < params.beams or p.lp + lp + high >= sure[-1]]


def _look_ahead(search: Search, params: Deal, options: Sequence[_Partial]) -> Generator[Any, Any, None]:
    """All look-aheads to the same length, in one batch; the options' next tokens and values come with them."""
    new = [o for o in options if not o.head]
    grown = [o for o in options if o.head and not o.ahead.finished]
    heads = [o for o in options if o.head and not o.head.finished]
    sampling, length = greedy(search.sampling), params.lookahead
    work: list[Verb] = [
        *(Run(o.ahead, Until(length, step=False), sampling, o.drafts, params.k) for o in new),
        *(Top(o.head, params.k) for o in heads if o.head),
        *(Run(o.ahead, Until(1, step=False), sampling) for o in grown),
    ]
    found = (yield work) if work else []
    for option, (_, nexts) in zip(new, found):
        option.nexts = nexts
    for option, nexts in zip(heads, found[len(new) :]):
        option.nexts = nexts
    scorer = params.scorer or params.constraint
    assert scorer is not None
    scores = yield [Score(o.ahead, scorer) for o in options]
    for option, values in zip(options, scores, strict=True):
        value = option.lp + params.weight * (values or [math.nan])[-1]
        option.value = -math.inf if math.isnan(value) else value


def _commit(
    live: Sequence[_Partial], options: Sequence[_Partial], kept: Sequence[_Partial]
) -> Generator[Any, Any, None]:
    """Give every option that is kept a head, if branches may still be forked, and drop the rest."""
    headless = [o for o in kept if not o.head]
    if headless:
        forked = yield [Fork(o.parent.head, 1) for o in headless if o.parent and o.parent.head]
        for option, heads in zip(headless, forked, strict=True):
            option.head = heads[0] if heads else None
        if fed := [Feed(o.head, [o.token], lp=o.own) for o in headless if o.head]:
            yield fed
    for option in kept:
        option.parent = None
    used = {branch for o in kept for branch in (o.head, o.ahead)}
    gone = {branch: None for p in (*live, *options) for branch in (p.head, p.ahead) if branch and branch not in used}
    yield from drop(gone)


def check(params: Deal, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range, or not exactly one of scorer and constraint."""
    whole("k", params.k, 1, MAX_CANDIDATES)
    whole("lookahead", params.lookahead, 1)
    whole("beams", params.beams, 1, MAX_CANDIDATES)
    finite("weight", params.weight)
    if (params.scorer is None) == (params.constraint is None):
        raise BadRequest("Give either 'scorer' or 'constraint'.", "scorer")
    if params.constraint is not None and (params.constraint.model or params.constraint.remote):
        raise BadRequest(
            "'constraint' takes 'keywords', 'min_words', 'max_words' and 'regex'; models are for 'scorer'.",
            "constraint",
        )


KIND = SearchKind(
    "deal",
    "Every next token is chosen by how well the text would go on from it.",
    Deal,
    run,
    "argmax lp(y_1..t) + weight · h(y_1..t and l greedy tokens) over the k likeliest y_t",
    check,
    scorers=lambda params: (params.scorer, params.constraint),
    by_rank=True,
    abreast=lambda params: params.k * params.beams,
    answers=lambda params: params.beams,
    needs=("scorer: what scores a text, or a constraint",),
    paper="Huang et al. 2024, DeAL, arXiv:2402.06147",
)
