"""`decoding.search` and search names as strategies: from JSON to a `SearchPlan`, and what is listed of searches.

Kinds are read from `decoding.search.SEARCHES`; nothing here knows one by name.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from decoding.core import BadRequest, Sampling, SearchPlan, says
from decoding.prepare import Catalog
from decoding.scorers.build import check_scorer
from decoding.scorers.spec import ScorerParams, ScorerSpec
from decoding.search import SEARCHES, known_searches
from decoding.search.settle import named_by
from decoding.search.spec import SearchKind
from server.errors import ApiError, from_validation, nearest
from server.schemas import params_model

_SCORER = TypeAdapter(ScorerParams)
_SCORER_FIELDS = [each.name for each in fields(ScorerParams)]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What every search takes besides its own parameters."""

    max_total_tokens: int | None = field(
        default=None, metadata=says("Tokens of all hypotheses together; the search ends with what it has.")
    )
    max_candidates: int | None = field(default=None, metadata=says("Hypotheses that may ever be begun."))
    max_seconds: float | None = field(default=None, metadata=says("Time for the whole search."))
    progress: bool = field(default=False, metadata=says("Streams tell how far the search is."))
    candidates: bool = field(default=False, metadata=says("The report lists all candidates with their scores."))


class Searches:
    """The searches as requests write them."""

    def __init__(self) -> None:
        self._bounds = params_model("search", Bounds)
        self._models = {name: params_model(name, kind.params) for name, kind in SEARCHES.items()}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in SEARCHES

    def nested(self, asked: Any) -> SearchPlan | None:
        """The plan of `decoding.search`; null and false are none. Raises ApiError."""
        if asked is None or asked is False:
            return None
        if not isinstance(asked, dict):
            message = 'decoding.search must be an object such as {"kind": ...}, or false.'
            raise ApiError(400, message, "decoding.search")
        params = dict(asked)
        kind = params.pop("kind", None)
        if kind is None:
            message = f"Missing required parameter: 'decoding.search.kind'. Available: {', '.join(SEARCHES)}."
            raise ApiError(400, message, "decoding.search.kind", "missing_required_parameter")
        if not isinstance(kind, str) or kind not in SEARCHES:
            hint = nearest(str(kind), SEARCHES)
            message = f"Unknown search '{kind}'.{hint} Available: {', '.join(SEARCHES)}."
            raise ApiError(400, message, "decoding.search.kind", "unknown_search")
        return self.plan(kind, params, "decoding.search")

    def plan(self, kind: str, params: Mapping[str, Any], path: str) -> SearchPlan:
        """The plan of a search and the parameters beside its name; `path` is where they stand. Raises ApiError."""
        bounds = {each.name for each in fields(Bounds)}
        given = {key: value for key, value in params.items() if value is not None}
        known = [*self._models[kind].model_fields, *bounds]
        own = checked(self._models[kind], {k: v for k, v in given.items() if k not in bounds}, path, known)
        shared = checked(self._bounds, {k: v for k, v in given.items() if k in bounds}, path, known)
        made, row = SEARCHES[kind].params(**own), SEARCHES[kind]
        try:
            row.check(made, Sampling() if row.temperature is None else Sampling(temperature=row.temperature))
        except BadRequest as error:
            raise ApiError(400, error.message, f"{path}.{error.param}" if error.param else path) from error
        return SearchPlan(kind, made, **shared)

    def listed(self, accept: list[str]) -> list[dict[str, Any]]:
        """Every search: what it does, its parameters as a JSON schema, what it needs. `accept`: acceptance rules."""
        return [
            {
                "id": name,
                "object": "search",
                "summary": kind.summary,
                "formula": kind.formula or None,
                "parameters": self._models[name].model_json_schema(),
                "bounds": self._bounds.model_json_schema(),
                "default_temperature": kind.temperature,
                "needs": list(kind.needs),
                "combines_with": {"speculation": accept, "policy": "every strategy"},
                "lossless": False,
                "paper": kind.paper or None,
            }
            for name, kind in SEARCHES.items()
        ]


def check_scorers(plan: SearchPlan, catalog: Catalog, remotes: Container[str], path: str) -> None:
    """Whether the scorers that a search names are served. Raises BadRequest naming the parameter."""
    kinds = {id: "adapter" if entry.info.of else entry.info.kind for id, entry in catalog.items()}
    for scorer in known_searches()[plan.kind].scorers(plan.params):
        if scorer is not None:
            check_scorer(scorer, kinds, remotes, named_by(scorer, plan.params, path))


def check_candidates(plan: SearchPlan, most: int, path: str) -> None:
    """Raises BadRequest if the search would have more than `most` hypotheses side by side."""
    kind: SearchKind = known_searches()[plan.kind]
    asked = max(kind.independent(plan.params), kind.abreast(plan.params), getattr(plan.params, "n", 1))
    if asked > most:
        param = named_by(asked, plan.params, path)
        raise BadRequest(f"{param}: at most {most} candidates are allowed, not {asked}.", param)


def models_of(plan: SearchPlan) -> set[str]:
    """Every served model that the search's parameters name, as a writer or in a scorer."""
    kind = known_searches()[plan.kind]
    found = {model for model in kind.models(plan.params) if model is not None}
    for scorer in kind.scorers(plan.params):
        found |= {leaf.model for leaf in leaves(scorer) if leaf.model is not None}
    return found


def leaves(scorer: ScorerSpec | None) -> list[ScorerParams]:
    """The scorers that a sum is of; of another one itself. A name is taken for a model's."""
    if scorer is None:
        return []
    if not isinstance(scorer, ScorerParams):
        return [ScorerParams(model=scorer)]
    return [leaf for part in scorer.parts for leaf in leaves(part)] if scorer.parts else [scorer]


def checked(schema: type[BaseModel], params: Mapping[str, Any], path: str, known: Iterable[str]) -> dict[str, Any]:
    """The parameters as a dataclass takes them; `known` are the names to guess from. Raises ApiError."""
    try:
        # By way of JSON: strictness there takes arrays for tuples.
        made = schema.model_validate_json(json.dumps(params))
    except ValidationError as error:
        raise from_validation(error, known, path) from error
    return {key: getattr(made, key) for key in schema.model_fields}


def scorer_in_full(asked: Mapping[str, Any], path: str) -> ScorerParams:
    """A scorer as an object of a request. Raises ApiError naming the field that is wrong."""
    try:
        return _SCORER.validate_json(json.dumps(asked))
    except ValidationError as error:
        raise from_validation(error, _SCORER_FIELDS, path) from error
