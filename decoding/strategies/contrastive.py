"""Contrast a strong model with a weak one (Li et al. 2022; O'Brien and Lewis 2023), or a prompt with two others."""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.core import Plausibility, Policy, Program, Role, Term, View
from decoding.strategies.spec import Strategy, bounded, finite


@dataclass(frozen=True, slots=True)
class Contrastive:
    """Parameters of `contrastive`."""

    amateur: str = field(metadata={"description": "The weak model whose tendencies are taken away."})
    weight: float = field(default=0.5, metadata={"description": "How much of the difference is added."})
    plausibility: float = field(
        default=0.1, metadata={"description": "Tokens below this share of the model's best probability are masked."}
    )


def build(params: Contrastive, model: str) -> Program:
    """z = z_s + weight (z_s - z_a) on {p_s >= plausibility max p_s}."""
    weight = bounded("weight", params.weight)
    ratio = finite("plausibility", params.plausibility, 0.0, 1.0)
    terms = (Term("base", Role(model), 1.0 + weight), Term("amateur", Role(params.amateur), -weight))
    return Program("contrastive", Policy(terms, plausibility=Plausibility("base", ratio)))


@dataclass(frozen=True, slots=True)
class ContrastivePrompt:
    """Parameters of `contrastive_prompt`."""

    better: str = field(metadata={"description": "A system prompt to move towards."})
    worse: str = field(metadata={"description": "A system prompt to move away from."})
    weight: float = field(default=1.0, metadata={"description": "How much of the difference is added."})


def build_prompts(params: ContrastivePrompt, model: str) -> Program:
    """z = z(x) + weight (z(better) - z(worse)): one model, three views."""
    weight = bounded("weight", params.weight)
    terms = (
        Term("base", Role(model)),
        Term("better", Role(model, view=View("system", text=params.better)), weight),
        Term("worse", Role(model, view=View("system", text=params.worse)), -weight),
    )
    return Program("contrastive_prompt", Policy(terms))


STRATEGY = Strategy(
    "contrastive",
    "A strong model minus the tendencies of a weak one, among plausible tokens.",
    Contrastive,
    build,
    "z_s + weight (z_s − z_a) on {p_s ≥ plausibility · max p_s}",
    needs=("amateur: a weaker model with the same vocabulary",),
    paper="Li et al. 2022, Contrastive Decoding, arXiv:2210.15097; O'Brien and Lewis 2023, arXiv:2309.09117",
)
PROMPTS = Strategy(
    "contrastive_prompt",
    "One model, three prompts: towards a better system prompt and away from a worse one.",
    ContrastivePrompt,
    build_prompts,
    "z(x) + weight (z(better) − z(worse))",
    paper="T-REG's token reward (Zhou et al. 2024, arXiv:2412.02685) used at decoding",
)
