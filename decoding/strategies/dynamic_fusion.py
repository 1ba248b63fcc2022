"""Dynamic logits fusion: which small expert moves the large model, and how far, is solved at every step (Fan 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from decoding.core import BadRequest, Policy, Program, Role, Term, View
from decoding.solvers import Fusion
from decoding.strategies.spec import Strategy, finite, some


@dataclass(frozen=True, slots=True)
class DynamicFusion:
    """Parameters of `dynamic_fusion`."""

    experts: list[str] = field(metadata={"description": "Small tuned models; one of them is active at a time."})
    small: str = field(metadata={"description": "The small model before its tunings."})
    mode: Literal["fast", "paper"] = field(
        default="fast", metadata={"description": "paper: the grid; fast: the grid refined, never worse."}
    )
    max_alpha: float = field(default=2.0, metadata={"description": "Largest weight of an expert."})
    step: float = field(default=0.1, metadata={"description": "Grid step of the weight."})


def build(params: DynamicFusion, model: str) -> Program:
    """z = z_base + a_i (z_i - z_small); i and a minimise the divergences' mismatch (Fan et al. 2024, eq. 8)."""
    experts = some("experts", params.experts)
    highest, step = finite("max_alpha", params.max_alpha, 0.0, 10.0), finite("step", params.step)
    if not 0.0 < step <= max(highest, step) or highest / step > 200:
        raise BadRequest("'step' must be above 0 and give at most 200 grid points.", "step")
    plain = View("plain")
    terms = [Term("base", Role(model, view=plain)), Term("small", Role(params.small, view=plain), -1.0)]
    terms += [Term(f"expert_{i + 1}", Role(expert)) for i, expert in enumerate(experts)]
    return Program(
        "dynamic_fusion", Policy(tuple(terms), logprobs=True, solver=Fusion(params.mode == "fast", highest, step))
    )


STRATEGY = Strategy(
    "dynamic_fusion",
    "One of several small experts steers the large model, chosen and weighted anew at every token.",
    DynamicFusion,
    build,
    "z_base + a_i (z_i − z_small), i and a solved per step",
    needs=("experts", "small: the experts before their tuning, same vocabulary"),
    paper="Fan et al. 2024, On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion, arXiv:2406.15480",
)
