"""THE searches: name to parameters and generator. Nothing outside a search's file knows its name."""

from __future__ import annotations

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
HIDDEN: dict[str, SearchKind] = {}


def known_searches() -> dict[str, SearchKind]:
    """Every kind that the engine runs, those that are not offered under `decoding.search` too."""
    return SEARCHES | HIDDEN
