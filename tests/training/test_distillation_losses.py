"""Distillation losses against closed forms, finite differences, each other, and shifts of the logits."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from training.losses import Distillation, acceptance, kl, lk, lk_mixed, tvd, tvd_plus

LOSSES: dict[str, Distillation] = {
    "kl": kl,
    "tvd": tvd,
    "tvd++": tvd_plus,
    "tvd++ by position": partial(tvd_plus, per_position=True),
    "lk": lk,
    "lk mixed": partial(lk_mixed, decay=2.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def pair(n: int = 6, vocabulary: int = 9) -> tuple[Tensor, Tensor]:
    """Two independent fp64 tables of logits [n, vocab]; no two probabilities of a row are equal."""
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64) * 2
    return target, draft.requires_grad_()


def gradient(loss: Callable[[Tensor], Tensor], draft: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss(draft).sum(), draft)
    return found


def test_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.25, 0.35, 0.4]]).double()
    target, draft = p.log(), q.log()
    divergence = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.35) + 0.2 * math.log(0.5)
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-7)  # of fp32 literals
    close(acceptance(target, draft), torch.tensor([0.75]).double())
    close(tvd(target, draft), torch.tensor([0.25]).double())
    close(kl(target, draft), torch.tensor([divergence]).double())
    close(lk(target, draft), torch.tensor([-math.log(0.75)]).double())
    # Rewarded is the first token only, which the drafter draws with chance 1/4: sigma = sqrt(1/4 * 3/4).
    close(tvd_plus(target, draft), torch.tensor([0.25 / math.sqrt(3 / 16)]).double())
    w = math.exp(-3 * 0.75)
    mixed = w * divergence + (1 - w) * 0.25
    close(lk_mixed(target, draft, decay=3.0), torch.tensor([mixed]).double())


def test_identities() -> None:
    target, draft = pair()
    p, q = target.softmax(-1), draft.softmax(-1)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(tvd(target, draft), (p - q).abs().sum(-1) / 2)
    close(acceptance(target, draft), 1 - tvd(target, draft))
    close(lk(target, draft), -torch.log1p(-tvd(target, draft)))
    close(lk_mixed(target, draft, decay=0.0), kl(target, draft))
    close(lk_mixed(target, draft, decay=1e9), tvd(target, draft))


@every_loss
def test_zero_and_stationary_where_both_agree(loss: Distillation) -> None:
    target, _ = pair()
    draft = target.clone().requires_grad_()
    assert float(loss(target, draft).detach().abs().max()) < 1e-12
    assert float(gradient(lambda d: loss(target, d), draft).abs().max()) < 1e-12
    _, other = pair()
    assert float(loss(target, other).detach().min()) > 1e-3


@pytest.mark.parametrize("loss", [kl, tvd, lk, acceptance])
def test_gradients_are_those_of_finite_differences(loss: Distillation) -> None:
    target, draft = pair()
    assert torch.autograd.gradcheck(lambda d: loss(target, d), (draft,), eps=1e-7, atol=1e-7, rtol=1e-5)


def test_tvd_is_a_policy_gradient() -> None:
    """Its gradient is -E_q[r grad log q], r = 1{p > q}; any baseline taken from r leaves it as it is."""
    target, draft = pair()
    q, reward = draft.softmax(-1).detach(), (target.softmax(-1) > draft.softmax(-1)).double()
    for baseline in (0.0, 0.37):
        surrogate = gradient(lambda d, b=baseline: -(q * (reward - b) * d.log_softmax(-1)).sum(-1), draft)  # type: ignore[misc]
        torch.testing.assert_close(gradient(lambda d: tvd(target, d), draft), surrogate, rtol=1e-9, atol=1e-12)


def test_tvd_plus_only_rescales_the_gradient() -> None:
    target, draft = pair()
    plain = gradient(lambda d: tvd(target, d), draft)
    batch = gradient(lambda d: tvd_plus(target, d), draft)
    factors = (batch / plain).flatten()
    torch.testing.assert_close(factors, factors[0].expand_as(factors), rtol=1e-9, atol=0)
    single = gradient(lambda d: tvd_plus(target, d, per_position=True), draft) / plain
    chance = (draft.softmax(-1) * (target.softmax(-1) > draft.softmax(-1))).sum(-1).detach()
    expected = (chance * (1 - chance)).rsqrt()[:, None].expand_as(single)
    torch.testing.assert_close(single, expected, rtol=1e-9, atol=0)
    assert float(expected.max() / expected.min()) > 1.05  # else nothing is told apart


def test_sigma_has_a_floor() -> None:
    target = torch.tensor([[0.0, 60.0]], dtype=torch.float64)
    draft = torch.tensor([[60.0, 0.0]], dtype=torch.float64)  # meets a reward once in e^60 draws
    torch.testing.assert_close(tvd_plus(target, draft, per_position=True, floor=0.02), torch.tensor([50.0]).double())


def test_lk_gradients() -> None:
    """That of lk is TVD's over the acceptance; the mixed one weighs KL's and TVD's, its weight held still."""
    target, draft = pair()
    accepted = acceptance(target, draft).detach()
    distance, divergence = gradient(lambda d: tvd(target, d), draft), gradient(lambda d: kl(target, d), draft)
    torch.testing.assert_close(gradient(lambda d: lk(target, d), draft), distance / accepted[:, None])
    w = torch.exp(-2 * accepted.mean())
    mixed = gradient(lambda d: lk_mixed(target, d, decay=2.0), draft)
    torch.testing.assert_close(mixed, w * divergence + (1 - w) * distance)


@every_loss
@pytest.mark.parametrize("shift", [-64.0, 64.0])
def test_a_constant_added_to_logits_changes_nothing(loss: Distillation, shift: float) -> None:
    target, draft = (logits.detach().float() for logits in pair())
    # fp32 keeps 24 bits: adding 64 costs at most 64 * 2^-24 a logit, and TVD++ divides by a sigma near 0.4.
    torch.testing.assert_close(loss(target + shift, draft - shift), loss(target, draft), atol=1e-4, rtol=0)


@every_loss
def test_half_precision_is_widened(loss: Distillation) -> None:
    target, draft = (logits.detach().bfloat16() for logits in pair())
    assert torch.equal(loss(target, draft), loss(target.float(), draft.float()))
