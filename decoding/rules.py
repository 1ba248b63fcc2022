"""Acceptance rules: what is known about drafted rows, and which of them each rule lets pass.

A rule turns evidence into one decision per row; the first refusal of a sequence ends its draft. Here p is the policy
after every processor at that position, its drafted prefix included, and q what the draft was drawn from after the same
processors. Rules that are not `lossless` accept more than a sample of the policy allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.core import Speculation
from decoding.upload import uploaded


@dataclass(slots=True)
class Evidence:
    """What the rules see of D drafted rows.

    exact: [D] bool, the exact rule's verdict; u: [D] uniforms; p, q: [D] the draft's probabilities under policy and
    drafter; specs: D requests' parameters; mixed: [D] bool, whether the policy is more than one model. On demand, per
    rule: open: [D, W] processed log-probs at temperature, before truncation; lp, q_lp: [D, W] policy's and drafter's
    log-probs at T = 1, before any processor; tokens: [D] int64; scores: [D] the judge head's logits.
    """

    exact: torch.Tensor
    u: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    specs: Seq[Speculation]
    tokens: torch.Tensor
    greedy: torch.Tensor
    mixed: torch.Tensor
    open: torch.Tensor | None = None
    lp: torch.Tensor | None = None
    q_lp: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    def column(self, read: Callable[[Speculation], float]) -> torch.Tensor:
        """A parameter of each row's request: [D] fp32."""
        return uploaded([read(spec) for spec in self.specs], self.u.device)


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of `RULES`: `accept` maps evidence to [D] bool.

    keyed: drafter and policy share the noise of each position. compares: it needs both models' unfiltered log-probs,
    so drafts must come from a model. judges: it reads the target's hidden states through a judge head. residual: what
    replaces a refused draft is drawn from norm(max(p - q, 0)), else from p. threshold: the default of that parameter.
    """

    name: str
    accept: Callable[[Evidence], torch.Tensor]
    summary: str
    lossless: bool = False
    keyed: bool = False
    compares: bool = False
    opens: bool = False
    judges: bool = False
    residual: bool = True
    bonus: bool = True
    threshold: float | None = None
    paper: str = ""


def _exact(e: Evidence) -> torch.Tensor:
    return e.exact


def _judge(e: Evidence) -> torch.Tensor:
    """w.h + b > logit(threshold), h at the draft's own position; of a mix's tokens only those near the best."""
    assert e.scores is not None
    assert e.lp is not None
    right = e.scores > e.column(lambda spec: _logit(_threshold(spec)))
    near = e.lp.gather(1, e.tokens[:, None])[:, 0] >= e.lp.amax(1) - e.column(lambda spec: spec.kappa)
    return e.exact | (right & (near | ~e.mixed))


def _kl(e: Evidence) -> torch.Tensor:
    """KL(drafter, policy) < threshold; where the policy is `certain`, the exact rule alone."""
    assert e.lp is not None
    assert e.q_lp is not None
    gap = torch.where(e.q_lp > -torch.inf, e.q_lp.exp() * (e.q_lp - e.lp), 0.0).sum(1)
    limit = e.column(_threshold)
    certain = e.lp.amax(1).exp() > e.column(lambda spec: 2.0 if spec.certain is None else spec.certain)
    return e.exact | (((gap < limit) | torch.isinf(limit)) & ~certain)


def _mixture(e: Evidence) -> torch.Tensor:
    """The exact rule against w p + (1 - w) q: acceptance 1 - w TV."""
    w = e.column(lambda spec: spec.weight)
    return e.u * e.q < w * e.p + (1 - w) * e.q


def _typical(e: Evidence) -> torch.Tensor:
    """p(x) > min(epsilon, delta exp(-H(p))), p before truncation; greedy requests keep the exact rule."""
    assert e.open is not None
    p = e.open.exp()
    entropy = -torch.where(p > 0, p * e.open, 0.0).sum(1)
    floor = torch.minimum(e.column(lambda spec: spec.epsilon), e.column(lambda spec: spec.delta) * torch.exp(-entropy))
    return torch.where(e.greedy, e.exact, p.gather(1, e.tokens[:, None])[:, 0] > floor)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "rejection",
            _exact,
            "accept x if u q(x) < p(x), else sample norm(max(p - q, 0)): the policy's distribution, most accepted",
            lossless=True,
            paper="Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318",
        ),
        Rule(
            "coupled",
            _exact,
            "policy and drafter draw with the same noise and must agree: a seed's text, whatever drafts",
            lossless=True,
            keyed=True,
        ),
        Rule(
            "judge",
            _judge,
            "the exact rule, or a linear head on the target's hidden state finds the draft right",
            judges=True,
            compares=False,
            bonus=False,
            threshold=0.5,
            paper="Bachmann et al. 2025, Judge Decoding, arXiv:2501.19309",
        ),
        Rule(
            "kl",
            _kl,
            "the exact rule, or the drafter's distribution is within `threshold` nats of the policy's",
            compares=True,
            threshold=0.1,
            paper="arXiv:2601.04766",
        ),
        Rule(
            "mixture",
            _mixture,
            "the exact rule against weight p + (1 - weight) q",
            paper="DIVERSED: verification against a mixture of policy and drafter",
        ),
        Rule(
            "typical",
            _typical,
            "accept x if p(x) > min(epsilon, delta exp(-entropy of p))",
            opens=True,
            residual=False,
            paper="Cai et al. 2024, Medusa, arXiv:2401.10774",
        ),
    )
}


def _threshold(spec: Speculation) -> float:
    default = RULES[spec.accept or "rejection"].threshold
    chosen = default if spec.threshold is None else spec.threshold
    assert chosen is not None
    return chosen


def _logit(p: float) -> float:
    return -math.inf if p <= 0 else math.inf if p >= 1 else math.log(p / (1 - p))
