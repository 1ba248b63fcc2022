"""Solvers: policies whose weights are set anew for every row. State changes with accepted tokens only.

A solver gets the terms' log-prob rows and returns a weight per row and term, vectorised over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Nudge:
    """Terms (base, nudger): the nudger's row where max p_base < threshold, and until its word is complete.

    A word ends before the next token that starts with a space or newline, or before EOS: the nudger goes on while its
    own best token continues the word. State: True within a nudged word.
    """

    threshold: float

    def weights(self, rows: Sequence[torch.Tensor], states: Sequence[Any], starts: torch.Tensor) -> torch.Tensor:
        """[n, 2]: (1, 0) or (0, 1) per row."""
        base, nudger = rows
        within = torch.tensor([bool(state) for state in states], device=base.device)
        goes_on = within & ~starts[nudger.argmax(1)]
        unsure = base.max(1).values < torch.log(torch.tensor(self.threshold))
        nudged = (goes_on | unsure).float()
        return torch.stack([1.0 - nudged, nudged], 1)

    def advance(self, state: Any, weights: Sequence[float], token: int) -> Any:
        """Within a word after a nudged token, outside after one of the base's."""
        return weights[1] > 0.5


@dataclass(frozen=True, slots=True)
class Fusion:
    """Terms (base, small, expert_1 .. expert_m): weights (1, -a, .., a, ..) with one expert active.

    Fan et al. 2024, section 3.3: i and a minimise sum_t (KL(P~,P) - KL(Q_t,Q))^2 + (KL(P,P~) - KL(Q,Q_t))^2 over
    experts i and a in {0, step, .., max_alpha}; ties go to the smaller a, then the earlier expert. With
    d = lp_i - lp_small centred under P and A(a) = log E_P[exp(a d)], KL(P~,P) = f(a) = a A'(a) - A(a) and
    KL(P,P~) = g(a) = A(a); both grow with a, and up to a constant the loss is m ((f - F)^2 + (g - G)^2) with F, G the
    experts' means. `fast` refines the two most promising cells of each expert's grid and accepts only what is
    strictly better.
    """

    fast: bool = True
    max_alpha: float = 2.0
    step: float = 0.1

    def weights(self, rows: Sequence[torch.Tensor], states: Sequence[Any], starts: torch.Tensor) -> torch.Tensor:
        """[n, 2 + m]."""
        alpha, expert, _ = self.solve(rows[0], rows[1], rows[2:])
        weights = torch.zeros(len(alpha), len(rows), device=alpha.device, dtype=rows[0].dtype)
        weights[:, 0] = 1.0
        weights[:, 1] = -alpha
        return weights.scatter_(1, expert[:, None] + 2, alpha[:, None])

    def advance(self, state: Any, weights: Sequence[float], token: int) -> Any:
        """Solved anew for every token."""
        return None

    def solve(
        self, base: torch.Tensor, small: torch.Tensor, experts: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(alpha [n], expert [n] int64, loss [n]) from log-prob rows [n, W].

        The loss is (f - F)^2 + (g - G)^2: the sum over experts is m times that, and a constant.
        """
        points = torch.arange(round(self.max_alpha / self.step) + 1, device=base.device, dtype=base.dtype) * self.step
        p, deltas, target_f, target_g = _prepare(base, small, experts)
        values = [_divergences(p, d, points.expand(len(base), -1)) for d in deltas]
        f = torch.stack([v[0] for v in values], 1)  # [n, m, K]
        g = torch.stack([v[1] for v in values], 1)
        loss = (f - target_f[:, None, None]) ** 2 + (g - target_g[:, None, None]) ** 2
        best, at = loss.transpose(1, 2).flatten(1).min(1)  # alpha-major: the smaller alpha, then the earlier expert
        alpha, expert = points[at // len(deltas)], at % len(deltas)
        if not self.fast or len(points) < 2:
            return alpha, expert, best
        bound = _cell_bound(f, target_f) + _cell_bound(g, target_g)  # [n, m, K - 1]
        low, cells = bound.topk(min(2, bound.shape[2]), dim=2, largest=False)
        if not bool((low < best[:, None, None]).any()):
            return alpha, expert, best  # every cell is ruled out: the grid's answer is the global optimum
        fractions = torch.arange(1, 9, device=base.device, dtype=base.dtype) * (self.step / 9)
        for i, d in enumerate(deltas):
            finer = (points[cells[:, i]][:, :, None] + fractions).flatten(1)  # [n, 16]
            fi, gi = _divergences(p, d, finer)
            tried, where = ((fi - target_f[:, None]) ** 2 + (gi - target_g[:, None]) ** 2).min(1)
            better = tried < best
            best = torch.where(better, tried, best)
            alpha = torch.where(better, finer.gather(1, where[:, None])[:, 0], alpha)
            expert = torch.where(better, i, expert)
        return alpha, expert, best


def _prepare(
    base: torch.Tensor, small: torch.Tensor, experts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """P [n, W], the centred d_i, and the targets F, G [n], over tokens that are finite in every row."""
    usable = torch.isfinite(base) & torch.isfinite(small)
    for row in experts:
        usable &= torch.isfinite(row)

    def normalised(row: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(row.masked_fill(~usable, -torch.inf), 1).masked_fill(~usable, 0.0)

    p = torch.exp(normalised(base)) * usable
    p /= p.sum(1, keepdim=True)
    q = normalised(small)
    deltas, fs, gs = [], [], []
    for row in experts:
        t = normalised(row)
        d = t - q
        fs.append((torch.exp(t) * usable * d).sum(1))
        gs.append(-(torch.exp(q) * usable * d).sum(1))
        deltas.append((d - (p * d).sum(1, keepdim=True)).masked_fill(~usable, 0.0))
    return p, deltas, torch.stack(fs).mean(0), torch.stack(gs).mean(0)


def _divergences(p: torch.Tensor, d: torch.Tensor, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f(a) = a A'(a) - A(a) and g(a) = A(a), [n, k] each, for alphas [n, k]."""
    highest = d.masked_fill(p == 0, -torch.inf).amax(1, keepdim=True)  # exponents stay at or below 0
    shifted = d - highest
    f, g = [], []
    for k in range(alphas.shape[1]):
        a = alphas[:, k : k + 1]
        tilted = p * torch.exp(a * shifted)
        total = tilted.sum(1)
        mean = (tilted * d).sum(1) / total
        level = (a * highest)[:, 0] + torch.log(total)
        f.append(a[:, 0] * mean - level)
        g.append(level)
    return torch.stack(f, 1), torch.stack(g, 1)


def _cell_bound(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squared distance of a growing function to its target within each grid cell: [n, m, K - 1]."""
    above = (values[:, :, :-1] - target[:, None, None]).clamp_min(0)
    below = (target[:, None, None] - values[:, :, 1:]).clamp_min(0)
    return torch.maximum(above, below) ** 2
