"""Logistic regression: optimal, folded, balanced; what is separable is learned; AUC against its definition."""

import pytest
import torch

from training.judging import judged
from training.logistic import NothingToLearn, auc, fit_logistic


def data(n: int = 400, features: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of very different means and scales, labels by a hyperplane with noise, and the noiseless labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator).double()
    side = x @ torch.arange(1, features + 1).double() - 1
    labels = side + 3 * torch.randn(n, generator=generator) > 0
    scale = 10.0 ** torch.arange(features).double()
    return x * scale - 5 * scale, labels, side > 0


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("l2", [0.1, 10.0])
def test_it_is_the_optimum(balanced: bool, l2: float) -> None:
    x, y, _ = data()
    head = fit_logistic(x, y, l2=l2, balanced=balanced)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    w = (head.weight * deviation).requires_grad_()  # unfolded
    b = (torch.tensor(head.bias).double() + head.weight @ mean).requires_grad_()
    share = len(y) / 2
    costs = torch.where(y, share / y.sum(), share / (~y).sum()) if balanced else torch.ones(len(y)).double()
    margins = torch.where(y, 1.0, -1.0) * ((x - mean) / deviation @ w + b)
    loss = -(costs * torch.nn.functional.logsigmoid(margins)).sum() + l2 / 2 * w.square().sum()
    slopes = torch.autograd.grad(loss, [w, b])
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4  # the sum over 400 losses has slopes of hundreds


def test_separable_hidden_states_are_learned() -> None:
    x, _, side = data()
    head = fit_logistic(x[:300], side[:300], l2=0.01)
    held = judged(head(x[300:]), side[300:])
    assert held["auc"] > 0.99
    assert held["accuracy"] > 0.95
    assert held["recall_important"] > 0.9


def test_balance_moves_the_threshold_to_the_rare_class() -> None:
    x, y, _ = data()
    keep = torch.cat([y.nonzero()[:20, 0], (~y).nonzero()[:, 0]])
    x, y = x[keep], y[keep]  # few are True
    found = {balanced: float((fit_logistic(x, y, balanced=balanced)(x)[y] > 0).double().mean()) for balanced in (1, 0)}
    assert found[1] > found[0] + 0.2


def test_a_constant_feature_gets_no_weight() -> None:
    x, y, _ = data()
    constant = torch.full((len(y), 1), 3.0).double()
    head = fit_logistic(torch.cat([x, constant], 1), y)
    assert head.weight[-1] == 0
    torch.testing.assert_close(head(torch.cat([x, constant], 1)), fit_logistic(x, y)(x), atol=1e-4, rtol=0)


def test_one_class_is_refused() -> None:
    with pytest.raises(NothingToLearn, match="the same"):
        fit_logistic(torch.randn(5, 2), torch.ones(5, dtype=torch.bool))


def test_auc() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 6, (60,), generator=generator).double()  # many ties
    labels = torch.rand(60, generator=generator) < 0.4
    pairs = [(a, b) for a in scores[labels].tolist() for b in scores[~labels].tolist()]
    assert auc(scores, labels) == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    assert auc(scores, torch.ones(60, dtype=torch.bool)) is None


def test_thresholds_keep_their_promise() -> None:
    scores = torch.tensor([-3.0, -2, -1, 0.5, -2.5, 0.2, 1, 2]).double()
    accept = torch.tensor([False, False, False, False, True, True, True, True])
    found = judged(scores, accept)
    assert found["recall_important"] == 0.75
    assert found["accepted"] == 0.75
    assert found["accuracy"] == 0.75
    for recall, entry in found["thresholds"].items():
        cut = torch.tensor(entry["threshold"]).double().logit() + 1e-3  # written with four digits
        assert float((scores[~accept] <= cut).double().mean()) >= float(recall)
        assert entry["accepted"] == 0.5  # 1 and 2 are above every important one
