"""Draws: the kernels in the interpreter against the reference, the engine's noise, and exact distributions."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.stats import chisquare

from decoding.noise import gumbel, key_tensor, uniform
from tests.triton_kernels.mutate import mutated
from triton_kernels import draw as subject
from triton_kernels.cutoffs import Cutoffs, cutoffs_reference
from triton_kernels.draw import Residual, draw, draw_reference, uniform_reference

Tensor = torch.Tensor


def some_keys(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n, 2), generator=generator).int()


def cuts(z: Tensor, temperature: float | Tensor = 1.0, k: int = 0, p: float = 1.0) -> tuple[Tensor, Cutoffs]:
    n, width = z.shape
    t = torch.zeros(n, device=z.device) + temperature
    limits = (torch.zeros_like(t).int() + k, torch.zeros_like(t) + p, torch.zeros_like(t))
    return t, cutoffs_reference(z, torch.arange(n, device=z.device), width, t, *limits)


def rows() -> Tensor:
    """[8, 150] in wider storage."""
    torch.manual_seed(0)
    z = (torch.randn(8, 160) * 2)[:, 4:154]
    z[1, ::2] = -torch.inf
    z[2] = -torch.inf
    z[3] = 0.0
    z[4, 1:] = -torch.inf
    z[5] -= 1000.0
    z[7, :-7], z[7, -7:] = -torch.inf, 1.0  # only what a narrower drafter does not have
    return z


def some_residual(z: Tensor, drawn: Tensor) -> Residual:
    """Of rows z [8, W]: drafters sure of what p would draw, or that id itself."""
    q = torch.ones(3, z.shape[1])  # in wider storage: what lies behind a row must not be read
    q[:, -7] = 0.0
    q = q[:, :-7].copy_(z.nan_to_num(0.0, 0.0, 0.0)[[0, 3, 7], :-7].mul(3).softmax(1))
    q_row = torch.tensor([0, -1, 1, 1, -1, 0, -1, 2], dtype=torch.int32)
    removed = torch.tensor([-1, 0, -1, -1, 0, -1, -1, 0], dtype=torch.int32)
    return Residual(q, q_row, torch.where(removed == 0, drawn, removed))


def check(module: ModuleType = subject, chunk: int = 64) -> None:
    module.CHUNK = chunk  # type: ignore[attr-defined]
    z = rows()
    t, cut = cuts(z, torch.tensor([1.0, 0.7, 1.0, 1.0, 1.0, 1e-35, 0.0, 1.3]), 90, 0.95)
    wanted = torch.tensor([7, 0, -1, 2, 3, 4, 5, 6, 1, 7], dtype=torch.int32)
    keys = some_keys(len(z))
    drawn = draw_reference(z, t, cut, keys, torch.arange(len(z)))
    dense = some_residual(z, drawn)
    one = Residual(None, None, drawn)
    for residual in (dense, one, None):
        found = module.draw(z, t, cut, keys, wanted, residual, kernel=True)
        assert found.tolist() == draw_reference(z, t, cut, keys, wanted, residual).tolist()


@pytest.mark.parametrize("chunk", [64, 256])
def test_the_kernels_draw_what_the_reference_draws(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CHUNK", subject.CHUNK)
    check(chunk=chunk)


def test_the_noise_of_the_reference_is_the_engines() -> None:
    keys = torch.cat([some_keys(20), key_tensor([0, (1 << 64) - 1, 1 << 31], torch.device("cpu"))])
    ids = torch.tensor([0, 1, 5, 151_935, 262_143], dtype=torch.int32)
    assert torch.equal(uniform_reference(keys, ids), uniform(keys, ids[None]))


def test_draws_are_the_argmax_of_the_engines_noise() -> None:
    z, keys = torch.randn(30, 61), some_keys(30)
    t, cut = cuts(z, 0.8)
    want = ((z - z.amax(1, keepdim=True)) / 0.8 + gumbel(keys, torch.arange(61)[None])).argmax(1)
    assert torch.equal(draw(z, t, cut, keys, kernel=True).long(), want)


def test_greedy_rows_ties_and_empty_rows() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-torch.inf] * 4, [-torch.inf, -torch.inf, 0.0, -torch.inf]])
    t, cut = cuts(z, torch.tensor([0.0, 1.0, 1.0]))
    for seed in range(3):
        assert draw(z, t, cut, some_keys(3, seed), kernel=True).tolist() == [1, -1, 2]
    assert draw(z[:, :1], t, cuts(z[:, :1])[1], some_keys(3), kernel=True).tolist() == [0, -1, -1]


def test_a_residual_without_mass_draws_from_p() -> None:
    z = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]])
    t, cut = cuts(z)
    residual = Residual(torch.tensor([[0.5, 0.5]]), torch.tensor([0, -1, 0]).int(), torch.tensor([-1, 0, -1]).int())
    for kernel in (False, True):
        tokens = draw(z, t, cut, some_keys(3), None, residual, kernel=kernel)
        assert torch.equal(tokens, draw(z, t, cut, some_keys(3), kernel=kernel))
        assert tokens[1] == 0


TARGET = torch.tensor([0.31, 0.02, 0.17, 0.0, 0.25, 0.05, 0.2])
DRAFT = torch.tensor([0.05, 0.55, 0.2, 0.1, 0.05, 0.05])


def exact(kind: str) -> tuple[Tensor, Residual | None]:
    """The distribution [7] that is drawn from, and what is given to draw from it."""
    if kind == "plain":
        return TARGET, None
    if kind == "dense":
        rest = (TARGET - torch.cat([DRAFT, torch.zeros(1)])).clamp_min(0.0)
        return rest / rest.sum(), Residual(DRAFT[None], torch.tensor([0]).int(), torch.tensor([-1]).int())
    rest = TARGET.clone()
    rest[2] = 0.0
    return rest / rest.sum(), Residual(None, None, torch.tensor([2]).int())


def many(kind: str, count: int, device: str = "cpu") -> tuple[Tensor, Tensor, Cutoffs, Tensor, Residual | None]:
    """What draws `count` times from `exact(kind)`."""
    residual = exact(kind)[1]
    z = TARGET.log().repeat(count, 1).to(device)
    if residual is not None:
        q_row = None if residual.q_row is None else residual.q_row.repeat(count).to(device)
        q = None if residual.q is None else residual.q.to(device)
        residual = Residual(q, q_row, residual.removed.repeat(count).to(device))
    return z, *cuts(z), some_keys(count, 11).to(device), residual


def follows(tokens: Tensor, want: Tensor) -> bool:
    counts, some = torch.bincount(tokens.long().cpu(), minlength=len(want)), want > 0
    expected = want[some].double() / want.double().sum() * len(tokens)
    return bool(counts[~some].sum() == 0) and chisquare(counts[some].numpy(), expected.numpy()).pvalue > 0.01


@pytest.mark.parametrize("kind", ["plain", "dense", "one id"])
def test_draws_follow_the_exact_distribution(kind: str) -> None:
    z, t, cut, keys, residual = many(kind, 40_000)
    tokens = draw(z, t, cut, keys, None, residual)
    assert follows(tokens, exact(kind)[0])
    first = torch.arange(25, dtype=torch.int32)  # the interpreter is slow
    assert torch.equal(draw(z, t, cut, keys, first, residual, kernel=True), tokens[:25])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "dense", "one id"])
def test_draws_follow_the_exact_distribution_on_a_gpu(kind: str) -> None:
    z, t, cut, keys, residual = many(kind, 40_000, "cuda")
    assert follows(draw(z, t, cut, keys, None, residual), exact(kind)[0])


def test_truncated_draws_stay_inside() -> None:
    z = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).repeat(40, 1)
    t, cut = cuts(z, 2.0, k=3)
    assert set(draw(z, t, cut, some_keys(40), kernel=True).tolist()) == {0, 1, 2}


def test_shapes_that_do_not_fit_are_refused() -> None:
    z = torch.zeros(2, 5)
    t, cut = cuts(z)
    with pytest.raises(ValueError, match="do not fit"):
        draw(z, t, cut, some_keys(3))
    with pytest.raises(ValueError, match="wider"):
        draw(z, t, cut, some_keys(2), None, Residual(torch.zeros(1, 6), t.int(), t.int()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(at <= last)", "(at < last)"),
        ("tl.exp(d - tl.load(total_ptr + i))", "tl.exp(d)"),
        ("tl.maximum(p - q, 0.0)", "tl.maximum(q - p, 0.0)"),
        ("tl.where(at == removed, 0.0, p)", "p"),
        ("2 * i + 1), at)", "2 * i), at)"),
        ("(part * m.to(tl.int64) + s)", "s"),
        ("mask=(at < q_width) & (own >= 0)", "mask=(at < width) & (own >= 0)"),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(module)
