"""Acceptance rules by themselves: distributions over 1e5 draws, acceptance rates in closed form, formulas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from decoding.accept import Check, verify
from decoding.core import EngineConfig, Policy, Program, Request, Role, Sampling, Speculation, Term
from decoding.noise import Lane
from decoding.pace import Clock
from decoding.propose import Proposer
from decoding.rules import RULES
from decoding.sampling import Drawn, Position, kept
from decoding.state import Draft, Group, Sequence, Track
from decoding.strategies import STRATEGIES
from tests.fakes import TableModel, table_engine

W, FIRST = 10, 3  # ids, and the one that the text begins with
WARM = Sampling(temperature=0.8, top_p=0.9)


def table(seed: int, scale: float = 1.2) -> torch.Tensor:
    return scale * torch.randn(W, W, generator=torch.Generator().manual_seed(seed))


TARGET, DRAFTER = table(0), table(0) + table(1, 0.8)


def probs(logits: torch.Tensor, sampling: Sampling) -> np.ndarray[Any, Any]:
    """[V] float64: temperature, top-k, the shortest prefix that reaches top_p, min-p; written out anew."""
    z = logits.double().numpy() / sampling.temperature
    order = np.argsort(-z, kind="stable")
    order = order[: sampling.top_k or len(order)]
    p = np.exp(z[order] - z.max())
    p /= p.sum()
    keep = (np.cumsum(p) - p < sampling.top_p) & (p >= sampling.min_p * p[0])
    out = np.zeros(len(z))
    out[order[keep]] = p[keep] / p[keep].sum()
    return out


def sequence(sampling: Sampling, spec: Speculation, path: int = 0, terms: int = 1) -> Sequence:
    policy = Policy(tuple(Term(f"t{i}", Role("m")) for i in range(terms)))
    request = Request("r", Program("x", policy, speculation=spec), ((FIRST,),) * terms, sampling, "m", W)
    group = Group(request, 0, policy, tuple(range(terms)), W, 100, seed=sampling.seed)
    rule = RULES[spec.accept or "rejection"]
    draft = Draft(spec, Track("d", (FIRST,), b""), bonus=rule.bonus if spec.bonus is None else spec.bonus)
    text: Any = None
    return Sequence(group, 0, (path,), [Track("m", (FIRST,), b"")], text, group.request.sampling, draft=draft)


Change = Callable[[list[Sequence]], None]


def passes(
    sampling: Sampling, accept: str, count: int, tokens: int = 2, change: Change | None = None, **params: Any
) -> list[list[Drawn]]:
    """`count` independent passes that start behind FIRST, with `tokens` drafts each."""
    spec = Speculation("d", tokens, accept, **params)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    never: Any = None
    proposer = Proposer(never, generator, Clock(), never)
    found: list[list[Drawn]] = []
    for start in range(0, count, 10_000):
        members = [sequence(sampling, spec, start + i) for i in range(min(10_000, count - start))]
        for _ in range(tokens):
            rows = torch.stack([DRAFTER[_last(s)] for s in members])
            for member, token in zip(members, proposer._choose(rows, members), strict=True):
                assert member.draft is not None
                assert token is not None
                member.draft.tokens.append(token)
        if change:
            change(members)
        z = torch.stack([TARGET[t] for s in members for t in (FIRST, *(s.draft.tokens if s.draft else ()))])
        checks = [Check(s, i * (tokens + 1)) for i, s in enumerate(members)]
        found += verify(z, checks, generator)
    return found


def _last(s: Sequence) -> int:
    return s.draft.tokens[-1] if s.draft and s.draft.tokens else FIRST


def fit(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """The chi-square p-value of counts against probabilities; rare cells are put together."""
    total = sum(counts.values())
    assert not set(counts) - {key for key, p in expected.items() if p > 0}, "something impossible was drawn"
    common = [key for key, p in expected.items() if p * total >= 8]
    observed = [counts[key] for key in common] + [total - sum(counts[key] for key in common)]
    wanted = [expected[key] * total for key in common] + [total * (1 - sum(expected[key] for key in common))]
    if wanted[-1] < 8:
        observed, wanted = [*observed[:-2], sum(observed[-2:])], [*wanted[:-2], sum(wanted[-2:])]
    return float(chisquare(observed, np.array(wanted) * total / sum(wanted)).pvalue)


def first_two(found: list[list[Drawn]], sampling: Sampling) -> float:
    """The worse p-value of the first tokens, and of the second ones behind each first token."""
    worst = fit(Counter(d[0].token for d in found), dict(enumerate(probs(TARGET[FIRST], sampling))))
    for token in range(W):
        seconds = Counter(d[1].token for d in found if d[0].token == token and len(d) > 1)
        if sum(seconds.values()) > 500:
            worst = min(worst, fit(seconds, dict(enumerate(probs(TARGET[token], sampling)))) * W)
    return worst


MANY = 8_000


@pytest.mark.parametrize("count", [MANY, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("accept", "seed"), [("rejection", None), ("rejection", 42), ("coupled", 1)])
@pytest.mark.parametrize("sampling", [WARM, Sampling(top_k=4, min_p=0.05)])
def test_lossless_rules_give_the_policys_distribution(
    accept: str, seed: int | None, sampling: Sampling, count: int
) -> None:
    """Every first token, and every second one behind each first. (The engine gives every coupled request a seed.)"""
    assert first_two(passes(replace(sampling, seed=seed), accept, count), sampling) > 1e-4


def test_certain_drafts_keep_the_distribution_too() -> None:
    """Lookups: q is 1 at the draft, wherever the draft comes from."""
    assert first_two(passes(WARM, "rejection", MANY, change=_forget), WARM) > 1e-4


def _forget(members: list[Sequence]) -> None:
    for member in members:
        assert member.draft is not None
        member.draft.probs.clear()
        member.draft.tokens[0] = 3


@pytest.mark.slow
def test_a_wrong_normaliser_is_seen() -> None:
    """Accepting with q scaled by 0.9, as if the draft were rarer than it is, biases the text: the test must see it."""

    def scale(members: list[Sequence]) -> None:
        for member in members:
            assert member.draft is not None
            member.draft.probs = [row * 0.9 for row in member.draft.probs]

    assert first_two(passes(WARM, "rejection", MANY, change=scale), WARM) < 1e-6


@pytest.mark.slow
def test_a_shared_noise_lane_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the residual drawn with the draft's own noise, the text would be biased: the test must see it."""
    key = Position.key

    def shared(self: Position, lane: Lane) -> int:
        return key(self, Lane.DRAFT if lane is Lane.RESIDUAL else lane)

    monkeypatch.setattr(Position, "key", shared)
    assert first_two(passes(replace(WARM, seed=3), "rejection", 20_000), WARM) < 1e-6


