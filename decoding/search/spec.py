"""What a kind of search is: parameters as a frozen dataclass, and the generator that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from decoding.core import BadRequest, Sampling
from decoding.scorers.spec import ScorerSpec
from decoding.search.verbs import Search, Steps


def _nothing(_params: Any) -> Sequence[Any]:
    return ()


def _all_good(_params: Any, _sampling: Sampling) -> None:
    return None


@dataclass(frozen=True, slots=True)
class SearchKind:
    """A row of the dict of searches.

    params: a frozen dataclass whose fields are the request's parameters. run: the generator. check: raises BadRequest,
    `param` naming the offending field, for parameters that can never be served (sampling: with the search's own
    temperature put in). scorers, models: what the parameters name, so that it is refused before anything runs if it is
    not served. temperature: the default when the request has none; None leaves OpenAI's. independent: how many
    samples of one distribution it takes, which at temperature 0 would all be the same. abreast: how many hypotheses it
    has side by side, where that is more. answers: how many candidates it can end with, where no `n` says so; None: as
    many as it comes to. by_rank: it chooses among the policy's likeliest tokens, which what edits rows (penalties,
    logit_bias) does not change. formula: what it does, as an expression.
    """

    name: str
    summary: str
    params: type[Any]
    run: Callable[[Search, Any], Steps]
    formula: str = ""
    check: Callable[[Any, Sampling], None] = _all_good
    scorers: Callable[[Any], Sequence[ScorerSpec | None]] = _nothing
    models: Callable[[Any], Sequence[str | None]] = _nothing
    temperature: float | None = None
    independent: Callable[[Any], int] = lambda _params: 1
    abreast: Callable[[Any], int] = lambda _params: 1
    answers: Callable[[Any], int | None] = lambda params: getattr(params, "n", None)
    by_rank: bool = False
    needs: tuple[str, ...] = ()
    paper: str = ""


def check_edits(kind: SearchKind, sampling: Sampling) -> None:
    """Raises BadRequest for what edits the rows that tokens are drawn from, where a search does not draw from them."""
    for name in ("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        if kind.by_rank and getattr(sampling, name) != getattr(Sampling(), name):
            raise BadRequest(f"'{kind.name}' ranks tokens by the policy's own log-probs. Leave out {name}.", name)
