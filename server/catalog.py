"""What is served under which name: models, presets, and the program that a request's `model` and `decoding` mean.

Strategies are read from `decoding.strategies.discover` and nothing here knows one by name: their parameters'
dataclasses become pydantic models, which check requests and describe themselves as JSON schemas.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from decoding.core import BadRequest, ModelLoadError, Program, Sampling, Speculation, Term, UnknownModel
from decoding.draft import settle_speculation
from decoding.prepare import Catalog, check_term
from decoding.rules import RULES
from decoding.search import SEARCHES
from decoding.search.settle import settle_search
from decoding.strategies import POLICY, Strategy, discover
from server.config import Preset
from server.errors import ApiError, nearest
from server.schemas import params_model
from server.searching import Searches, check_scorers, checked, models_of

SPECULATION = Strategy("speculation", "Drafts ahead of any policy.", Speculation, lambda _params, _model: _no_program())


def _no_program() -> NoReturn:
    raise AssertionError("speculation is an axis of its own, not a policy")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request runs: the id it named, the model behind it, the program, and where a search's parameters stand."""

    name: str
    model: str
    program: Program
    search_param: str = "decoding.search"


class Served:
    """The names of the server. `default` is listed first and answers requests without `model`."""

    def __init__(
        self,
        catalog: Catalog,
        presets: Mapping[str, Preset],
        default: str,
        negative_weights: Literal["definition", "any"] = "definition",
        remotes: Collection[str] = (),
    ) -> None:
        self.catalog, self.presets, self.negative_weights = catalog, dict(presets), negative_weights
        self.remotes = remotes
        names = [*catalog, *presets]
        assert default in names, "the default is served"
        self.names = tuple(dict.fromkeys([default, *names]))
        self.created = int(time.time())
        self._strategies = discover()
        for name in set(self._strategies) & set(SEARCHES):
            raise ModelLoadError(f"The strategy '{name}' takes the name of a search.")
        known = self._strategies | {POLICY.name: POLICY, SPECULATION.name: SPECULATION}
        self._params = {name: params_model(name, strategy.params) for name, strategy in known.items()}
        self._searches = Searches()

    def with_catalog(self, catalog: Catalog) -> Served:
        """The same server with other models; the default is among them."""
        changed = copy.copy(self)
        changed.catalog = catalog
        changed.names = tuple(dict.fromkeys([self.names[0], *catalog, *self.presets]))
        return changed

    def users(self, model: str) -> list[str]:
        """What would not be served without `model`: presets that are made of it, and the default if it is that."""
        users = []
        for name in self.presets:
            program = self.resolve(name, None).program
            drafts = program.speculation is not None and program.speculation.draft == model
            searches = program.search is not None and model in models_of(program.search)
            if model in program.models or drafts or searches:
                users.append(f"part of the preset '{name}'")
        return users + ["the default"] * (self.names[0] == model)

    def model_of(self, name: str | None) -> str:
        """The model behind a name, of any kind; None is the default's. Raises UnknownModel."""
        name = self.names[0] if name is None else name
        preset = self.presets.get(name)
        model = preset.model if preset else name
        if model not in self.catalog:
            raise UnknownModel(name, self.names)
        return model

    def model_object(self, name: str) -> dict[str, Any]:
        """OpenAI's model object; a preset names the model behind it as root and parent.

        An adapter's parent is the model that it is of. Raises UnknownModel.
        """
        preset, model = self.presets.get(name), self.model_of(name)
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "trimtab",
            "root": model,
            "parent": model if preset else self.catalog[model].info.of,
            "max_model_len": self._max_model_len(preset, model),
        }

    def _max_model_len(self, preset: Preset | None, model: str) -> int:
        """The minimum over the roles of the program."""
        models = [model]
        if preset:
            models += [value for value in preset.decoding.values() if isinstance(value, str) and value in self.catalog]
        return min(self.catalog[each].info.max_model_len for each in models)

    def check_presets(self) -> None:
        """Raises ModelLoadError, naming the preset, if one could not be served."""
        for name in self.presets:
            try:
                resolved = self.resolve(name, None)
                settle_speculation(resolved.program, [(0,)], Sampling(), self.catalog, predicted=True)
                settle_search(resolved.program, Sampling(), 1, self.catalog, resolved.search_param)
            except (ApiError, BadRequest) as error:
                raise ModelLoadError(f"The preset '{name}' cannot be served: {error.message}") from error

    def resolve(self, name: str | None, decoding: Mapping[str, Any] | None) -> Resolved:
        """The program of a request. Raises ApiError and UnknownModel.

        A request to a preset may change its parameters: its `decoding` is laid over the preset's. With a `strategy` of
        its own, or a policy in full, it stands alone.
        """
        name = self.names[0] if name is None else name
        preset, model = self.presets.get(name), self.model_of(name)
        asked = dict(decoding or {})
        if preset and asked.get("strategy") is None and asked.get("policy") is None:
            asked = preset.decoding | {key: value for key, value in asked.items() if key != "strategy"}
        own = asked.get("strategy") in self._searches
        return Resolved(name, model, self._program(asked, model), "decoding" if own else "decoding.search")

    def _program(self, decoding: dict[str, Any], model: str) -> Program:
        params = dict(decoding)
        search, path = self._searches.nested(params.pop("search", None)), "decoding.search"
        trace = params.pop("trace", None)
        if trace is not None and not isinstance(trace, bool):
            raise ApiError(400, "decoding.trace must be true or false.", "decoding.trace")
        speculation = self._speculation(params.pop("speculation", None))
        name = params.get("strategy")
        if isinstance(name, str) and name in self._searches:
            if search is not None:
                message = f"'{name}' is a search itself: give it or decoding.search, not both."
                raise ApiError(400, message, "decoding.strategy")
            own = {key: value for key, value in params.items() if key != "strategy"}
            search, path, params = self._searches.plan(name, own, "decoding"), "decoding", {}
        if search is not None:
            try:
                check_scorers(search, self.catalog, self.remotes, path)
            except BadRequest as error:
                raise ApiError(400, error.message, error.param, error.code) from error
        program = self._strategy(params, model)
        return replace(program, trace=bool(trace), speculation=speculation, search=search)

    def _speculation(self, asked: Any) -> Speculation | None:
        """null and false are none, true is all by itself."""
        if asked is None or asked is False:
            return None
        if asked is True:
            asked = {}
        if not isinstance(asked, dict):
            message = 'decoding.speculation must be true, false or an object such as {"draft": "ngram"}.'
            raise ApiError(400, message, "decoding.speculation")
        made: Speculation = SPECULATION.params(**self._checked(SPECULATION, asked, "decoding.speculation"))
        return made

    def _strategy(self, params: dict[str, Any], model: str) -> Program:
        policy, name = params.pop("policy", None), params.pop("strategy", None)
        if policy is not None:
            if name is not None or params:
                other = "decoding.strategy" if name is not None else f"decoding.{next(iter(params))}"
                raise ApiError(400, "decoding.policy says it all: nothing may stand beside it.", other)
            if not isinstance(policy, dict):
                raise ApiError(400, "decoding.policy must be an object.", "decoding.policy")
            return self._build(POLICY, policy, model, "decoding.policy")
        if name is None:
            if params:
                known = ", ".join([*self._strategies, *SEARCHES])
                raise ApiError(400, f"decoding needs a strategy: {known}.", "decoding.strategy")
            name = "plain"
        if not isinstance(name, str) or name not in self._strategies:
            hint = nearest(str(name), [*self._strategies, *SEARCHES])
            message = f"Unknown strategy '{name}'.{hint} Available: {', '.join([*self._strategies, *SEARCHES])}."
            raise ApiError(400, message, "decoding.strategy", "unknown_strategy")
        return self._build(self._strategies[name], params, model, "decoding")

    def _checked(self, strategy: Strategy, params: dict[str, Any], path: str) -> dict[str, Any]:
        """The parameters as the strategy's dataclass takes them. Raises ApiError naming the one that is wrong."""
        schema = self._params[strategy.name]
        given = {key: value for key, value in params.items() if value is not None}
        return checked(schema, given, path, schema.model_fields)

    def _build(self, strategy: Strategy, params: dict[str, Any], model: str, path: str) -> Program:
        values = self._checked(strategy, params, path)
        if self.negative_weights != "any":
            _check_signs(params, path)
        try:
            program = strategy.build(strategy.params(**values), model)
        except BadRequest as error:
            raise ApiError(400, error.message, f"{path}.{error.param}" if error.param else path) from error
        terms = program.policy.terms
        for term in terms:
            try:
                check_term(term, terms[0].role.model, self.catalog, _named_by(term, params, model, path))
            except BadRequest as error:
                raise ApiError(400, error.message, error.param, error.code) from error
        return program

    def strategies(self) -> list[dict[str, Any]]:
        """Every strategy and search: what it does, its parameters as a JSON schema, what it needs and combines with."""
        searches = self._searches.listed(list(RULES))
        strategies = [
            {
                "id": name,
                "object": "strategy",
                "summary": strategy.summary,
                "formula": strategy.formula,
                "parameters": self._params[name].model_json_schema(),
                "needs": list(strategy.needs),
                "combines_with": {"speculation": list(RULES), "search": list(SEARCHES)},
                "lossless": strategy.lossless,
                "paper": strategy.paper or None,
            }
            for name, strategy in self._strategies.items()
        ]
        return strategies + searches

    def speculation(self) -> dict[str, Any]:
        """What `decoding.speculation` may be, on top of any strategy: its JSON schema and the acceptance rules."""
        schema = self._params[SPECULATION.name].model_json_schema()
        return {"parameters": schema, "accept": acceptance_rules()}


def acceptance_rules() -> list[dict[str, Any]]:
    """Every rule of `decoding.speculation.accept`."""
    return [
        {"id": rule.name, "summary": rule.summary, "lossless": rule.lossless, "paper": rule.paper or None}
        for rule in RULES.values()
    ]


def _named_by(term: Term, params: Mapping[str, Any], model: str, path: str) -> str:
    """The field of the request that names the model of `term`: a parameter of its strategy, or the request's own."""

    def holds(value: Any) -> bool:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        return value == term.role.model or any(map(holds, parts))

    if holds(params.get(term.name)):
        return f"{path}.{term.name}"
    found = [name for name, value in params.items() if holds(value)]
    if term.role.model == model and (term.name == "base" or not found):
        return "model"
    return f"{path}.{found[0]}" if found else path


def _check_signs(value: Any, path: str) -> None:
    """Turning a method's sign round can undo a safety tuning, so only the operator may allow it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_signs(part, f"{path}.{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            _check_signs(part, f"{path}.{i}")
    elif isinstance(value, int | float) and value < 0:
        message = f"{path} is {value:g}; negative values need the server's --negative-weights any."
        raise ApiError(400, message, path, "negative_weight")
