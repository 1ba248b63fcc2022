"""The policy in full: any terms, views, weights, one gate, plausibility. What `decoding.policy` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from decoding.core import BadRequest, Gate, Plausibility, Policy, Program, Role, Term
from decoding.strategies.spec import STRICT, Strategy, ViewParam, bounded, finite, parse_view, some


@dataclass(frozen=True, slots=True)
class RawTerm:
    """One summand. `model` defaults to the request's, `name` to the model's id; a gated one counts inside the gate."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    model: str | None = None
    name: str | None = None
    weight: float = 1.0
    view: ViewParam | None = None
    gated: bool = False


@dataclass(frozen=True, slots=True)
class RawGate:
    """The top-p set of the term named `of`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["top_p"]
    value: float
    of: str


@dataclass(frozen=True, slots=True)
class RawPlausibility:
    """Tokens below `value` times the best probability under the term named `of` are masked."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["ratio"]
    value: float
    of: str


@dataclass(frozen=True, slots=True)
class RawPolicy:
    """Parameters of `policy`."""

    terms: list[RawTerm] = field(metadata={"description": "Models, views and weights; the first is the main one."})
    gate: RawGate | None = field(default=None, metadata={"description": "Where gated terms count."})
    plausibility: RawPlausibility | None = field(default=None, metadata={"description": "Which tokens are masked."})
    logprobs: bool = field(default=False, metadata={"description": "Mix log-probs instead of logits."})


def build(params: RawPolicy, model: str) -> Program:
    """sum of ungated w_j z_j + 1[v in gate] sum of gated w_j z_j; log-probs where there is a gate."""
    gate = Gate(params.gate.of, finite("gate", params.gate.value, 0.0, 1.0)) if params.gate else None
    terms = []
    for raw in some("terms", params.terms):
        if raw.gated and gate is None:
            raise BadRequest("A term is gated, but there is no gate.", "gate")
        role = Role(raw.model or model, view=parse_view(raw.view, "terms"))
        terms.append(Term(raw.name or role.model, role, bounded("terms", raw.weight), gate if raw.gated else None))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise BadRequest("Two terms have the same name: give each a 'name' of its own.", "terms")
    for param, of in (("gate", gate and gate.of), ("plausibility", params.plausibility and params.plausibility.of)):
        if of is not None and of not in names:
            raise BadRequest(f"'{of}' is no term; the terms are {', '.join(names)}.", param)
    plausibility = None
    if params.plausibility:
        ratio = finite("plausibility", params.plausibility.value, 0.0, 1.0)
        plausibility = Plausibility(params.plausibility.of, ratio)
    return Program("policy", Policy(tuple(terms), params.logprobs, plausibility))


STRATEGY = Strategy(
    "policy",
    "Any weighted mix, in full: terms with models, views and weights, a gate, plausibility.",
    RawPolicy,
    build,
    "Σ w_j z_j + 1[v ∈ gate] Σ_gated w_j z_j",
)
