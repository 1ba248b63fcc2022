"""Beam search over tokens, by log-probability, as vLLM's `use_beam_search` does it.

Of each beam's 2 width likeliest tokens, those that end the text complete a hypothesis; the `width` best of all others,
by summed log-probability, go on. What is complete and what max_tokens cuts is ranked together, by log-probability /
length^length_penalty; the length counts the prompt, and not the token that ends the text. vLLM always goes on up to
max_tokens; this ends as soon as nothing that still grows can come to be among the best, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.core import Sampling
from decoding.search.common import MAX_CANDIDATES, concluded, drop, spent, whole
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Feed, Fork, Search, Steps, Top
from decoding.strategies.spec import finite


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """Parameters of `beam_search`."""

    width: int = field(default=4, metadata={"description": "Beams that grow at a time."})
    length_penalty: float = field(
        default=1.0,
        metadata={
            "description": "Power of the length that log-probabilities are divided by: above 0 for longer texts."
        },
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    """length: its tokens, without one that ends it."""

    branch: Branch
    logprob: float = 0.0
    length: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Next:
    """A token that may follow a beam. logprob, length, score: of both together."""

    beam: _Beam
    token: int
    ends: bool
    logprob: float
    length: int
    score: float


def run(search: Search, params: BeamSearch) -> Steps:
    """Look at the likeliest tokens, complete what ends, and feed the best of the rest."""

    def score(logprob: float, length: float) -> float:
        return float(logprob / max(1, search.prompt_tokens + length) ** params.length_penalty)

    def value(beam: _Beam) -> float:
        return score(beam.logprob, beam.length)

    longest = math.inf if search.sampling.max_tokens is None else search.sampling.max_tokens
    keep = max(params.width, search.n)
    beams, complete, cut, length = [_Beam(search.root)], list[_Beam](), list[_Beam](), 0
    while beams and not spent(search):
        tops: list[list[tuple[int, float]]] = yield [Top(beam.branch, 2 * params.width) for beam in beams]
        following = []
        for beam, top in zip(beams, tops, strict=True):
            for token, lp in top:
                ends = token in search.ends
                long = beam.length + (not ends)
                following.append(_Next(beam, token, ends, beam.logprob + lp, long, score(beam.logprob + lp, long)))
        possible = [each for each in following if each.logprob > -math.inf]
        going = sorted((each for each in possible if not each.ends), key=lambda each: -each.logprob)[: params.width]
        scores = sorted([*map(value, complete), *(each.score for each in possible if each.ends)], reverse=True)
        needed = scores[keep - 1] if len(scores) >= keep else -math.inf
        ending = [each for each in possible if each.ends and each.score >= needed]
        if all(max(each.score, score(each.logprob, longest)) <= needed for each in going):
            going = []  # nor can anything that grows from them be among the best
        grown = yield from _grow(beams, [*going, *ending])
        complete = sorted([*complete, *(b for b in grown if b.branch.finished == "stop")], key=lambda b: -value(b))
        yield from drop(beam.branch for beam in complete[keep:])
        complete = complete[:keep]
        cut += [beam for beam in grown if beam.branch.finished == "length"]
        beams = [beam for beam in grown if not beam.branch.finished]
        length += 1
        search.progress(f"{length} tokens, {len(complete)} complete", tokens=length, complete=len(complete))
    found = sorted([*complete, *cut, *beams], key=lambda beam: -value(beam))
    yield from drop(beam.branch for beam in found[keep:])
    candidates = [Candidate(beam.branch, value(beam)) for beam in found[:keep]]
    return concluded(search, candidates or [Candidate(search.root)])


def _grow(beams: Sequence[_Beam], chosen: Sequence[_Next]) -> Generator[Any, Any, list[_Beam]]:
    """The chosen continuations, in order. A beam's first one takes its own branch, the others take forks of it.

    Left out are those for which there is no fork any more; one that no tokens are left for stays as it is.
    """
    wanted = {beam: [each for each in chosen if each.beam is beam] for beam in beams}
    yield from drop(beam.branch for beam in beams if not wanted[beam])
    several = [beam for beam in beams if len(wanted[beam]) > 1]
    forks: list[list[Branch]] = (
        (yield [Fork(beam.branch, len(wanted[beam]) - 1) for beam in several]) if several else []
    )
    more = dict(zip(several, forks, strict=True))
    given = {
        each: branch
        for beam in beams
        for each, branch in zip(wanted[beam], [beam.branch, *more.get(beam, ())], strict=False)
    }
    able = [each for each in chosen if each in given]
    if able:
        yield [Feed(given[each], (each.token,)) for each in able]
    grown = []
    for each in able:
        branch = given[each]
        moved = branch.finished or len(branch.tokens) == each.length
        kept = (each.logprob, each.length) if moved else (each.beam.logprob, each.beam.length)
        grown.append(_Beam(branch, *kept))
    return grown


def check(params: BeamSearch, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("width", params.width, 1, MAX_CANDIDATES)
    finite("length_penalty", params.length_penalty, -10.0, 10.0)


KIND = SearchKind(
    "beam_search",
    "The likeliest text, by beam search over tokens.",
    BeamSearch,
    run,
    "argmax Σ lp / length^length_penalty among `width` beams",
    check,
    by_rank=True,
    abreast=lambda params: params.width,
    paper="vLLM's use_beam_search; Graves 2012, arXiv:1211.3711",
)
