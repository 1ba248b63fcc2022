"""THE strategies: name to parameters and program builder. Nothing outside a strategy's file knows its name."""

from __future__ import annotations

from dataclasses import MISSING, fields
from importlib.metadata import entry_points

from decoding.core import ModelLoadError
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


def discover() -> dict[str, Strategy]:
    """The strategies with those that operators have installed (entry points of the group `trimtab.strategies`).

    Raises ModelLoadError for one that cannot be loaded, is no Strategy, or takes a name that is in use.
    """
    found = dict(STRATEGIES)
    for point in entry_points(group="trimtab.strategies"):
        try:
            strategy = point.load()
        except Exception as error:  # code that is not ours may raise anything; for the operator it cannot be loaded
            raise ModelLoadError(f"The strategy '{point.name}' ({point.value}) cannot be loaded: {error}") from error
        if not isinstance(strategy, Strategy) or strategy.name != point.name:
            raise ModelLoadError(f"The entry point '{point.name}' ({point.value}) is not a Strategy of that name.")
        if point.name in found or point.name == POLICY.name:
            raise ModelLoadError(f"The strategy '{point.name}' ({point.value}) takes a name that is in use.")
        found[point.name] = strategy
    return found


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


__all__ = ["POLICY", "STRATEGIES", "Strategy", "discover", "table"]
