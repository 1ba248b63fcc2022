"""Which drafter and which acceptance a request gets, or the sentence that says why not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from decoding.core import LOOKUPS, SCORERS, BadRequest, Program, Sampling, Speculation, UnknownModel
from decoding.rules import RULES
from decoding.text import shared_vocabulary

if TYPE_CHECKING:
    from decoding.prepare import Entry

MAX_DRAFTS = 32  # each is a forward of the drafter, for which the whole batch waits
MAX_NGRAM = 16
ROLE_SHARE = 4  # a role drafts by itself if the main model has this many times its parameters
MODEL_SHARE = 8  # the same for a model that is not part of the policy


def settle_speculation(
    program: Program,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    catalog: Mapping[str, Entry],
    predicted: bool,
) -> Program:
    """The program with its drafter and rule named, and `lossless` accordingly. Raises BadRequest, UnknownModel.

    prompts: one per term; `predicted`: whether the client sent a prediction.
    """
    spec = program.speculation
    if spec is None:
        return program
    accept = spec.accept or ("coupled" if sampling.seed is not None else "rejection")
    if accept not in RULES:
        _refuse("accept", f"'{accept}' is no acceptance rule; there are {', '.join(RULES)}.")
    rule = RULES[accept]
    draft = _auto(program, prompts, catalog, predicted, rule.compares) if spec.draft == "auto" else spec.draft
    if draft == "prediction" and not predicted:
        _refuse("draft", "Drafts are to come from the prediction, but the request has no 'prediction'.")
    if draft in LOOKUPS and rule.compares:
        _refuse("accept", f"'{accept}' compares two models' distributions; '{draft}' has none. Name a draft model.")
    if draft not in LOOKUPS:
        _check_model(program, draft, prompts, catalog)
    _check_numbers(spec, rule.threshold is not None)
    settled = replace(spec, draft=draft, accept=accept)
    return replace(program, speculation=settled, lossless=program.lossless and rule.lossless)


def _auto(
    program: Program, prompts: Sequence[Sequence[int]], catalog: Mapping[str, Entry], predicted: bool, needs_model: bool
) -> str:
    """The likeliest drafter: the prediction, a small role that the text is steered towards, a small model, n-grams."""
    if predicted and not needs_model:
        return "prediction"
    main = program.models[0]
    size = _size(main, catalog)
    for term in program.policy.terms[1:]:
        positive = term.weight > 0 and term.role.model != main
        if positive and _size(term.role.model, catalog) * ROLE_SHARE <= size:
            return term.role.model
    small = [
        (entry.info.parameters, id)
        for id, entry in catalog.items()
        if id not in program.models
        and entry.info.of is None
        and entry.info.kind not in SCORERS
        and entry.info.parameters * MODEL_SHARE <= size
        and _reason(main, id, prompts[0], catalog) is None
    ]
    if small:
        return min(small)[1]
    if needs_model:
        _refuse("draft", "No small model with this vocabulary is served, and this rule needs one. Name a draft model.")
    return "ngram"


def _size(model: str, catalog: Mapping[str, Entry]) -> int:
    """Parameters of what computes `model`: an adapter costs what its model costs."""
    return catalog[catalog[model].info.of or model].info.parameters


def _check_model(program: Program, draft: str, prompts: Sequence[Sequence[int]], catalog: Mapping[str, Entry]) -> None:
    main = program.policy.terms[0].role.model
    if draft not in catalog:
        raise UnknownModel(draft, (*LOOKUPS, *catalog), param="decoding.speculation.draft")
    kind = catalog[draft].info.kind
    if kind in SCORERS:
        _refuse(
            "draft", f"'{draft}' is served as a scorer (kind {kind}) and cannot write; name a causal language model."
        )
    if draft == main:
        _refuse("draft", f"'{draft}' is the model whose tokens are to be drafted; name a smaller one.")
    if _size(draft, catalog) > _size(main, catalog):
        _refuse("draft", f"'{draft}' is larger than '{main}': drafts would cost more than they save.")
    solved = program.policy.solver is not None
    roles = {term.role.model for term in program.policy.terms[1:] if solved or term.weight != 0.0}
    reason = _reason(main, draft, () if draft in roles else prompts[0], catalog)
    if reason is not None:
        _refuse("draft", reason)


def _reason(main: str, draft: str, prompt: Sequence[int], catalog: Mapping[str, Entry]) -> str | None:
    """Why `draft` cannot draft for `main` after `prompt`, None if it can."""
    info = catalog[draft].info
    if shared_vocabulary(catalog[main].text, catalog[draft].text) is None:
        return f"'{draft}' cannot draft for '{main}': their tokenizers differ in the tokens of the same ids."
    if prompt and max(prompt) >= info.width:
        return f"The prompt holds token {max(prompt)}, which '{draft}' does not have."
    if len(prompt) >= info.max_model_len:
        return f"The prompt has {len(prompt)} tokens, and '{draft}' takes {info.max_model_len}."
    return None


def _check_numbers(spec: Speculation, has_threshold: bool) -> None:
    if spec.tokens != "auto" and not 1 <= spec.tokens <= MAX_DRAFTS:
        _refuse("tokens", f"'tokens' must be from 1 to {MAX_DRAFTS}, or \"auto\"; it is {spec.tokens}.")
    if spec.threshold is not None and not has_threshold:
        with_one = ", ".join(name for name, rule in RULES.items() if rule.threshold is not None)
        _refuse("threshold", f"This rule has no threshold; those that have one: {with_one}.")
    bounds = [
        ("threshold", 0.0 if spec.threshold is None else spec.threshold, 0.0, math.inf),
        ("weight", spec.weight, 0.0, 1.0),
        ("kappa", spec.kappa, 0.0, math.inf),
        ("certain", 0.0 if spec.certain is None else spec.certain, 0.0, 1.0),
        ("epsilon", spec.epsilon, 0.0, 1.0),
        ("delta", spec.delta, 0.0, math.inf),
    ]
    if not 1 <= spec.max_ngram <= MAX_NGRAM:
        _refuse("max_ngram", f"'max_ngram' must be from 1 to {MAX_NGRAM}.")
    for name, value, low, high in bounds:
        if not low <= value <= high:
            span = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            _refuse(name, f"'{name}' must be {span}; it is {value:g}.")


def _refuse(name: str, message: str) -> NoReturn:
    raise BadRequest(message, f"decoding.speculation.{name}")
