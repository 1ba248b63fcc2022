"""Beam search over steps, guided by a scorer of steps; as diverse subtrees (DVTS); with a look ahead.

Snell et al. 2024, arXiv:2408.03314, sections 5.1 and 5.2; DVTS: Beeching et al. 2024, Scaling test-time compute with
open models.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.core import BadRequest, Sampling, says
from decoding.scorers.spec import Aggregate, ScorerSpec
from decoding.search.common import (
    MAX_CANDIDATES,
    check_steps,
    concluded,
    distinct,
    drop,
    greedy,
    judge,
    ranked,
    spent,
    steps,
    whole,
)
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Fork, Run, Search, Steps, Until


@dataclass(frozen=True, slots=True)
class Beam:
    """Parameters of `beam` and `dvts`."""

    scorer: ScorerSpec = field(metadata=says("What scores every step: usually a process reward model."))
    n: int = field(default=4, metadata=says("Hypotheses that grow at a time; a multiple of 'width'."))
    width: int = field(default=4, metadata=says("Continuations of each hypothesis that is kept."))
    aggregate: Aggregate = field(default="last", metadata=says("How the scores of the steps become one."))
    separator: str = field(default="\n\n", metadata=says("What ends a step."))
    step_tokens: int | None = field(default=None, metadata=says("Steps of so many tokens, whatever they hold."))
    max_steps: int = field(default=40, metadata=says("Steps after which the search ends."))
    lookahead: int = field(default=0, metadata=says("Further greedy steps by which a step is scored."))


@dataclass(frozen=True, slots=True)
class Lookahead(Beam):
    """Parameters of `lookahead`."""

    lookahead: int = field(default=1, metadata=says("Further greedy steps by which a step is scored."))


@dataclass(slots=True, eq=False)
class _Tree:
    """live: what grows. ended: what can grow no further. open: what was kept in the last step."""

    live: list[Branch]
    ended: list[Candidate] = field(default_factory=list)
    open: list[Candidate] = field(default_factory=list)

    @property
    def completed(self) -> int:
        return sum(each.branch.finished == "stop" for each in self.ended)

    def prune(self, judged: Sequence[Candidate], size: int, keep: int) -> None:
        """Set aside what has ended, and keep the best of the rest; nothing once `size` are complete."""
        self.ended += [each for each in judged if each.branch.finished]
        pool = ranked(each for each in judged if not each.branch.finished)
        self.open = pool[:keep] if self.completed < size else []
        self.live = [each.branch for each in self.open]


def run(search: Search, params: Beam) -> Steps:
    """n branches grow by a step, the n / width best are kept, each is continued in width ways."""
    return _search(search, params, 1)


def run_subtrees(search: Search, params: Beam) -> Steps:
    """n / width such searches, each of width branches of which the best one is kept."""
    return _search(search, params, params.n // params.width)


def _search(search: Search, params: Beam, count: int) -> Steps:
    """`count` trees, each a beam search of its own, in the same batches."""
    until = steps(params.separator, params.step_tokens)
    size, keep = params.n // count, params.n // params.width // count
    first: list[Branch] = (yield Fork(search.root, params.n)) or [search.root]
    yield from drop({search.root}.difference(first))
    trees = [_Tree(first[i * size : (i + 1) * size]) for i in range(count)]
    for step in range(1, params.max_steps + 1):
        yield [Run(branch, until) for tree in trees for branch in tree.live]
        merged: list[Branch] = []
        for tree in trees:
            tree.live, twins = distinct(tree.live)
            merged += twins
        yield from drop(merged)
        grown = [branch for tree in trees for branch in tree.live]
        judged = dict(zip(grown, (yield from _judge(search, params, grown, until)), strict=True))
        for tree in trees:
            tree.prune([judged[branch] for branch in tree.live], size, keep)
        kept = [branch for tree in trees for branch in tree.live]
        yield from drop(branch for branch in grown if not branch.finished and branch not in kept)
        completed = sum(tree.completed for tree in trees)
        search.progress(f"step {step}: {completed} completed, {len(kept)} kept", step=step, completed=completed)
        if not kept or spent(search) or step == params.max_steps:
            break
        forked = dict(zip(kept, (yield [Fork(branch, params.width) for branch in kept]), strict=True))
        for tree in trees:  # one that cannot be forked any more goes on alone
            tree.live = [child for branch in tree.live for child in forked[branch] or [branch]]
        yield from drop(branch for branch in kept if forked[branch])
    found = ranked(each for tree in trees for each in (*tree.ended, *tree.open))
    limit = f"'max_steps' is {params.max_steps}" if any(tree.open for tree in trees) else ""
    return concluded(search, found, limit, {"steps": step})


def _judge(
    search: Search, params: Beam, branches: Sequence[Branch], until: Until
) -> Generator[Any, Any, list[Candidate]]:
    """Branches with their scores; those that go on are scored by a fork that has run `lookahead` steps further."""
    ahead: dict[Branch, Branch] = {}
    unfinished = [branch for branch in branches if not branch.finished]
    if params.lookahead and unfinished and not spent(search):
        forked: list[list[Branch]] = yield [Fork(branch, 1) for branch in unfinished]
        ahead = {branch: forks[0] for branch, forks in zip(unfinished, forked, strict=True) if forks}
        for _ in range(params.lookahead):
            if going := [fork for fork in ahead.values() if not fork.finished]:
                yield [Run(fork, until, greedy(search.sampling)) for fork in going]
    judged = yield from judge(branches, params.scorer, params.aggregate, ahead)
    yield from drop(ahead.values())
    return judged


def check(params: Beam, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range, or branches that cannot be shared out."""
    whole("n", params.n, 1, MAX_CANDIDATES)
    whole("width", params.width, 1, MAX_CANDIDATES)
    whole("max_steps", params.max_steps, 1)
    whole("lookahead", params.lookahead, 0)
    check_steps(params.separator, params.step_tokens)
    if params.n % params.width:
        raise BadRequest(f"'n' must be a multiple of 'width', which is {params.width}, not {params.n}.", "n")


def _kind(name: str, summary: str, formula: str, params: type[Beam] = Beam, subtrees: bool = False) -> SearchKind:
    return SearchKind(
        name,
        summary,
        params,
        run_subtrees if subtrees else run,
        formula,
        check,
        scorers=lambda chosen: (chosen.scorer,),
        temperature=0.8,
        independent=lambda chosen: chosen.n,
        needs=("scorer: what scores steps",),
        paper="Beeching et al. 2024, Scaling test-time compute with open models"
        if subtrees
        else "Snell et al. 2024, arXiv:2408.03314",
    )


BEAM = _kind(
    "beam",
    "Hypotheses grow step by step; the best by a scorer of steps are kept and continued in several ways.",
    "each step: n → best n / width by scorer → × width",
)
DVTS = _kind(
    "dvts",
    "Beam search in subtrees that do not compete, for answers that differ.",
    "n / width subtrees, each step: width → best one by scorer → × width",
    subtrees=True,
)
LOOKAHEAD = _kind(
    "lookahead",
    "Beam search whose steps are scored by where they lead: some greedy steps further.",
    "beam, with the score after k more greedy steps",
    Lookahead,
)
