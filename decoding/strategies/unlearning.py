"""Unlearning from logit difference: an assistant that knows only what is to be forgotten (Ji et al. 2024, ULD)."""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.core import Plausibility, Policy, Program, Role, Term
from decoding.strategies.spec import Strategy, bounded, finite


@dataclass(frozen=True, slots=True)
class Unlearning:
    """Parameters of `unlearning`."""

    assistant: str = field(metadata={"description": "The model trained to know what the base shall not say."})
    weight: float = field(default=0.8, metadata={"description": "How much of the assistant is subtracted."})
    plausibility: float = field(
        default=0.01, metadata={"description": "Tokens below this share of the base's best probability are masked."}
    )


def build(params: Unlearning, model: str) -> Program:
    """z_base - weight z_assistant on {p_base >= plausibility max p_base}, the pure ratio mask."""
    weight = bounded("weight", params.weight)
    ratio = finite("plausibility", params.plausibility, 0.0, 1.0)
    terms = (Term("base", Role(model)), Term("assistant", Role(params.assistant), -weight))
    return Program("unlearning", Policy(terms, plausibility=Plausibility("base", ratio)))


STRATEGY = Strategy(
    "unlearning",
    "A small assistant that knows only what is to be forgotten is subtracted.",
    Unlearning,
    build,
    "z_base − weight z_assistant on {p_base ≥ plausibility · max p_base}",
    needs=("assistant: trained on the forget set, same vocabulary",),
    paper="Ji et al. 2024, Reversing the Forget-Retain Objectives, arXiv:2406.08607",
)
