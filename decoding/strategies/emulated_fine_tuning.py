"""Emulated fine-tuning: tuned small models lend their behaviour change to a large one (Mitchell et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from decoding.core import BadRequest, Gate, Policy, Program, Role, Term, View
from decoding.strategies.spec import Strategy, bounded, finite, some


@dataclass(frozen=True, slots=True)
class EmulatedFineTuning:
    """Parameters of `emulated_fine_tuning`."""

    tuned: str | list[str] = field(metadata={"description": "One or several tuned models."})
    reference: str | list[str] = field(metadata={"description": "Each tuned model before its tuning, or one for all."})
    weights: list[float] | None = field(default=None, metadata={"description": "One per tuned model; 1 each."})
    amplify: float = field(
        default=1.0, metadata={"description": "Above 1 adds the large model's own lead over the reference again."}
    )
    top_p: float | None = field(
        default=None, metadata={"description": "A tuned model counts only on its top-p set; null: everywhere."}
    )
    outside: Literal["base", "tuned", "drop"] = field(
        default="base", metadata={"description": "What tokens outside the top-p set keep."}
    )


def build(params: EmulatedFineTuning, model: str) -> Program:
    """lp_base + sum_i w_i m_i (lp_tuned_i - lp_ref_i) + (amplify - 1)(lp_base - lp_ref)."""
    tuned, references = some("tuned", params.tuned), some("reference", params.reference)
    shared = len(set(references)) == 1
    if len(references) == 1:
        references = references * len(tuned)
    if len(references) != len(tuned):
        raise BadRequest(f"'reference' must be one model or {len(tuned)}, one per tuned model.", "reference")
    weights = [bounded("weights", w) for w in params.weights] if params.weights is not None else [1.0] * len(tuned)
    if len(weights) != len(tuned):
        raise BadRequest(f"'weights' must have {len(tuned)} numbers, one per tuned model.", "weights")
    amplify = bounded("amplify", params.amplify)
    if amplify != 1.0 and not shared:
        raise BadRequest("'amplify' needs one reference that all tuned models share.", "amplify")
    if params.outside == "tuned" and len(tuned) > 1:
        raise BadRequest("'outside' can be 'tuned' with one tuned model only.", "outside")
    gates = _gates(params, len(tuned))
    plain = View("plain")
    terms = [Term("base", Role(model, view=plain), amplify)]
    for i, (mine, reference, weight, gate) in enumerate(zip(tuned, references, weights, gates, strict=True)):
        terms.append(Term(_name("tuned", i), Role(mine), weight, gate))
        terms.append(Term(_name("reference", i), Role(reference, view=plain), -weight, gate))
    if amplify != 1.0:
        terms.append(Term("amplified_reference", Role(references[0], view=plain), 1.0 - amplify))
    return Program("emulated_fine_tuning", Policy(tuple(terms), logprobs=True))


def _gates(params: EmulatedFineTuning, count: int) -> list[Gate | None]:
    if params.top_p is None:
        return [None] * count
    top_p = finite("top_p", params.top_p, 0.0, 1.0)
    outside: Literal["base", "of", "drop"] = "of" if params.outside == "tuned" else params.outside
    return [Gate(_name("tuned", i), top_p, outside) for i in range(count)]


def _name(role: str, i: int) -> str:
    return role if i == 0 else f"{role}_{i + 1}"


STRATEGY = Strategy(
    "emulated_fine_tuning",
    "What tuning did to small models is added to a large one, with weights, amplification and a top-p gate.",
    EmulatedFineTuning,
    build,
    "lp_base + Σ w_i m_i (lp_tuned_i − lp_ref_i) + (amplify − 1)(lp_base − lp_ref)",
    needs=("tuned", "reference: the tuned models before their tuning, same vocabulary"),
    paper="Mitchell et al. 2023, An Emulator for Fine-Tuning Large Language Models, arXiv:2310.12962",
)
