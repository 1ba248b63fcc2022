"""Log-probs of tokens and pairwise losses: the kernels in the interpreter against the plain formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from tests.triton_kernels.shapes import Shapes
from triton_kernels import preference_loss as module
from triton_kernels.preference_loss import preference_loss, sequence_logprobs, token_logprobs

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def material(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Head, torch.Tensor]:
    """hidden, weight, bias; targets, of which every fourth is none."""
    g = torch.Generator().manual_seed(n * 1000 + v)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    bias, targets = torch.randn(v, generator=g), torch.randint(v, (n,), generator=g)
    targets[-1] = v - 1
    return (hidden.to(dtype), weight.to(dtype), bias.to(dtype)), targets.masked_fill(torch.arange(n) % 4 == 1, -100)


def plain_logprobs(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(torch.nn.functional.linear(h, w, b), 1)
    return torch.stack([row[t] if t >= 0 else row.new_zeros(()) for row, t in zip(logprobs, targets, strict=True)])


def learned(
    call: Callable[..., torch.Tensor], head: Head, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `call` gives, and the gradients of its sum in unequal parts for hidden, weight and bias, in fp64."""
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in head]
    found = call(*leaves)
    (found * torch.linspace(1, 2, max(1, found.numel()), dtype=found.dtype).view(found.shape)).sum().backward()
    slopes = [x.grad for x in leaves]
    assert all(s is not None and s.dtype == x.dtype for s, x in zip(slopes, leaves, strict=True))
    return found.detach().double(), [s.double() for s in slopes if s is not None]


def check(call: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], head: Head, tokens: int = 1) -> None:
    """`call` is `plain` of the same head, whose value sums the log-probs of `tokens` tokens.

    A logit is a product of D terms plus a bias, rounded to the dtype, and so is what is read from it. A slope is within
    2 of 0, and is rounded likewise; gradients sum slopes over the rows (weight, bias) or the vocabulary (hidden).
    """
    want, want_slopes = learned(plain, head, torch.float64)
    got, slopes = learned(call, head)
    hidden, weight, bias = head
    dtype = hidden.dtype
    size = float((hidden.float() @ weight.float().t()).abs().max() + bias.float().abs().max()) + 2
    slack = (4.0 if dtype == torch.float32 else 1.0) * torch.finfo(dtype).eps * size
    assert (got - want).abs().max() <= slack * tokens, (got, want)
    scales = (float(weight.abs().max()), float(hidden.abs().max()), 1.0)
    for mine, exact, scale in zip(slopes, want_slopes, scales, strict=True):
        assert (mine - exact).abs().max() <= 2 * slack * scale, (mine, exact)


