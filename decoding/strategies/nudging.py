"""Nudging: where a base is unsure, a small aligned model gives one word (Fei et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.core import Policy, Program, Role, Term, View
from decoding.solvers import Nudge
from decoding.strategies.spec import Strategy, finite


@dataclass(frozen=True, slots=True)
class Nudging:
    """Parameters of `nudging`."""

    nudger: str = field(metadata={"description": "The small aligned model."})
    threshold: float = field(
        default=0.4, metadata={"description": "The nudger speaks where the base's best probability is below this."}
    )


def build(params: Nudging, model: str) -> Program:
    """The base's row, or the nudger's where max p_base < threshold and until its word is complete."""
    threshold = finite("threshold", params.threshold, 0.0, 1.0)
    terms = (Term("base", Role(model, view=View("plain"))), Term("nudger", Role(params.nudger)))
    return Program("nudging", Policy(terms, logprobs=True, solver=Nudge(threshold)))


STRATEGY = Strategy(
    "nudging",
    "Where the base is unsure, a small aligned model gives one word.",
    Nudging,
    build,
    "z_base, or z_nudger for one word where max p_base < threshold",
    needs=("nudger: a small aligned model with the base's vocabulary",),
    paper="Fei et al. 2024, Nudging: Inference-time Alignment via Model Collaboration, arXiv:2410.09300",
)
