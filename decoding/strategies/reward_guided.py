"""Rewards and objectives at decoding time: autoregressive reward models (GenARM) and mixtures of siblings (MOD)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from decoding.core import MAX_WEIGHT, BadRequest, Policy, Program, Role, Term
from decoding.strategies.spec import STRICT, Strategy, ViewParam, bounded, finite, parse_view, some


@dataclass(frozen=True, slots=True)
class Arm:
    """One autoregressive reward model; a preference-conditioned one gets its weights through `view`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    model: str
    weight: float = 1.0
    view: ViewParam | None = None


@dataclass(frozen=True, slots=True)
class RewardGuided:
    """Parameters of `reward_guided`."""

    arms: list[Arm] = field(metadata={"description": "Reward models with their weights."})
    beta: float = field(default=1.0, metadata={"description": "Strength of the base; smaller follows the rewards."})


def build(params: RewardGuided, model: str) -> Program:
    """lp_base + (1 / beta) sum_i weight_i lp_arm_i. Temperature acts on the mix."""
    beta = finite("beta", params.beta)
    if beta <= 0:
        raise BadRequest(f"'beta' must be above 0, not {beta:g}.", "beta")
    terms = [Term("base", Role(model))]
    for i, arm in enumerate(some("arms", params.arms)):
        role = Role(arm.model, view=parse_view(arm.view, "arms"))
        weight = bounded("arms", arm.weight) / beta
        if abs(weight) > MAX_WEIGHT:
            raise BadRequest(
                f"'beta' is {beta:g}: a reward's weight, {arm.weight:g}, cannot be divided by that.", "beta"
            )
        terms.append(Term(f"arm_{i + 1}", role, weight))
    return Program("reward_guided", Policy(tuple(terms), logprobs=True))


@dataclass(frozen=True, slots=True)
class Objective:
    """One tuned sibling and its weight."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MultiObjective:
    """Parameters of `multi_objective`."""

    models: list[Objective] = field(metadata={"description": "Siblings tuned for one objective each, with weights."})


def build_objectives(params: MultiObjective, model: str) -> Program:
    """sum_i weight_i lp_i. The request's own model takes part only if it is listed."""
    listed = some("models", params.models)
    terms = tuple(Term(f"objective_{i + 1}", Role(m.model), bounded("models", m.weight)) for i, m in enumerate(listed))
    return Program("multi_objective", Policy(terms, logprobs=True))


STRATEGY = Strategy(
    "reward_guided",
    "Autoregressive reward models weigh every next token of a frozen base.",
    RewardGuided,
    build,
    "lp_base + (1/beta) Σ weight_i lp_arm_i",
    needs=("arms: causal reward models with the base's vocabulary",),
    paper="Xu et al. 2024, GenARM, arXiv:2410.08193",
)
OBJECTIVES = Strategy(
    "multi_objective",
    "Siblings tuned for one objective each, blended with weights per request.",
    MultiObjective,
    build_objectives,
    "Σ weight_i lp_i",
    needs=("models: tuned siblings with one vocabulary",),
    paper="Shi et al. 2024, Decoding-Time Language Model Alignment with Multiple Objectives, arXiv:2406.18853",
)
