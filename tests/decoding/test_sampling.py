"""Sampling against exact distributions and against transformers' own processors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding.core import Policy, Program, Request, Role, Sampling, Term
from decoding.noise import GUMBEL_MAX, Lane, gumbel, key_tensor, noise_key, uniform
from decoding.sampling import Position, process, token_logprobs
from decoding.state import Group, Sequence, Track
from decoding.truncate import keep_mask, top_p_mask, truncate
from tests.fakes import verify_rows as verify
from tests.thin import thinned


def sequence(
    sampling: Sampling, output: list[int] | None = None, prompt: tuple[int, ...] = (0,), terms: int = 1, path: int = 0
) -> Sequence:
    policy = Policy(tuple(Term(f"t{i}", Role("m")) for i in range(terms)))
    request = Request("r", Program("x", policy), (prompt,) * terms, sampling, "m", 1000, (1,))
    group = Group(request, 0, policy, tuple(range(terms)), 1000, 100, seed=sampling.seed)
    seq = Sequence(group, 0, (path,), [Track("m", prompt, b"") for _ in range(terms)], None, group.request.sampling)
    for token in output or []:
        seq.output.append(token)
        seq.counts[token] = seq.counts.get(token, 0) + 1
    return seq


def draws(z: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """Counts [W] of `count` draws: one per branch path if seeded, else from one generator."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.zeros(len(z))
    one = sequence(sampling)
    for start in range(0, count, 10_000):
        seeded = sampling.seed is not None
        sequences = [sequence(sampling, path=start + i) if seeded else one for i in range(10_000)]
        tokens = [d.token for d in verify(z.repeat(10_000, 1), sequences, generator)]
        counts += torch.bincount(torch.tensor(tokens), minlength=len(z))
    return counts


CUTS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 5},
    {"min_p": 0.1, "top_k": 9, "temperature": 1.3},
]


@pytest.mark.parametrize(("seed", "changes"), thinned((seed, cut) for seed in (None, 42) for cut in CUTS))
def test_draws_follow_the_exact_distribution(seed: int | None, changes: dict[str, float]) -> None:
    sampling = replace(Sampling(seed=seed), **changes)
    z = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    p = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), z[None].clone())[0].double(), 0)
    count = 30_000
    counts = draws(z, sampling, count)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    assert chisquare(counts[kept].double(), count * p[kept]).pvalue > 1e-4
    if seed is None and not changes:  # the test can fail: a distribution off by 10% in one token is seen
        wrong = p.clone()
        wrong[wrong.argmax()] *= 1.1
        assert chisquare(counts.double(), count * wrong / wrong.sum()).pvalue < 1e-4


def test_uniforms_never_reach_the_ends_and_are_uniform() -> None:
    keys = key_tensor([noise_key(9, (0,), i, Lane.TOKEN) for i in range(8)], torch.device("cpu"))
    u = uniform(keys, torch.arange(152_064)[None])
    assert u.min() > 0
    assert u.max() < 1
    assert bool(torch.isfinite(gumbel(keys, torch.arange(152_064)[None])).all())
    counts = torch.histc(u, 1000, 0, 1)
    assert chisquare(counts.double()).pvalue > 1e-4


def test_hashing_only_ids_that_can_win_changes_nothing() -> None:
    z = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 20, 50)[:, None]
    sequences = [sequence(Sampling(seed=1), path=i) for i in range(50)]
    keys = key_tensor([noise_key(1, (i,), 0, Lane.TOKEN) for i in range(50)], z.device)
    noise = gumbel(keys, torch.arange(3000)[None])
    assert noise.max() < GUMBEL_MAX
    drawn = [d.token for d in verify(z.clone(), sequences, torch.Generator())]
    assert drawn == (z + noise).argmax(1).tolist()


def test_every_part_of_a_noise_key_matters() -> None:
    base = noise_key(1, (0, 2), 3, Lane.TOKEN)
    others = [
        noise_key(2, (0, 2), 3, Lane.TOKEN),
        noise_key(1, (2, 0), 3, Lane.TOKEN),
        noise_key(1, (0,), 3, Lane.TOKEN),
        noise_key(1, (0, 2), 4, Lane.TOKEN),
        noise_key(1, (0, 2), 3, Lane.ACCEPT),
        noise_key(1 + 2**32, (0, 2), 3, Lane.TOKEN),
    ]
    assert base not in others
    lanes = key_tensor([noise_key(1, (0,), 0, lane) for lane in Lane], torch.device("cpu"))
    u = uniform(lanes, torch.arange(100_000)[None])
    assert torch.corrcoef(u).fill_diagonal_(0).abs().max() < 4 / math.sqrt(100_000)


def test_ties_go_to_the_lower_id() -> None:
    z = torch.zeros(1, 300)
    assert verify(z.clone(), [sequence(Sampling(temperature=0.0))], torch.Generator())[0].token == 0
    assert kept_ids(z, Sampling(top_k=70))[0] == list(range(70))
    assert kept_ids(z, Sampling(top_p=0.4985))[0] == list(range(150))
    assert kept_ids(z[:, :100], Sampling(top_k=70))[0] == list(range(70))
    entry = token_logprobs(torch.log_softmax(z, 1), [299], 5)[0]
    assert [i for i, _ in entry.top] == [0, 1, 2, 3, 4]


