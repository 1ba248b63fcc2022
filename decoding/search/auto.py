"""Choice among the other searches by how hard the prompt is, the model's size, the scorer and the budget.

Snell et al. 2024, Scaling LLM Test-Time Compute Optimally, arXiv:2408.03314, section 3; Liu et al. 2025, Can 1B LLM
Surpass 405B LLM?, arXiv:2502.06703. The default table puts their findings on mathematics into rows: it is a starting
point, not a measurement of the models that are served, and is to be replaced by a calibrated one.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from decoding.core import BadRequest, Sampling, says
from decoding.scorers.spec import STRICT, ScorerSpec
from decoding.search import beam, best_of_n, revise
from decoding.search.common import MAX_CANDIDATES, drop, greedy, whole
from decoding.search.spec import SearchKind, check_edits
from decoding.search.typed import typed
from decoding.search.verbs import Branch, Fork, Run, Score, Search, Steps, Until
from decoding.strategies.spec import finite

Difficulty = Literal["easy", "medium", "hard"]
Size = Literal["small", "medium", "large"]
Judges = Literal["steps", "answers", "nothing"]


@dataclass(frozen=True, slots=True)
class AutoRow:
    """Which search is used where all conditions hold; null holds always."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: str = field(metadata=says("A search."))
    params: dict[str, Any] = field(
        default_factory=dict, metadata=says('Its parameters; "n" stands for the budget. The scorer is put in.')
    )
    difficulty: Difficulty | None = field(default=None, metadata=says("How hard the prompt is found."))
    size: Size | None = field(default=None, metadata=says("The model's size class."))
    judges: Judges | None = field(default=None, metadata=says("What the scorer scores, if there is one."))
    min_n: int = field(default=1, metadata=says("The budget from which the row counts."))


_SAMPLES = {"n": "n", "vote": "max"}
DEFAULT = (
    AutoRow(best_of_n.KIND.name, _SAMPLES, "easy", "small", "steps"),
    AutoRow(beam.BEAM.name, {"n": "n"}, None, "small", "steps", 4),
    AutoRow(beam.BEAM.name, {"n": "n"}, "hard", "medium", "steps", 4),
    AutoRow(beam.DVTS.name, {"n": "n"}, None, "medium", "steps", 4),
    AutoRow(best_of_n.KIND.name, _SAMPLES, None, None, "steps"),
    AutoRow(best_of_n.KIND.name, _SAMPLES, None, None, "answers"),
    AutoRow(revise.KIND.name, {"chains": 1, "length": "n"}, "easy"),
    AutoRow(best_of_n.KIND.name, {"n": "n", "vote": "majority"}),
)


@dataclass(frozen=True, slots=True)
class Auto:
    """Parameters of `auto`."""

    n: int = field(default=8, metadata=says("The budget: how many answers may be written."))
    scorer: ScorerSpec | None = field(default=None, metadata=says("What judges; without it answers are counted."))
    judges: Literal["steps", "answers"] = field(
        default="steps", metadata=says("Whether the scorer gives a number for every step, or one for an answer.")
    )
    size: Size = field(
        default="small", metadata=says("The request's model: below 7e9 parameters, below 33e9, or larger.")
    )
    measure: Literal["confidence", "score"] = field(
        default="confidence",
        metadata=says("Difficulty: how likely the greedy tokens are, or what the scorer says of the greedy answer."),
    )
    probe_tokens: int = field(default=32, metadata=says("confidence: greedy tokens that are looked at."))
    easy: float = field(default=0.9, metadata=says("From this measure on a prompt is easy."))
    hard: float = field(default=0.7, metadata=says("Below this measure it is hard."))
    table: tuple[AutoRow, ...] = field(
        default=DEFAULT,
        metadata=says("The first row that applies is used. The default follows published findings, not measurements."),
    )


def run(search: Search, params: Auto) -> Steps:
    """Measure how hard the prompt is, then hand over to the search that the table names."""
    measure = yield from _measure(search, params)
    difficulty = rate(params, measure)
    row = pick(params, difficulty)
    search.progress(f"{difficulty}: {row.kind}")
    kind, chosen = build(row, params)
    outcome = yield from kind.run(search, chosen)
    known = None if math.isnan(measure) else measure
    return replace(outcome, details={**outcome.details, "kind": row.kind, "difficulty": difficulty, "measure": known})


