"""THE strategies: name to parameters and program builder. Nothing outside a strategy's file knows its name."""

from __future__ import annotations

from dataclasses import MISSING, fields

from decoding.strategies import (
    cfg,
    contrastive,
    dynamic_fusion,
    emulated_fine_tuning,
    nudging,
    plain,
    proxy_tuning,
    raw,
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

POLICY = raw.STRATEGY  # not a row of the dict: it is `decoding.policy`, not `decoding.strategy`


def table() -> str:
    """The strategies as a Markdown table."""
    lines = ["| strategy | next-token distribution | parameters (default) | source |", "|---|---|---|---|"]
    for name, strategy in STRATEGIES.items():
        shown = []
        for each in fields(strategy.params):
            known = each.default is not MISSING and each.default is not None
            shown.append(f"`{each.name}`" + (f" ({each.default})" if known else ""))
        lines.append(f"| `{name}` | {strategy.formula} | {', '.join(shown)} | {strategy.paper} |")
    return "\n".join(lines)


__all__ = ["POLICY", "STRATEGIES", "Strategy", "table"]
