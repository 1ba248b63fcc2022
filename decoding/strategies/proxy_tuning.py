"""Proxy-tuning: a small tuned model and its untuned twin move a large one (Liu et al. 2024, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.core import Policy, Program, Role, Term, View
from decoding.strategies.spec import Strategy, bounded


@dataclass(frozen=True, slots=True)
class ProxyTuning:
    """Parameters of `proxy_tuning`."""

    expert: str = field(metadata={"description": "The small tuned model."})
    anti: str = field(metadata={"description": "The small model before its tuning."})
    alpha: float = field(default=1.0, metadata={"description": "How far the small pair moves the large model."})


def build(params: ProxyTuning, model: str) -> Program:
    """z = z_base + alpha (z_expert - z_anti). The expert sees its chat template, the untuned models the plain view."""
    alpha = bounded("alpha", params.alpha)
    terms = (
        Term("base", Role(model, view=View("plain"))),
        Term("expert", Role(params.expert), alpha),
        Term("anti", Role(params.anti, view=View("plain")), -alpha),
    )
    return Program("proxy_tuning", Policy(terms))


STRATEGY = Strategy(
    "proxy_tuning",
    "A small tuned model and its untuned twin steer a large untuned one.",
    ProxyTuning,
    build,
    "z_base + alpha (z_expert − z_anti)",
    needs=("expert", "anti: the expert before its tuning, same vocabulary"),
    paper="Liu et al. 2024, Tuning Language Models by Proxy, arXiv:2401.08565",
)