def test_acceptance_rates_are_their_closed_forms() -> None:
    p, q = probs(TARGET[FIRST], WARM), probs(DRAFTER[FIRST], WARM)
    tv, count = 0.5 * float(np.abs(p - q).sum()), MANY

    def rate(accept: str, **params: Any) -> float:
        sampling = replace(WARM, seed=9)
        return sum(d[0].accepted is not None for d in passes(sampling, accept, count, 1, **params)) / count

    slack = 4 * 0.5 / math.sqrt(count)
    assert rate("rejection") == pytest.approx(1 - tv, abs=slack)
    assert rate("mixture", weight=0.4) == pytest.approx(1 - 0.4 * tv, abs=slack)
    assert rate("mixture", weight=0.0) == 1.0
    assert (1 - tv) / (1 + tv) - slack <= rate("coupled") <= 1 - tv + slack


def test_the_residual_of_equal_distributions_is_the_distribution() -> None:
    """p = q, but refused: nothing is left of p - q, and p itself is drawn from."""
    spec = Speculation("d", 1, "rejection")
    member = sequence(Sampling(), spec)
    assert member.draft is not None
    z = torch.full((2, W), -torch.inf)
    z[:, 4] = 0.0
    member.draft.tokens, member.draft.probs = [5], [torch.softmax(z[0], 0)]
    (drawn,) = verify(z, [Check(member, 0)], torch.Generator())
    assert [d.token for d in drawn] == [4]


@dataclass(frozen=True)
class Setting:
    accept: str
    params: dict[str, float]


