"""THE searches: name to parameters and generator. Nothing outside a search's file knows its name."""

from __future__ import annotations

from decoding.search.spec import SearchKind

_KINDS: tuple[SearchKind, ...] = ()
SEARCHES: dict[str, SearchKind] = {kind.name: kind for kind in _KINDS}
HIDDEN: dict[str, SearchKind] = {}


def known_searches() -> dict[str, SearchKind]:
    """Every kind that the engine runs, those that are not offered under `decoding.search` too."""
    return SEARCHES | HIDDEN
