"""What a search request means and whether it can be served, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from decoding.core import SCORERS, BadRequest, Program, Sampling, SearchPlan
from decoding.search import SEARCHES, known_searches
from decoding.search.spec import check_edits

if TYPE_CHECKING:
    from decoding.prepare import Entry

WHERE = "decoding.search"


def settle_search(
    program: Program, sampling: Sampling, n: int, catalog: Mapping[str, Entry], where: str = WHERE
) -> Sampling:
    """The sampling of a program with a search, its default temperature put in where the request has none of its own.

    n: choices that are wanted. where: the field that holds the search's parameters. Raises BadRequest. Scorers are
    checked by whoever knows them.
    """
    plan = program.search
    if plan is None:
        return sampling
    kinds = known_searches()
    if plan.kind not in kinds:
        _refuse(f"There is no search '{plan.kind}'. Available: {', '.join(SEARCHES)}.", f"{where}.kind")
    kind = kinds[plan.kind]
    if kind.temperature is not None and not plan.sampled and sampling.temperature == Sampling().temperature:
        sampling = replace(sampling, temperature=kind.temperature)
    try:
        kind.check(plan.params, sampling)
    except BadRequest as error:
        raise BadRequest(error.message, f"{where}.{error.param}" if error.param else where) from error
    if sampling.temperature == 0 and kind.independent(plan.params) > 1:
        raise BadRequest(
            f"'{plan.kind}' takes {kind.independent(plan.params)} independent samples, which are all the same at "
            "temperature 0. Give a temperature above 0, or leave it out.",
            "temperature",
        )
    check_edits(kind, sampling)
    most = kind.answers(plan.params)
    if most is not None and n > most:
        raise BadRequest(f"n is {n}, and the search has {most} candidate{'s' * (most > 1)}.", "n")
    if sampling.prompt_logprobs is not None:
        raise BadRequest("A search cannot echo the prompt's log-probs. Leave out echo.", "echo")
    if sampling.max_tokens == 0:
        raise BadRequest("A search needs max_tokens of at least 1.", "max_tokens")
    for model in kind.models(plan.params):
        if model is not None:
            _check_model(model, catalog, named_by(model, plan.params, where))
    _check_budgets(plan, where)
    return sampling


def named_by(value: object, params: object, where: str) -> str:
    """The parameter that has this value, in `where`; that itself if none has. Without `where` they stand at the top."""
    assert is_dataclass(params), "parameters of a search are a dataclass"
    names = [each.name for each in fields(params) if getattr(params, each.name) == value]
    return ".".join(filter(None, (where, *names[:1])))


def _check_model(model: str, catalog: Mapping[str, Entry], param: str) -> None:
    served = [id for id, entry in catalog.items() if entry.info.kind not in SCORERS]
    if model not in served:
        wrong = "is a scorer and cannot write" if model in catalog else "is not served"
        _refuse(f"The model '{model}' {wrong}. Served: {', '.join(served)}.", param)


def _check_budgets(plan: SearchPlan, where: str) -> None:
    for name in ("max_total_tokens", "max_candidates", "max_seconds"):
        value = getattr(plan, name)
        if value is not None and not value > 0:
            _refuse(f"'{name}' must be above 0, not {value}.", f"{where}.{name}")


def _refuse(message: str, param: str) -> NoReturn:
    raise BadRequest(message, param)
