"""Classifier-free guidance for text: one model, two prompts (Sanchez et al. 2023, eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decoding.core import BadRequest, Policy, Program, Role, Term, View
from decoding.strategies.spec import Strategy, bounded


@dataclass(frozen=True, slots=True)
class ClassifierFreeGuidance:
    """Parameters of `cfg`."""

    negative_prompt: str | list[dict[str, Any]] = field(
        metadata={"description": "What to move away from: a text, or chat messages."}
    )
    guidance: float = field(default=1.5, metadata={"description": "1 is the plain prompt; above 1 moves away."})


def build(params: ClassifierFreeGuidance, model: str) -> Program:
    """z = z_neg + guidance (z_pos - z_neg)."""
    guidance = bounded("guidance", params.guidance)
    negative: str | list[Mapping[str, Any]] = params.negative_prompt  # type: ignore[assignment]
    if not negative:
        raise BadRequest("'negative_prompt' must not be empty: give a text or a list of messages.", "negative_prompt")
    view = View("text", text=negative) if isinstance(negative, str) else View("messages", messages=tuple(negative))
    terms = (
        Term("positive", Role(model), guidance),
        Term("negative", Role(model, view=view), 1.0 - guidance),
    )
    return Program("cfg", Policy(terms))


STRATEGY = Strategy(
    "cfg",
    "Two prompts for one model: the answer moves away from the negative prompt's.",
    ClassifierFreeGuidance,
    build,
    "z_neg + guidance (z_pos − z_neg)",
    paper="Sanchez et al. 2023, Stay on Topic with Classifier-Free Guidance, arXiv:2306.17806",
)
