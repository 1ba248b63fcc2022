"""Judge heads: one linear row over a model's last hidden state that tells whether a drafted token is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class JudgeHead:
    """weight: [hidden] fp32, bias: logit of "this token is right" at hidden state h is weight . h + bias."""

    weight: torch.Tensor
    bias: float
    target_hash: str = ""

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n] fp32 logits."""
        return hidden.float() @ self.weight.to(hidden.device) + self.bias