def _measure(search: Search, params: Auto) -> Generator[Any, Any, float]:
    """Of a greedy text: the geometric mean of its tokens' probabilities, or the scorer's score. NaN without one."""
    probes: list[Branch] = yield Fork(search.root, 1)
    if not probes:
        return math.nan
    (probe,) = probes
    by_score = params.measure == "score" and params.scorer is not None
    yield Run(probe, Until(None if by_score else params.probe_tokens), greedy(search.sampling))
    value = math.exp(probe.logprob / len(probe.tokens)) if probe.tokens else math.nan
    if by_score:
        assert params.scorer is not None
        value = ((yield Score(probe, params.scorer)) or [math.nan])[-1]
    yield from drop([probe])
    return value


def rate(params: Auto, measure: float) -> Difficulty:
    """The class of a measure; without one it is medium."""
    if math.isnan(measure):
        return "medium"
    return "easy" if measure >= params.easy else "hard" if measure < params.hard else "medium"


def pick(params: Auto, difficulty: Difficulty) -> AutoRow:
    """The first row whose conditions hold. Raises BadRequest if none does."""
    judges = params.judges if params.scorer is not None else "nothing"
    facts = {"difficulty": difficulty, "size": params.size, "judges": judges}
    for row in params.table:
        if params.n >= row.min_n and all(getattr(row, name) in (None, fact) for name, fact in facts.items()):
            return row
    shown = ", ".join(f"{name} {fact}" for name, fact in facts.items())
    raise BadRequest(f"'table' needs a row for {shown}, n {params.n}: a last one without conditions, say.", "table")


def build(row: AutoRow, params: Auto) -> tuple[SearchKind, Any]:
    """The row's search with its parameters. Raises BadRequest if there is none, or one that they do not fit."""
    kind = _kind(row)
    given: dict[str, Any] = {name: params.n if value == "n" else value for name, value in row.params.items()}
    if params.scorer is not None and any(each.name == "scorer" for each in fields(kind.params)):
        given.setdefault("scorer", params.scorer)
    try:
        return kind, typed(kind.params, given)
    except TypeError as error:
        raise BadRequest(f"'table': '{row.kind}' {error}.", "table") from error


def _kind(row: AutoRow) -> SearchKind:
    from decoding.search import SEARCHES  # which itself holds this search

    kind = SEARCHES.get(row.kind)
    if kind is None or kind.name == KIND.name:
        others = ", ".join(name for name in SEARCHES if name != KIND.name)
        raise BadRequest(f"'table' names '{row.kind}'; it may name {others}.", "table")
    known = sorted(each.name for each in fields(kind.params))
    if unknown := sorted(set(row.params).difference(known)):
        raise BadRequest(f"'table': '{row.kind}' has no '{unknown[0]}', but {', '.join(known)}.", "table")
    return kind


def _reachable(params: Auto) -> list[tuple[SearchKind, Any]]:
    """The searches that this budget, size and scorer may come to."""
    levels: tuple[Difficulty, ...] = ("easy", "medium", "hard")
    return [build(pick(params, difficulty), params) for difficulty in levels]


def check(params: Auto, sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range, and for rows that can never be served."""
    whole("n", params.n, 1, MAX_CANDIDATES)
    whole("probe_tokens", params.probe_tokens, 1)
    if finite("hard", params.hard) > finite("easy", params.easy):
        raise BadRequest("'hard' must be at most 'easy'.", "hard")
    if params.measure == "score" and params.scorer is None:
        raise BadRequest("'measure' can be \"score\" only with a 'scorer'.", "measure")
    for row in params.table:
        _kind(row)
    for kind, chosen in _reachable(params):
        try:
            kind.check(chosen, sampling)
            check_edits(kind, sampling)
        except BadRequest as error:
            param = "n" if error.param == "n" else "table"
            raise BadRequest(f"The table's '{kind.name}' cannot be served: {error.message}", param) from error


KIND = SearchKind(
    "auto",
    "Chooses another search by how hard the prompt looks, the model's size, the scorer and the budget.",
    Auto,
    run,
    "table(difficulty(x), size, scorer, n)",
    check,
    scorers=lambda params: [params.scorer, *(each for kind, p in _reachable(params) for each in kind.scorers(p))],
    models=lambda params: [each for kind, p in _reachable(params) for each in kind.models(p)],
    temperature=0.8,
    independent=lambda params: max(kind.independent(p) for kind, p in _reachable(params)),
    abreast=lambda params: max(kind.abreast(p) for kind, p in _reachable(params)),
    paper="Snell et al. 2024, arXiv:2408.03314; Liu et al. 2025, arXiv:2502.06703",
)
