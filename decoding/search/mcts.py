"""Monte-Carlo tree search with a process reward model in place of full roll-outs (Zhang et al. 2024, ReST-MCTS*).

arXiv:2406.03816, algorithm 2 and appendix C. Ties go to the child that came first. Only a text that has ended is an
answer, and good enough or not: the paper's value also measures progress, so that a high one means the same there;
scores of steps in general do not. Roll-outs that reach the end of their text are answers too.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from decoding.core import Sampling, says
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
    worth,
)
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Fork, Run, Search, Steps
from decoding.strategies.spec import finite


@dataclass(frozen=True, slots=True)
class Mcts:
    """Parameters of `mcts`."""

    scorer: ScorerSpec = field(metadata=says("What scores every step, from 0 to 1: a process reward model."))
    iterations: int = field(default=20, metadata=says("Rounds of selection, expansion, roll-out and backing up."))
    branch: int = field(default=3, metadata=says("Steps that are sampled where a leaf is expanded."))
    c: float = field(default=0.4, metadata=says("Weight of exploration."))
    alpha: float = field(default=0.5, metadata=says("The roll-out's share in the value of where it began."))
    rollout_steps: int = field(default=2, metadata=says("Greedy steps of a roll-out."))
    end_value: float = field(default=0.9, metadata=says("The value from which an answer is good enough to end."))
    aggregate: Aggregate = field(default="last", metadata=says("How the scores of the steps become one."))
    separator: str = field(default="\n\n", metadata=says("What ends a step."))
    step_tokens: int | None = field(default=None, metadata=says("Steps of so many tokens, whatever they hold."))


@dataclass(slots=True, eq=False)
class Node:
    """A partial answer. value: its scorer's, then backed up from below. visits: how often it was gone through."""

    branch: Branch
    parent: Node | None = None
    scores: tuple[float, ...] = ()
    value: float = 0.0
    visits: int = 0
    children: list[Node] = field(default_factory=list)

    def uct(self, c: float) -> float:
        """V + c sqrt(2 ln N_parent / N); V + 1 before the first visit."""
        assert self.parent is not None
        if not self.visits:
            return self.value + 1.0
        return self.value + c * math.sqrt(2.0 * math.log(self.parent.visits) / self.visits)

    def leaves(self) -> list[Node]:
        """All leaves below, from left to right."""
        found, ahead = [], [self]
        while ahead:
            node = ahead.pop()
            ahead += reversed(node.children)
            if not node.children:
                found.append(node)
        return found


def run(search: Search, params: Mcts) -> Steps:
    """Select, expand, roll out, back up, until an answer is good enough."""
    root = Node(search.root)
    answers: list[Candidate] = []  # of roll-outs
    rounds = 0
    while rounds < params.iterations and not spent(search):
        leaf = root
        while leaf.children:
            leaf = max(leaf.children, key=lambda child: child.uct(params.c))
        if not leaf.branch.finished:
            yield from _expand(search, params, leaf)
            if not leaf.children:
                break  # there are no candidates left
            best = max(leaf.children, key=lambda child: child.value)
            value = yield from _roll_out(search, params, best, answers)
            best.value = (1.0 - params.alpha) * best.value + params.alpha * value
            best.visits += 1
        _back_up(leaf)
        rounds += 1
        search.progress(f"iteration {rounds} of {params.iterations}", iteration=rounds, value=root.value)
        ended = [child.value for child in leaf.children if child.branch.finished == "stop"]
        if max([*ended, *map(worth, answers)], default=-math.inf) >= params.end_value:
            break
    found = [Candidate(leaf.branch, leaf.value, leaf.scores) for leaf in root.leaves()]
    found = ranked([*found, *answers])
    kept, merged = distinct([each.branch for each in found])
    yield from drop(merged)
    best_first = [each for each in found if each.branch in kept]
    limit = f"'iterations' is {params.iterations}" if any(not each.branch.finished for each in found) else ""
    return concluded(search, best_first, limit, {"iterations": rounds})


def _expand(search: Search, params: Mcts, leaf: Node) -> Generator[Any, Any, None]:
    """Sample different next steps, with the scorer's values."""
    forked: list[Branch] = yield Fork(leaf.branch, params.branch)
    if not forked:
        return
    yield from drop([leaf.branch])
    yield [Run(branch, steps(params.separator, params.step_tokens)) for branch in forked]
    different, merged = distinct(forked)
    yield from drop(merged)
    judged = yield from judge(different, params.scorer, params.aggregate)
    leaf.children = [Node(each.branch, leaf, each.scores, _value(each)) for each in judged]


def _roll_out(search: Search, params: Mcts, node: Node, answers: list[Candidate]) -> Generator[Any, Any, float]:
    """The best value on a greedy way of a few steps down from `node`; its own value if there is none."""
    values: list[float] = []
    until = steps(params.separator, params.step_tokens)
    goes = params.rollout_steps > 0 and not node.branch.finished and not spent(search)
    forked: list[Branch] = (yield Fork(node.branch, 1)) if goes else []
    for branch in forked:
        while len(values) < params.rollout_steps and not branch.finished:
            yield Run(branch, until, greedy(search.sampling))
            (judged,) = yield from judge([branch], params.scorer, params.aggregate)
            values.append(_value(judged))
        if branch.finished == "stop":
            answers.append(judged)
        else:
            yield from drop([branch])
    return max(values, default=node.value)


def _back_up(node: Node | None) -> None:
    """Every node on the way up is visited once more; its value is the mean of its visited children's, by visits."""
    while node is not None:
        node.visits += 1
        if visits := sum(child.visits for child in node.children):
            node.value = sum(child.value * child.visits for child in node.children if child.visits) / visits
        node = node.parent


def _value(judged: Candidate) -> float:
    return worth(judged) if math.isfinite(worth(judged)) else 0.0


def check(params: Mcts, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("iterations", params.iterations, 1, 10_000)
    whole("branch", params.branch, 1, MAX_CANDIDATES)
    whole("rollout_steps", params.rollout_steps, 0)
    finite("c", params.c, 0.0)
    finite("alpha", params.alpha, 0.0, 1.0)
    finite("end_value", params.end_value)
    check_steps(params.separator, params.step_tokens)


KIND = SearchKind(
    "mcts",
    "A tree of steps, grown where a process reward model and few visits promise most.",
    Mcts,
    run,
    "argmax V + c √(2 ln N_parent / N), V ← (1 − alpha) V + alpha · best of a roll-out",
    check,
    scorers=lambda params: (params.scorer,),
    temperature=0.7,
    independent=lambda params: params.branch,
    needs=("scorer: what scores steps, from 0 to 1",),
    paper="Zhang et al. 2024, ReST-MCTS*, arXiv:2406.03816",
)
