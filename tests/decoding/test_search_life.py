"""Random searches: any verb on any branch at any time, beside plain requests and aborts, on odd engines.

What is checked: block tables after every tick, that everything ends and gives back what it held, and that greedy texts,
likeliest tokens and scores are what the table models say of each branch's own ids.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from decoding.core import Program, Request, Sampling, Speculation
from decoding.engine import Engine
from decoding.events import Done, Failed
from decoding.scorers.spec import Hypothesis
from decoding.search.verbs import (
    Branch,
    Candidate,
    Drop,
    Feed,
    Fork,
    Judge,
    Open,
    Outcome,
    Probe,
    Run,
    Score,
    Search,
    Steps,
    Top,
    Until,
)
from decoding.strategies import STRATEGIES
from tests.decoding.test_search_engine import PLAIN, Marked, asked, make_engine, request_of

__all__ = ["asked"]  # the fixture
LETTERS = b"abcdefgh "
PROMPT = "start"


class Truth:
    """What the table models say, without an engine."""

    def __init__(self, engine: Engine, mixed: bool) -> None:
        self.runners: dict[str, Any] = dict(engine.runners)
        self.mixed = mixed

    def lp(self, branch: Branch) -> torch.Tensor:
        """Log-probs after the branch, [W]."""
        ids = [*PROMPT.encode(), *branch.tokens]
        row = self.runners[branch.model].row(ids)
        if self.mixed and branch.model == "base":
            row = row + self.runners["side1"].row(ids) - self.runners["side2"].row(ids)
        return torch.log_softmax(row, 0)

    def greedy(self, branch: Branch, tokens: list[int]) -> None:
        """`tokens`, the branch's last ones, are each the likeliest."""
        at = Branch(tokens=branch.tokens[: len(branch.tokens) - len(tokens)], model=branch.model)
        for token in tokens:
            assert token == int(self.lp(at).argmax())
            at.tokens.append(token)

    def scores(self, text: Hypothesis) -> list[float]:
        rendered = Marked().render(text)
        return [float(self.runners["prm"].row(list(rendered.ids)[: mark + 1])[0]) for mark in rendered.marks]


def life(it: Search, truth: Truth, rng: random.Random, steps: int) -> Steps:
    live: list[Branch] = [it.root]
    greedy = replace(it.sampling, temperature=0.0)
    for _ in range(steps):
        some = rng.sample(live, min(len(live), rng.randint(1, 4)))
        verbs: list[Any] = []
        for branch in some:
            drafts = rng.choices(range(97, 105), k=rng.choice([0, 0, 3, 9]))
            until = Until(rng.randint(1, 7), step=rng.random() < 0.5)
            feed = Feed(branch, rng.choices(LETTERS, k=rng.randint(1, 6)), rng.random() < 0.5, rng.random() < 0.5)
            verbs.append(
                rng.choice(
                    [
                        Fork(branch, rng.randint(1, 3)),
                        feed,
                        Top(branch, 3),
                        Run(branch, until, greedy, drafts, rng.choice([0, 2])),
                        Run(branch, until),
                        Score(branch, "prm"),
                        Probe(branch, "ab?", ["y", "n"]),
                    ]
                )
            )
        if rng.random() < 0.2:
            verbs.append(Open(PROMPT, rng.choice([None, "side1"])))
        if rng.random() < 0.2:
            verbs.append(Judge(Hypothesis(PROMPT, ("one", "two")), "prm"))
        before = {id(verb): len(verb.branch.tokens) for verb in verbs if not isinstance(verb, Open | Judge)}
        found = yield verbs
        for verb, result in zip(verbs, found, strict=True):
            match verb:
                case Fork():
                    assert all(child.tokens == verb.branch.tokens for child in result)
                    live += result
                case Open():
                    live.append(result)
                case Top() if result:
                    values, ids = truth.lp(verb.branch).topk(3)
                    assert [token for token, _ in result] == ids.tolist()
                    assert [value for _, value in result] == pytest.approx(values.tolist(), abs=1e-4)
                case Run(sampling=how) if how is greedy:
                    tokens = result[0] if verb.top else result
                    assert tokens == verb.branch.tokens[before[id(verb)] :]
                    truth.greedy(verb.branch, tokens)
                case Score():
                    assert result == pytest.approx(truth.scores(Hypothesis(PROMPT, tuple(verb.branch.steps))), abs=1e-4)
                case Judge():
                    assert result == pytest.approx(truth.scores(verb.text), abs=1e-4)
                case Feed(logprobs=True) if result:
                    fed = verb.branch.tokens[before[id(verb)] :]
                    last = Branch(tokens=verb.branch.tokens[:-1], model=verb.branch.model)
                    assert len(result) == len(fed)
                    assert result[-1] == pytest.approx(float(truth.lp(last)[fed[-1]]), abs=1e-4)
        for branch in list(live):
            assert "".join(branch.steps) == branch.text
            if len(live) > 8 or (len(live) > 1 and rng.random() < 0.1):
                live.remove(branch)
                yield Drop(branch)
    return Outcome([Candidate(branch) for branch in live])


def drafting(rng: random.Random, program: Program) -> Program:
    choices = [None, Speculation("ngram", tokens=3), Speculation("side3", tokens=4), Speculation("side1", tokens=2)]
    return replace(program, speculation=rng.choice(choices))


@pytest.mark.parametrize("seed", [*range(15), *(pytest.param(s, marks=pytest.mark.slow) for s in range(15, 40))])
def test_any_life_of_searches(asked: Any, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        rng.choice([60, 90, 4096]),
        roles=4,
        max_num_seqs=rng.choice([1, 2, 5, 64]),
        max_num_batched_tokens=rng.choice([1, 7, 256]),
        max_logit_rows=rng.choice([4, 9, 512]),
        prefix_cache=rng.random() < 0.7,
    )
    for runner in engine.runners.values():  # one letter a token, so that texts and ids agree
        runner.table[:, [i for i in range(runner.width) if i not in set(LETTERS)]] -= 60.0  # type: ignore[attr-defined]
    mixed = rng.random() < 0.4
    strategy = STRATEGIES["proxy_tuning"]
    policy = strategy.build(strategy.params("side1", "side2"), "base") if mixed else PLAIN
    truth = Truth(engine, mixed)
    sampling = Sampling(max_tokens=rng.choice([12, 40]), seed=rng.choice([None, seed]), ignore_eos=True)
    requests: list[Request] = []
    for i in range(3):
        own = random.Random(f"{seed} {i}")
        program = asked(lambda it, own=own: life(it, truth, own, 12), drafting(rng, policy))
        requests.append(replace(request_of(engine, program, PROMPT, sampling), id=f"search {i}"))
        requests.append(replace(request_of(engine, drafting(rng, policy), "plain", sampling), id=f"plain {i}"))
    for request in requests:
        engine.submit(request)
    gone = {request.id: rng.randrange(60) for request in requests if rng.random() < 0.25}
    ended: set[str] = set()
    for tick in range(6000):
        if not engine.has_work():
            break
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Done):
                ended.add(event.request_id)
        engine.check()
        for id in [id for id, at in gone.items() if at == tick]:
            engine.abort(id)
            engine.check()
    assert not engine.has_work(), "it does not end"
    assert {request.id for request in requests} - set(gone) <= ended
    assert not engine.scheduler.resting
    assert all(pool.used == 0 for pool in engine.pools.values())
