"""THE strategies: name to parameters and program builder. Nothing outside a strategy's file knows its name."""

from __future__ import annotations

from decoding.strategies import (
    cfg,
    contrastive,
    dynamic_fusion,
    emulated_fine_tuning,
    nudging,
    plain,
    proxy_tuning,
    reward_guided,
    unlearning,
)
from decoding.strategies.spec import Strategy

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        plain.STRATEGY,
        proxy_tuning.STRATEGY,
        emulated_fine_tuning.STRATEGY,
        dynamic_fusion.STRATEGY,
        contrastive.STRATEGY,
        cfg.STRATEGY,
        contrastive.PROMPTS,
        reward_guided.STRATEGY,
        reward_guided.OBJECTIVES,
        unlearning.STRATEGY,
        nudging.STRATEGY,
    )
}

__all__ = ["STRATEGIES", "Strategy"]