@pytest.mark.parametrize(
    "setting",
    [
        Setting("kl", {"threshold": 0.3}),
        Setting("kl", {"threshold": 0.3, "certain": 0.5}),
        Setting("typical", {}),
        Setting("typical", {"epsilon": 0.3, "delta": 0.9}),
        Setting("judge", {"threshold": 0.7}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lossy_rules_decide_as_their_formulas(setting: Setting, temperature: float) -> None:
    """Row by row, against numpy; where the formula alone accepts, the token must say which rule did."""
    sampling = Sampling(temperature=temperature, top_p=0.9, seed=1)
    spec = Speculation("d", 1, setting.accept, **setting.params)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    tally: Counter[str | None] = Counter()
    for i in range(400):
        target, drafter = (s * torch.randn(W, generator=generator) for s in (1.5, 1.5))
        drafter = target + 0.7 * drafter
        member = sequence(sampling, spec, i)
        assert member.draft is not None
        token = int(torch.randint(W, (1,), generator=generator))
        member.draft.tokens = [token]
        member.draft.logprobs = [torch.log_softmax(drafter, 0)]
        if temperature:
            member.draft.probs = [torch.softmax(kept(drafter[None].clone(), [sampling])[0], 0)]
        score = float(torch.randn(1, generator=generator))
        check = Check(member, 0, torch.tensor([score]))
        (drawn,) = verify(torch.stack([target, target]), [check], torch.Generator())
        loose = _formula(setting, target, drafter, token, temperature, score)
        how = drawn[0].accepted
        tally[how] += 1
        if how == setting.accept:
            assert loose
        elif how is None:
            assert not loose
        if how is not None:
            assert drawn[0].token == token
    assert tally[None] > 10
    assert tally["rejection"] > 5
    assert tally[setting.accept] > 0 or (setting.accept == "typical" and temperature == 0)


def _formula(
    setting: Setting, target: torch.Tensor, drafter: torch.Tensor, token: int, temperature: float, score: float
) -> bool:
    lp, lq = (torch.log_softmax(row.double(), 0).numpy() for row in (target, drafter))
    if setting.accept == "kl":
        gap = float((np.exp(lq) * (lq - lp)).sum())
        return gap < setting.params["threshold"] and not np.exp(lp).max() > setting.params.get("certain", 2.0)
    if setting.accept == "judge":
        return 1 / (1 + math.exp(-score)) > setting.params["threshold"]
    if temperature == 0:
        return False
    p = torch.softmax(target.double() / temperature, 0).numpy()
    entropy = -float((p * np.log(p)).sum())
    floor = min(setting.params.get("epsilon", 0.09), setting.params.get("delta", 0.3) * math.exp(-entropy))
    return bool(p[token] > floor)


def test_a_judge_of_a_mix_lets_only_near_tokens_pass() -> None:
    """lp(x) >= max lp - kappa, where the policy is more than one model."""
    spec = Speculation("d", 1, "judge", threshold=0.1, kappa=1.0)
    for terms, wanted in ((1, "judge"), (2, None)):
        member = sequence(Sampling(temperature=0.0), spec, terms=terms)
        assert member.draft is not None
        member.draft.tokens = [2]
        z = torch.tensor([[0.0, 5.0, 3.9, 1.0]]).repeat(2, 1)
        (drawn,) = verify(z, [Check(member, 0, torch.tensor([9.0]))], torch.Generator())
        assert drawn[0].accepted == wanted


# -- end to end -------------------------------------------------------------------------------------------------------


def whole_texts(count: int, seed: int | None, strategy: str, sampling: Sampling) -> float:
    """p-value of `count` texts of three tokens from the engine, against the product of the policy's conditionals."""
    tables = {name: table(i) for i, name in enumerate(("base", "expert", "anti"))} | {"draft": DRAFTER}
    row = STRATEGIES[strategy]
    params = {"expert": "expert", "anti": "anti", "alpha": 0.6} if strategy == "proxy_tuning" else {}
    program = row.build(row.params(**params), "base")
    draft = "expert" if strategy == "proxy_tuning" else "draft"
    program = replace(program, speculation=Speculation(draft, 2, "rejection"))
    prompts = ((FIRST,),) * len(program.policy.terms)
    drawn = replace(sampling, max_tokens=3, ignore_eos=True, seed=seed)
    config = EngineConfig(block_size=4, max_num_batched_tokens=1 << 20, max_num_seqs=4096, max_logit_rows=1 << 20,
                          max_queue=1 << 20)  # fmt: skip
    texts: Counter[tuple[int, ...]] = Counter()
    for batch in range(0, count, 2000):
        models = {name: TableModel(name, t, memory=1) for name, t in tables.items()}
        engine = table_engine(models, config, blocks=20_000)
        own = replace(drawn, seed=None if seed is None else seed + batch)
        engine.submit(Request("r", program, prompts, own, "base", W, (), n=2000))
        out: dict[int, list[int]] = {}
        while engine.has_work():
            for event in engine.step():
                if hasattr(event, "token_ids"):
                    out.setdefault(event.index, []).extend(event.token_ids)
        texts.update(tuple(ids) for ids in out.values())
    z = tables["base"] + (0.6 * (tables["expert"] - tables["anti"]) if params else 0.0)
    p = [probs(z[i], sampling) for i in range(W)]
    expected = {(a, b, c): p[FIRST][a] * p[a][b] * p[b][c] for a in range(W) for b in range(W) for c in range(W)}
    return fit(texts, expected)


def test_whole_texts_follow_the_policy() -> None:
    assert whole_texts(4_000, None, "proxy_tuning", WARM) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["plain", "proxy_tuning"])
@pytest.mark.parametrize("seed", [None, 17])
def test_a_hundred_thousand_texts_follow_the_policy(strategy: str, seed: int | None) -> None:
    assert whole_texts(100_000, seed, strategy, WARM) > 1e-4
