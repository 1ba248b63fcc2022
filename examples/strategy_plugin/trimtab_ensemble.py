"""A strategy from outside Trimtab: the geometric mean of several models' distributions.

Install it beside Trimtab (`pip install ./examples/strategy_plugin`) and it is served:

    "decoding": {"strategy": "ensemble", "others": ["expert"]}
"""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.core import BadRequest, Policy, Program, Role, Term
from decoding.strategies import Strategy


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Parameters: the request's fields, with types, defaults and descriptions. The server checks them."""

    others: list[str] = field(metadata={"description": "Models to average with the request's own."})


def build(params: Ensemble, model: str) -> Program:
    """log p = mean of lp_i, renormalised: a program is plain data, and the engine does the rest."""
    names = [model, *params.others]
    if len(set(names)) < len(names):
        raise BadRequest("'others' must not repeat a model.", "others")
    terms = tuple(Term(name, Role(name), 1.0 / len(names)) for name in names)
    return Program("ensemble", Policy(terms, logprobs=True))


STRATEGY = Strategy(
    "ensemble",
    "The geometric mean of several models' next-token distributions.",
    Ensemble,
    build,
    "mean of lp_i",
    needs=("others: models with the same vocabulary",),
)
