"""What a search request means and whether it can be served, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from decoding.core import SCORERS, BadRequest, Program, Sampling, SearchPlan
from decoding.search import SEARCHES, known_searches

if TYPE_CHECKING:
    from decoding.prepare import Entry

WHERE = "decoding.search"


def settle_search(program: Program, sampling: Sampling, n: int, catalog: Mapping[str, Entry]) -> Sampling:
    """The sampling of a program with a search, its default temperature put in where the request has none of its own.

    n: choices that are wanted. Raises BadRequest and UnknownModel. Scorers are checked by whoever knows them.
    """
    plan = program.search
    if plan is None:
        return sampling
    kinds = known_searches()
    if plan.kind not in kinds:
        _refuse(f"There is no search '{plan.kind}'. Available: {', '.join(SEARCHES)}.", "kind")
    kind = kinds[plan.kind]
    if kind.temperature is not None and not plan.sampled and sampling.temperature == Sampling().temperature:
        sampling = replace(sampling, temperature=kind.temperature)
    try:
        kind.check(plan.params, sampling)
    except BadRequest as error:
        raise BadRequest(error.message, f"{WHERE}.{error.param}" if error.param else WHERE) from error
    if sampling.temperature == 0 and kind.independent(plan.params) > 1:
        raise BadRequest(
            f"'{plan.kind}' takes {kind.independent(plan.params)} independent samples, which are all the same at "
            "temperature 0. Give a temperature above 0, or leave it out.",
            "temperature",
        )
    most = getattr(plan.params, "n", None)
    if isinstance(most, int) and n > most:
        raise BadRequest(f"n is {n}, and the search has {most} candidates.", "n")
    if sampling.prompt_logprobs is not None:
        raise BadRequest("A search cannot echo the prompt's log-probs. Leave out echo.", "echo")
    if sampling.max_tokens == 0:
        raise BadRequest("A search needs max_tokens of at least 1.", "max_tokens")
    for model in kind.models(plan.params):
        if model is not None:
            _check_model(model, catalog)
    _check_budgets(plan)
    return sampling


def _check_model(model: str, catalog: Mapping[str, Entry]) -> None:
    served = [id for id, entry in catalog.items() if entry.info.kind not in SCORERS]
    if model not in served:
        wrong = "is a scorer and cannot write" if model in catalog else "is not served"
        _refuse(f"The model '{model}' {wrong}. Served: {', '.join(served)}.", "")


def _check_budgets(plan: SearchPlan) -> None:
    for name in ("max_total_tokens", "max_candidates", "max_seconds"):
        value = getattr(plan, name)
        if value is not None and not value > 0:
            _refuse(f"'{name}' must be above 0, not {value}.", name)


def _refuse(message: str, name: str) -> NoReturn:
    raise BadRequest(message, f"{WHERE}.{name}" if name else WHERE)
