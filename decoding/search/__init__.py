"""THE searches: name to parameters and generator. Nothing outside a search's file knows its name."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any

from decoding.core import Program, SearchPlan
from decoding.search import (
    adaptive,
    agents,
    auto,
    beam,
    best_of_n,
    cascade,
    deal,
    mcts,
    nudging_search,
    revise,
    reward_search,
    score_texts,
    selective,
    step_speculative,
    token_beam,
    tree_prompt,
)
from decoding.search.spec import SearchKind

_KINDS: tuple[SearchKind, ...] = (
    best_of_n.KIND,
    best_of_n.SHARPEN,
    beam.BEAM,
    beam.DVTS,
    beam.LOOKAHEAD,
    mcts.KIND,
    token_beam.KIND,
    deal.KIND,
    reward_search.KIND,
    adaptive.KIND,
    revise.KIND,
    agents.KIND,
    tree_prompt.KIND,
    step_speculative.KIND,
    selective.KIND,
    cascade.KIND,
    nudging_search.KIND,
    auto.KIND,
)
SEARCHES: dict[str, SearchKind] = {kind.name: kind for kind in _KINDS}
HIDDEN: dict[str, SearchKind] = {score_texts.KIND.name: score_texts.KIND}


def table() -> str:
    """The searches as a Markdown table."""
    lines = ["| search | what it does | parameters (default) | source |", "|---|---|---|---|"]
    for name, kind in SEARCHES.items():
        shown = []
        for each in fields(kind.params):
            known = each.default is not MISSING and each.default is not None and not isinstance(each.default, tuple)
            short = known and len(str(each.default)) < 20
            value = repr(each.default).replace("|", "\\|") if isinstance(each.default, str) else each.default
            shown.append(f"`{each.name}`" + (f" ({value})" if short else ""))
        lines.append(f"| `{name}` | {kind.summary} | {', '.join(shown)} | {kind.paper} |")
    return "\n".join(lines)


def searching(kind: str, policy: Program | str, **params: Any) -> Program:
    """A search over a policy, or over a model alone, for `Engine.generate`. Raises KeyError for an unknown kind.

    Budgets and the like (see `SearchPlan`) stand beside the kind's own parameters.
    """
    own = {each.name for each in fields(SEARCHES[kind].params)}
    mine = {name: value for name, value in params.items() if name in own}
    rest = {name: value for name, value in params.items() if name not in own}
    if isinstance(policy, str):
        policy = Program.plain(policy)
    return replace(policy, search=SearchPlan(kind, SEARCHES[kind].params(**mine), **rest))


def known_searches() -> dict[str, SearchKind]:
    """Every kind that the engine runs, those that are not offered under `decoding.search` too."""
    return SEARCHES | HIDDEN
