"""Verification: the kernels in the interpreter against the reference, and speculation against exact distributions."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from decoding.noise import uniform
from tests.triton_kernels.mutate import mutated
from tests.triton_kernels.test_draw import follows, some_keys
from triton_kernels import sample_verify as subject
from triton_kernels.draw import Residual
from triton_kernels.sample_verify import Verified, sample_verify, verify, verify_reference

Tensor = torch.Tensor
WIDTH = 6
DRAFTS = 2
TARGET = torch.tensor([0.4, 0.05, 0.25, 0.0, 0.1, 0.2])
DRAFT = torch.tensor([0.1, 0.5, 0.05, 0.2, 0.15])  # skewed, and narrower than the target


def check(module: ModuleType = subject) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 3, 1, 36, 70, 2, 5])  # rows of each sequence; more drafts than a block as well
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    bonus = torch.tensor([True, True, False, True, False, True, True])
    for share in (0.3, 0.98, 1.0):
        accept = torch.rand(int(lengths.sum())) < share
        accept[starts[1:].long() - 1] = False  # of no meaning in bonus rows
        found = module.verify(accept, starts, bonus, kernel=True)
        for got, want in zip(found, verify_reference(accept, starts, bonus)):
            assert got.tolist() == want.tolist()


def test_the_kernel_does_what_the_reference_does() -> None:
    check()


@pytest.mark.parametrize("kernel", [False, True])
def test_the_first_refusal_ends_a_step(kernel: bool) -> None:
    accept = torch.tensor([True, False, True, True, True, True, False, True])
    starts, bonus = torch.tensor([0, 4, 7, 8]).int(), torch.tensor([True, False, True])
    length, row = verify(accept, starts, bonus, kernel=kernel)
    assert length.tolist() == [1, 2, 0]
    assert row.tolist() == [1, -1, 7]


def speculate(count: int, dense: bool, kernel: bool, device: str = "cpu") -> tuple[Verified, Tensor]:
    """`count` sequences of two drafts by the exact rule, and the drafts [count, 2].

    Without `dense` the drafts are drawn all the same, but judged as if they had been certain.
    """
    generator = torch.Generator().manual_seed(3)
    drafts = torch.multinomial(DRAFT, count * DRAFTS, replacement=True, generator=generator).view(count, DRAFTS)
    ids = torch.cat([drafts, torch.full((count, 1), -1)], 1).view(-1).int().to(device)
    n, drafted = count * (DRAFTS + 1), ids >= 0
    u = uniform(some_keys(n, 5).to(device), torch.zeros(1, 1, dtype=torch.int32, device=device))[:, 0]
    q = DRAFT.to(device)[ids.clamp_min(0).long()] if dense else torch.ones(n, device=device)
    none = torch.full_like(ids, -1)
    residual = Residual(DRAFT[None].to(device), torch.where(drafted, 0, -1).int(), none)
    if not dense:
        residual = Residual(None, None, ids)
    starts = torch.arange(0, n + 1, DRAFTS + 1, dtype=torch.int32, device=device)
    plain = [torch.full((n,), x, device=device) for x in (1.0, 1.0, 0.0)]
    verified, _ = sample_verify(
        TARGET.log().repeat(n, 1).to(device),
        plain[0],
        none.clamp_min(0),
        *plain[1:],
        some_keys(n, 7).to(device),
        starts,
        torch.ones(count, dtype=torch.bool, device=device),
        ids,
        lambda p: u * q < p,
        residual,
        kernel=kernel,
    )
    return verified, drafts.to(device)


def check_distribution(verified: Verified, drafts: Tensor) -> None:
    """Each of the first two tokens follows the target, given what came before it."""
    first = torch.where(verified.length > 0, drafts[:, 0], verified.token)
    assert follows(first, TARGET)
    more = verified.length > 0
    assert follows(torch.where(verified.length > 1, drafts[:, 1], verified.token)[more], TARGET)
    assert follows(verified.token[verified.length == DRAFTS], TARGET)  # bonus tokens


@pytest.mark.parametrize("dense", [True, False])
def test_speculation_follows_the_target(dense: bool) -> None:
    verified, drafts = speculate(20_000, dense, False)
    assert (verified.length == DRAFTS).sum() > 100
    check_distribution(verified, drafts)


@pytest.mark.parametrize("dense", [True, False])
def test_the_kernels_speculate_as_the_reference_does(dense: bool) -> None:
    for found, want in zip(speculate(20, dense, True)[0], speculate(20, dense, False)[0]):
        assert found.tolist() == want.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [True, False])
def test_speculation_follows_the_target_on_a_gpu(dense: bool) -> None:
    check_distribution(*speculate(20_000, dense, True, "cuda"))


def test_a_wrong_residual_would_be_noticed() -> None:
    verified, drafts = speculate(20_000, True, False)
    from_p = torch.multinomial(TARGET, len(drafts), replacement=True, generator=torch.Generator().manual_seed(1)).int()
    wrong = verified._replace(token=torch.where(verified.length < DRAFTS, from_p, verified.token))
    with pytest.raises(AssertionError):
        check_distribution(wrong, drafts)


def test_sequences_without_drafts_are_sampled() -> None:
    z = torch.tensor([[0.0, 9.0, 1.0], [2.0, 0.0, 2.0], [-torch.inf] * 3])
    none = torch.full((3,), -1, dtype=torch.int32)
    verified, cut = sample_verify(
        z, torch.zeros(3), none.clamp_min(0), torch.ones(3), torch.zeros(3), some_keys(3),
        torch.arange(4, dtype=torch.int32), torch.tensor([True] * 3), none, lambda p: p > 1, kernel=True,
    )  # fmt: skip
    assert [x.tolist() for x in verified] == [[0, 0, 0], [0, 1, 2], [1, 0, -1]]
    assert cut.prob is not None
    assert cut.prob.tolist() == [0.0, 0.0, 0.0]


def test_the_rows_maxima_reach_the_cuts() -> None:
    """One that is too high is told back."""
    z, none = torch.randn(2, 40), torch.full((2,), -1, dtype=torch.int32)
    best = z.amax(1) + torch.tensor([0.0, 5.0])
    _, cut = sample_verify(
        z, torch.ones(2), none.clamp_min(0), torch.full((2,), 0.9), torch.zeros(2), some_keys(2),
        torch.arange(3, dtype=torch.int32), torch.tensor([True] * 2), none, lambda p: p > 1, best=best, kernel=True,
    )  # fmt: skip
    assert torch.equal(cut.best, best)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        verify(torch.zeros(3, dtype=torch.bool), torch.zeros(3).int(), torch.zeros(3, dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.load(starts_ptr + s + 1) - 1", "tl.load(starts_ptr + s + 1)"),
        ("row - begin", "row"),
        ("while (start < end) & (row == end):", "if start < end:"),
        ("(row < end) | ", ""),
        ("passed != 0, end, at", "passed == 0, end, at"),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(module)
