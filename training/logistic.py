"""Logistic regression on standardised features, folded into one weight row and a bias for the raw ones."""

from dataclasses import dataclass

import torch
from torch import Tensor


class NothingToLearn(ValueError):
    """There are no labels, or all of them are the same."""


@dataclass(frozen=True, slots=True)
class Linear:
    """score(x) = weight . x + bias; the probability of True is its sigmoid."""

    weight: Tensor  # [features] fp64
    bias: float

    def __call__(self, features: Tensor) -> Tensor:
        """Scores [n] of `features` [n, features]."""
        return features.double() @ self.weight + self.bias


def fit_logistic(features: Tensor, labels: Tensor, *, l2: float = 1.0, balanced: bool = True) -> Linear:
    """Fit `labels` [n] bool to `features` [n, features].

    Minimises sum_i c_i log-loss_i + l2 / 2 |w|^2 over the weights w of the standardised features, by L-BFGS in fp64.
    `balanced`: c_i makes both classes weigh the same (n / 2 in all), else 1.

    Raises NothingToLearn if all labels are the same: there is nothing to tell apart.
    """
    x, y = features.double(), labels.double()
    positive = int(labels.sum())
    if positive in (0, len(labels)):
        raise NothingToLearn(
            f"all {len(labels)} labels are the same; more or harder prompts, or another drafter, are needed"
        )
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 1e-8 * (1 + mean.abs()), deviation, torch.ones_like(deviation))  # constants
    x = (x - mean) / deviation
    share = len(labels) / 2
    costs = torch.where(labels, share / positive, share / (len(labels) - positive)) if balanced else torch.ones_like(y)
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        nats = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y, costs, reduction="sum")
        loss: Tensor = (nats + l2 / 2 * weight.square().sum()) / len(labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
    folded = (weight / deviation).detach()
    return Linear(folded, float(bias.detach() - folded @ mean))


def auc(scores: Tensor, labels: Tensor) -> float | None:
    """Chance that a True scores above a False, ties counting half; None if one of them is missing.

    `scores` [n], `labels` [n] bool.
    """
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return None
    ascending = scores.sort().values
    below, upto = (torch.searchsorted(ascending, scores, right=right) for right in (False, True))
    ranks = (below + upto + 1).double() / 2  # [n], 1 for the least; equals share theirs
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))
