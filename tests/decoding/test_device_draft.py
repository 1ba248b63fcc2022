"""Drafts chosen by the GPU's kernels, and by their references, are the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from decoding.choose import Choice, choose
from decoding.core import Sampling, Speculation
from decoding.device_draft import choose_on_device
from decoding.state import Sequence
from tests.decoding.test_accept import sequence

WIDTH = 83
KINDS: list[Sampling] = [
    Sampling(temperature=0.0, seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(temperature=0.7, seed=3, top_k=5, top_p=0.8),
    Sampling(temperature=1.5, seed=4, min_p=0.1, logit_bias=((7, 3.0),)),
    Sampling(temperature=1.0, seed=5, allowed_token_ids=(3, 9, 80), repetition_penalty=1.4),
    Sampling(temperature=1.0, seed=6, allowed_token_ids=()),
]


def members(accept: str) -> list[Sequence]:
    """One of each kind, that have drafted two tokens."""
    made = []
    for i, sampling in enumerate(KINDS):
        one = sequence(sampling, Speculation("d", "auto", accept), path=i)  # type: ignore[arg-type]
        one.group.width = WIDTH - i
        assert one.draft is not None
        one.draft.tokens += [9, 7]
        made.append(one)
    return made


def rows(made: list[Sequence]) -> torch.Tensor:
    z = 2.0 * torch.randn(len(made), WIDTH, generator=torch.Generator().manual_seed(8))
    for row, one in zip(z, made, strict=True):
        row[one.group.width :] = -torch.inf
    return z


@pytest.mark.parametrize("accept", ["rejection", "coupled", "kl"])
@pytest.mark.parametrize("kernel", [True, False])
def test_drafts_are_the_hosts(kernel: bool, accept: str) -> None:
    made = members(accept)
    z = rows(made)
    want = choose(z.clone(), made, torch.Generator())
    got = choose_on_device(z, made, torch.Generator(), kernel)
    assert got.tokens == want.tokens
    assert want.tokens[-1] is None
    hot = [] if accept == "coupled" else [1, 2, 3, 4]
    for row, token in enumerate(want.tokens):
        assert (row in got.probs) >= (row in hot)
        for mine, others in ((got.probs, want.probs), (got.logprobs, want.logprobs)):
            assert (row in others) <= (row in mine)
            if row in others:
                torch.testing.assert_close(mine[row], others[row], rtol=1e-5, atol=1e-6)
        assert token is None or got.confidence[row] == pytest.approx(want.confidence[row], rel=1e-4)


def test_what_is_known_of_a_draft_is_kept_with_it() -> None:
    made = members("kl")
    found = choose_on_device(rows(made), made, torch.Generator(), False)
    for row, one in enumerate(made[:2]):
        found.record(row, one)
    assert [len(one.draft.probs) for one in made[:2] if one.draft] == [0, 1]
    for one in made[:2]:
        assert one.draft is not None
        assert [len(lp) for lp in one.draft.logprobs] == [one.group.width]
        assert len(one.draft.confidence) == 1


def test_drafts_without_a_seed_follow_their_distribution() -> None:
    n = 4000
    one = sequence(Sampling(temperature=0.8, top_k=6), Speculation("d", 2, "rejection"))
    one.group.width = WIDTH
    z = rows([one]).expand(n, -1).clone()
    found: Choice = choose_on_device(z, [one] * n, torch.Generator().manual_seed(1), False)
    p = found.probs[0].double()
    ids = p.nonzero()[:, 0].tolist()
    tokens: list[Any] = list(found.tokens)
    assert len(ids) == 6
    assert set(tokens) <= set(ids)
    counts = [tokens.count(i) for i in ids]
    assert chisquare(counts, (p[ids] / p[ids].sum() * n).tolist()).pvalue > 1e-4


def test_rows_that_are_drawn_from_are_chosen_among_others() -> None:
    """Greedy rows between drawn ones: each has its own distribution."""
    made = members("rejection")
    z = rows(made)
    order = [1, 0, 2]
    found = choose_on_device(z[order], [made[i] for i in order], torch.Generator(), False)
    assert sorted(found.probs) == [0, 2]
    alone = choose_on_device(z[2:3], [made[2]], torch.Generator(), False)
    torch.testing.assert_close(found.probs[2], alone.probs[0])
    assert found.tokens[2] == alone.tokens[0]
