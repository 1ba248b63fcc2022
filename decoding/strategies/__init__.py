"""THE strategies: name to parameters and program builder. Nothing outside a strategy's file knows its name."""

from __future__ import annotations

from decoding.strategies import cfg, plain, proxy_tuning
from decoding.strategies.spec import Strategy

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (plain.STRATEGY, proxy_tuning.STRATEGY, cfg.STRATEGY)
}

__all__ = ["STRATEGIES", "Strategy"]