def kept_ids(z: torch.Tensor, params: Sampling) -> list[list[int]]:
    """What is left of each row, as the sampler finds it."""
    values, ids, wide = truncate(z, [params] * len(z))
    rows = [sorted(ids[i][torch.isfinite(values[i])].tolist()) for i in range(len(z))]
    for i in wide:
        rows[i] = torch.isfinite(keep_mask(z[i], params)).nonzero().flatten().tolist()
    return rows


@pytest.mark.parametrize("width", [3, 128, 129, 1000])
def test_truncation_keeps_what_transformers_keeps(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for scale in (0.1, 1.0, 5.0):
        z = torch.randn(4, width, generator=generator) * scale
        for params in (
            Sampling(top_k=1),
            Sampling(top_k=100),
            Sampling(top_p=0.3),
            Sampling(top_p=0.999),
            Sampling(min_p=0.2),
            Sampling(top_k=30, top_p=0.6, min_p=0.01),
        ):
            warpers = LogitsProcessorList([])
            if params.top_k:
                warpers.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                warpers.append(TopPLogitsWarper(params.top_p))
            if params.min_p:
                warpers.append(MinPLogitsWarper(params.min_p))
            wanted = torch.isfinite(warpers(torch.zeros(4, 1, dtype=torch.long), z.clone()))
            assert kept_ids(z, params) == [row.nonzero().flatten().tolist() for row in wanted], params


@pytest.mark.parametrize("width", [5, 1000])
def test_a_top_p_set_is_what_transformers_keeps(width: int) -> None:
    for scale in (0.0, 0.1, 3.0):
        z = torch.randn(5, width, generator=torch.Generator().manual_seed(2)) * scale
        z[:, ::3] = z[:, :1]  # ties
        top_p = [0.1013, 0.5003, 0.9003, 0.9993, 1.0]
        got = top_p_mask(torch.log_softmax(z, 1), top_p)
        for row, p in enumerate(top_p):
            order = z[row].sort(descending=True, stable=True).indices
            mass = torch.softmax(z[row].double(), 0)[order].cumsum(0)
            count = width if p == 1.0 else int((mass < p).sum()) + 1
            assert sorted(order[:count].tolist()) == got[row].nonzero().flatten().tolist(), (scale, p)


def test_repetition_penalty_is_transformers_own_for_one_model() -> None:
    z = torch.randn(1, 50)
    seq = sequence(Sampling(repetition_penalty=1.7), [3, 4, 4], prompt=(7, 8))
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[7, 8, 3, 4, 4]]), z.clone())
    process(z[0], Position(seq))
    assert torch.equal(z, wanted)


def test_repetition_penalty_of_a_mix_ignores_shifts() -> None:
    z = torch.randn(50)
    seq = sequence(Sampling(repetition_penalty=1.7), [3, 4], terms=2)
    rows = []
    for shift in (0.0, 64.0, -64.0):
        row = z + shift
        process(row, Position(seq))
        rows.append(torch.log_softmax(row, 0))
    assert torch.allclose(rows[0], rows[1], atol=1e-4)
    assert torch.allclose(rows[0], rows[2], atol=1e-4)


def test_presence_and_frequency_penalties_and_bias_are_openais() -> None:
    row = torch.zeros(10)
    params = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((2, 3.0), (9, -1.0)))
    process(row, Position(sequence(params, [2, 2, 5])))
    assert row.tolist() == [0, 0, 3 - 0.5 - 0.5, 0, 0, -0.75, 0, 0, 0, -1]


def test_masks_hold_whatever_the_bias() -> None:
    row = torch.zeros(10)
    params = Sampling(allowed_token_ids=(1, 3), min_tokens=2, stop_token_ids=(5,), logit_bias=((4, 100.0),))
    process(row, Position(sequence(params)))  # id 1 is EOS in these requests
    assert torch.isfinite(row).nonzero().flatten().tolist() == [3]
    row = torch.zeros(10)
    process(row, Position(sequence(params, [3, 3])))
    assert torch.isfinite(row).nonzero().flatten().tolist() == [1, 3]


def test_no_allowed_token_gives_none() -> None:
    drawn = verify(torch.zeros(1, 4), [sequence(Sampling(allowed_token_ids=(1,), min_tokens=1))], torch.Generator())
    assert drawn[0].token is None


def test_logprobs_are_of_the_row_before_any_processor() -> None:
    z = torch.randn(2, 30)
    lp = torch.log_softmax(z, 1)
    params = Sampling(temperature=0.3, logit_bias=((4, 50.0),), logprobs=3, seed=1, top_p=0.5)
    drawn = verify(z.clone(), [sequence(params), sequence(replace(params, logprobs=None))], torch.Generator())
    assert drawn[0].token == 4
    assert drawn[1].logprob is None
    entry = drawn[0].logprob
    assert entry is not None
    assert entry.logprob == float(lp[0, 4])
    assert [i for i, _ in entry.top] == lp[0].topk(3).indices.tolist()


def test_seeded_rows_do_not_depend_on_the_batch() -> None:
    z = torch.randn(6, 500)
    params = [Sampling(seed=1), Sampling(seed=2, top_p=0.9), Sampling(), Sampling(top_k=3), Sampling(temperature=0.0)]
    sequences = [sequence(p) for p in [*params, Sampling(seed=3, min_p=0.01)]]
    together = verify(z.clone(), sequences, torch.Generator().manual_seed(0))
    for i in (0, 1, 4, 5):
        assert verify(z[i : i + 1].clone(), [sequences[i]], torch.Generator())[0].token == together[i].token
