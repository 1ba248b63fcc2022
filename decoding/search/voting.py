"""Votes over final answers: equal ones are counted together, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from decoding.answers import group


def weighted(
    answers: Sequence[str], weights: Sequence[float], scores: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Indices best first, and the votes of each one's group: the sum of its members' weights.

    The group with most votes comes first, within it the best score. Ties go to what came first.
    """
    votes = [0.0] * len(answers)
    first = [0] * len(answers)
    for members in group(answers):
        total = math.fsum(weights[i] for i in members)
        for i in members:
            votes[i], first[i] = total, min(members)
    order = sorted(range(len(answers)), key=lambda i: (-votes[i], first[i], -scores[i], i))
    return order, votes


def squashed(scores: Sequence[float]) -> list[float]:
    """Through a sigmoid: scores without a zero become weights from 0 to 1."""
    return [1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x)) for x in scores]
