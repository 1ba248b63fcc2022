"""Solvers: policies whose weights are set anew for every row. State changes with accepted tokens only.

A solver gets the terms' log-prob rows and returns a weight per row and term, vectorised over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from decoding.host_build import load_kernels
from decoding.upload import uploaded


@dataclass(frozen=True, slots=True)
class Nudge:
    """Terms (base, nudger): the nudger's row where max p_base < threshold, and until its word is complete.

    A word ends before the next token that starts with a space or newline, or before EOS: the nudger goes on while its
    own best token continues the word. State: True within a nudged word.
    """

    threshold: float
    stateful: ClassVar[bool] = True

    def weights(self, rows: Sequence[torch.Tensor], states: Sequence[Any], starts: torch.Tensor) -> torch.Tensor:
        """[n, 2]: (1, 0) or (0, 1) per row."""
        base, nudger = rows
        within = uploaded([bool(state) for state in states], base.device)
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
    kernel: bool | None = None  # the GPU's kernels: on CUDA, or as told (elsewhere: in Triton's interpreter)
    stateful: ClassVar[bool] = False

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
        if _on_gpu(base) if self.kernel is None else self.kernel:
            from triton_kernels.fusion_weights import fusion_weights

            return fusion_weights(base, small, experts, self.max_alpha, self.step, self.fast, kernel=True)
        evidence = _KernelEvidence.of(base, small, experts) or _TorchEvidence(base, small, experts)
        target_f, target_g = evidence.targets()
        count = round(self.max_alpha / self.step) + 1
        points = torch.arange(count, device=base.device, dtype=base.dtype) * self.step
        start = torch.zeros(len(base), 1, device=base.device, dtype=base.dtype)
        values = [evidence.divergences(i, start, self.step, count) for i in range(len(experts))]
        f = torch.stack([v[0] for v in values], 1)  # [n, m, K]
        g = torch.stack([v[1] for v in values], 1)
        loss = (f - target_f[:, None, None]) ** 2 + (g - target_g[:, None, None]) ** 2
        best, at = loss.transpose(1, 2).flatten(1).min(1)  # alpha-major: the smaller alpha, then the earlier expert
        alpha, expert = points[at // len(experts)], at % len(experts)
        if not self.fast or count < 2:
            return alpha, expert, best
        bound = _cell_bound(f, target_f) + _cell_bound(g, target_g)  # [n, m, K - 1]
        low, cells = bound.topk(min(2, count - 1), dim=2, largest=False)
        useful = low < best[:, None, None]  # [n, m, 2]
        if not bool(useful.any()):
            return alpha, expert, best  # every cell is ruled out: the grid's answer is the global optimum
        finer = self.step / 9
        for i in range(len(experts)):
            start = (points[cells[:, i]] + finer).masked_fill(~useful[:, i], torch.nan)  # [n, 2], nan: nothing to try
            tries = (start[:, :, None] + torch.arange(8, device=base.device, dtype=base.dtype) * finer).flatten(1)
            fi, gi = evidence.divergences(i, start, finer, 8)
            tried, where = ((fi - target_f[:, None]) ** 2 + (gi - target_g[:, None]) ** 2).nan_to_num(torch.inf).min(1)
            better = tried < best
            best = torch.where(better, tried, best)
            alpha = torch.where(better, tries.gather(1, where[:, None])[:, 0], alpha)
            expert = torch.where(better, i, expert)
        return alpha, expert, best


class _TorchEvidence:
    """What the rows say, over tokens that every row can say; the specification of the kernels."""

    def __init__(self, base: torch.Tensor, small: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        usable = torch.isfinite(base) & torch.isfinite(small)
        for row in experts:
            usable &= torch.isfinite(row)

        def normalised(row: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(row.masked_fill(~usable, -torch.inf), 1).masked_fill(~usable, 0.0)

        p = torch.exp(normalised(base)) * usable
        self._p = p / p.sum(1, keepdim=True)
        q = normalised(small)
        self._deltas: list[torch.Tensor] = []
        self._targets: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row in experts:
            t = normalised(row)
            d = t - q
            self._targets.append(((torch.exp(t) * usable * d).sum(1), -(torch.exp(q) * usable * d).sum(1)))
            self._deltas.append((d - (self._p * d).sum(1, keepdim=True)).masked_fill(~usable, 0.0))

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """F and G, the means over experts of KL(Q_t, Q) and KL(Q, Q_t): [n] each."""
        return torch.stack([f for f, _ in self._targets]).mean(0), torch.stack([g for _, g in self._targets]).mean(0)

    def divergences(self, i: int, start: torch.Tensor, step: float, points: int) -> tuple[torch.Tensor, torch.Tensor]:
        """f and g of expert i at start + k step, k < points, for starts [n, c]: [n, c * points] each."""
        d, f, g = self._deltas[i], [], []
        highest = d.masked_fill(self._p == 0, -torch.inf).amax(1, keepdim=True)  # exponents stay at or below 0
        shifted = d - highest
        for cell in range(start.shape[1]):
            for k in range(points):
                a = start[:, cell : cell + 1] + k * step
                tilted = self._p * torch.exp(a * shifted)
                total = tilted.sum(1)
                level = (a * highest)[:, 0] + torch.log(total)
                f.append(a[:, 0] * (tilted * d).sum(1) / total - level)
                g.append(level)
        return torch.stack(f, 1), torch.stack(g, 1)


class _KernelEvidence:
    """The same from kernels that read each vocabulary once for all points; sums over [n] in float64."""

    def __init__(self, rows: Sequence[torch.Tensor], sums: Sequence[torch.Tensor]) -> None:
        self._rows, self._dtype = rows, rows[0].dtype
        self._sums = [each[:, :, :6].double().sum(1) for each in sums]  # [n, 6]

    @classmethod
    def of(cls, base: torch.Tensor, small: torch.Tensor, experts: Sequence[torch.Tensor]) -> _KernelEvidence | None:
        """None where the kernels do not apply: other devices and dtypes, no compiler, tokens that a row cannot say."""
        if base.device.type != "cpu" or base.dtype != torch.float32 or not load_kernels():
            return None
        rows = [row.contiguous() for row in (base, small, *experts)]
        sums = [torch.ops.trimtab.fusion_sums(rows[0], rows[1], row) for row in rows[2:]]
        if any(bool(each[:, :, 6].any()) for each in sums):
            return None
        return cls(rows, sums)

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """F and G, [n] each."""
        f, g = [], []
        for _, zq, zt, _, qd, td in (each.unbind(1) for each in self._sums):
            shift = torch.log(zt) - torch.log(zq)
            f.append(td / zt - shift)
            g.append(shift - qd / zq)
        return torch.stack(f).mean(0).to(self._dtype), torch.stack(g).mean(0).to(self._dtype)

    def divergences(self, i: int, start: torch.Tensor, step: float, points: int) -> tuple[torch.Tensor, torch.Tensor]:
        """f and g of expert i at start + k step, k < points, for starts [n, c]: [n, c * points] each."""
        base, small, expert = self._rows[0], self._rows[1], self._rows[2 + i]
        found = torch.ops.trimtab.fusion_moments(base, small, expert, start.contiguous(), step, points)
        tops, totals, weighted = found.double().unbind(4)  # [n, c, shares, points]
        top = tops.amax(2, keepdim=True)
        scale = torch.exp(tops - top)
        total, mean = (totals * scale).sum(2), (weighted * scale).sum(2)  # [n, c, points]
        zp, pd = self._sums[i][:, 0, None, None], self._sums[i][:, 3, None, None]
        centre = pd / zp
        a = start.double()[:, :, None] + torch.arange(points).double() * step
        level = top[:, :, 0] + torch.log(total / zp) - a * centre
        f = a * (mean / total - centre) - level
        return f.flatten(1).to(self._dtype), level.flatten(1).to(self._dtype)


def _on_gpu(row: torch.Tensor) -> bool:
    """Whether the GPU's kernels serve it: Triton is not there on every platform, and they add up in fp32."""
    return row.is_cuda and row.dtype != torch.float64 and find_spec("triton") is not None


def _cell_bound(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squared distance of a growing function to its target within each grid cell: [n, m, K - 1]."""
    above = (values[:, :, :-1] - target[:, None, None]).clamp_min(0)
    below = (target[:, None, None] - values[:, :, 1:]).clamp_min(0)
    return torch.maximum(above, below) ** 2