@pytest.mark.parametrize(
    ("n", "d", "v", "chunk"), [(1, 5, 1, 1), (1, 5, 7, 3), (6, 5, 301, 1), (6, 5, 301, 4), (6, 3, 4999, 6)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_gradients_are_those_of_the_plain_formula(
    n: int, d: int, v: int, chunk: int, dtype: torch.dtype
) -> None:
    head, targets = material(n, d, v, dtype)

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return token_logprobs(*leaves, targets, chunk=chunk, kernel=True)

    check(call, lambda *leaves: plain_logprobs(*leaves, targets), head)


def test_the_reference_is_the_plain_formula() -> None:
    head, targets = material(9, 4, 50)
    wide = tuple(x.double() for x in head)
    got = learned(lambda *leaves: token_logprobs(*leaves, targets, kernel=False), wide)  # type: ignore[arg-type]
    want = learned(lambda *leaves: plain_logprobs(*leaves, targets), wide)  # type: ignore[arg-type]
    torch.testing.assert_close([got[0], *got[1]], [want[0], *want[1]])


def test_no_token_to_predict_and_no_rows() -> None:
    head, targets = material(3, 5, 40)
    for kernel in (True, False):
        found, slopes = learned(
            lambda *leaves, kernel=kernel: token_logprobs(*leaves, targets * 0 - 1, kernel=kernel), head
        )
        assert not found.any()
        assert not any(slope.any() for slope in slopes)
    hidden, weight, bias = head
    assert token_logprobs(hidden[:0], weight, bias, targets[:0], kernel=True).shape == (0,)


def test_logits_far_apart() -> None:
    hidden, weight = torch.eye(2), torch.tensor([[300.0, 0.0], [0.0, -300.0], [0.0, 0.0]])
    found, slopes = learned(
        lambda *leaves: token_logprobs(*leaves, torch.tensor([1, 0]), kernel=True), (hidden, weight, torch.zeros(3))
    )
    torch.testing.assert_close(found, torch.tensor([-300.0, -torch.log(torch.tensor(2.0)).item()]).double())
    assert all(torch.isfinite(slope).all() for slope in slopes)


def pairwise(head: Head, targets: torch.Tensor, segments: torch.Tensor, pairs: int, beta: float, ref: Any) -> Any:
    """The loss with everything written out."""
    lp = plain_logprobs(*head, targets)
    sums = torch.stack([(lp * (segments == s)).sum() for s in range(2 * pairs)])
    margin = sums[:pairs] - sums[pairs:]
    if ref is not None:
        margin = margin - (ref[:pairs] - ref[pairs:])
    return torch.log1p(torch.exp(-beta * margin)).mean()


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize(("n", "pairs"), [(2, 1), (17, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pairwise_loss(with_reference: bool, n: int, pairs: int, dtype: torch.dtype) -> None:
    head, targets = material(n, 5, 130, dtype)
    segments = torch.arange(n) * 2 * pairs // n  # the last sequences may be shorter
    segments = torch.where(targets < 0, -1, segments)
    ref = torch.linspace(-9, -5, 2 * pairs) if with_reference else None

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return preference_loss(*leaves[:2], targets, segments, pairs, 0.5, ref, bias=leaves[2], chunk=5, kernel=True)

    check(call, lambda *leaves: pairwise(leaves, targets, segments, pairs, 0.5, ref), head, n)  # type: ignore[arg-type]


def test_sums_are_of_each_sequences_tokens() -> None:
    (hidden, weight, _), targets = material(8, 5, 60)
    segments = torch.tensor([3, 3, 0, 0, 1, 1, 1, 3])
    found = sequence_logprobs(hidden, weight, targets, segments, 4, kernel=True)
    each = plain_logprobs(hidden, weight, torch.zeros(60), targets)
    want = torch.stack([each[segments == s].sum() for s in range(4)])
    torch.testing.assert_close(found, want)
    assert found[2] == 0
    assert torch.equal(sequence_logprobs(hidden, weight, targets, segments, 4, kernel=False)[2:3], torch.zeros(1))


def test_whole_logits_are_never_made() -> None:
    (hidden, weight, bias), targets = material(5, 4, 333)
    with Shapes() as shapes:
        token_logprobs(hidden.requires_grad_(), weight, bias, targets, chunk=2, kernel=True).sum().backward()
    assert (2, 333) in shapes.made
    assert (5, 333) not in shapes.made
    assert (333, 4) not in shapes.made  # no gradient for a frozen head


def test_what_does_not_fit_is_refused() -> None:
    (hidden, weight, bias), targets = material(4, 4, 9)
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden, weight, bias, targets[:3])
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(hidden, weight, bias[:8], targets)
    with pytest.raises(ValueError, match="segments"):
        sequence_logprobs(hidden, weight, targets, targets[:2], 2)
    with pytest.raises(ValueError, match="pairs"):
        preference_loss(hidden, weight, targets, targets, 2, 0.1, torch.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total * tl.exp(top - higher)", "total"),
        ("norm = top + tl.log(total)", "norm = top + total"),
        ("tl.where(at == target, 1.0, 0.0) - q", "tl.where(at == target, 1.0, 0.0)"),
        ("at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", "at = tl.arange(0, BLOCK)"),
        ("slope = tl.load(slopes_ptr + row) *", "slope = tl.load(slopes_ptr) *"),
        ("if target >= 0", "if target >= -200"),
        ("made.add(start, logits", "made.add(0, logits"),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutated(Path(module.__file__), old, new, tmp_path).token_logprobs
    (hidden, weight, bias), targets = material(6, 3, 4500)
    head = (hidden, weight, bias + 4 * (torch.arange(4500) > 4200))  # the second block holds the largest
    for call in (token_logprobs, broken):

        def made(*leaves: torch.Tensor, call: Any = call) -> torch.Tensor:
            found: torch.Tensor = call(*leaves, targets, chunk=3, kernel=True)
            return found

        if call is token_logprobs:
            check(made, lambda *leaves: plain_logprobs(*leaves, targets), head)
        else:
            with pytest.raises(AssertionError):
                check(made, lambda *leaves: plain_logprobs(*leaves, targets), head)
