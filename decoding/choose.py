"""Which token each drafter's row drafts, and what the acceptance rules want to know of the distribution behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.noise import Lane
from decoding.rules import RULES, Rule
from decoding.sampling import Position, draw, kept, pick, process, processes
from decoding.state import Draft, Sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """A draft for each of n rows, None where nothing is allowed.

    By row, where it is wanted: probs, the distribution [W] that was drawn from; logprobs, the row's own [W] at T = 1
    before any processor; confidence, the draft's probability.
    """

    tokens: Seq[int | None]
    probs: Mapping[int, torch.Tensor]
    logprobs: Mapping[int, torch.Tensor]
    confidence: Mapping[int, float]

    def record(self, row: int, sequence: Sequence) -> None:
        """Keep what is known of the row's draft with its sequence's others."""
        draft, width = draft_of(sequence), sequence.group.width
        if row in self.probs:
            draft.probs.append(self.probs[row][:width])
        if row in self.logprobs:
            draft.logprobs.append(self.logprobs[row][:width])
        if row in self.confidence:
            draft.confidence.append(self.confidence[row])


@dataclass(frozen=True, slots=True)
class Drafting:
    """What the rows of `members` are for: where each draft will stand, and by which rule it is judged."""

    places: list[Position]
    rules: list[Rule]
    adaptive: list[int]  # rows whose confidence is wanted

    @classmethod
    def of(cls, members: Seq[Sequence]) -> Drafting:
        """Of sequences that draft, each behind its drafts so far."""
        drafts = [draft_of(s) for s in members]
        places = [Position(s, tuple(draft.tokens)) for s, draft in zip(members, drafts, strict=True)]
        rules = [RULES[draft.spec.accept or "rejection"] for draft in drafts]
        return cls(places, rules, [i for i, draft in enumerate(drafts) if draft.spec.tokens == "auto"])

    def unfiltered(self, z: torch.Tensor) -> dict[int, torch.Tensor]:
        """`Choice.logprobs` of rows z [n, W] that no processor has edited yet."""
        return {i: torch.log_softmax(z[i], 0) for i, rule in enumerate(self.rules) if rule.compares}


def choose(z: torch.Tensor, members: Seq[Sequence], generator: torch.Generator) -> Choice:
    """One draft per row of z [n, W] fp32, which is edited in place."""
    asked = Drafting.of(members)
    places, rules = asked.places, asked.rules
    logprobs = asked.unfiltered(z)
    for row, at in enumerate(places):
        if processes(at):
            process(z[row], at)
    best, first = z.max(1)
    chosen: list[int | None] = [
        token if math.isfinite(value) else None for token, value in zip(first.tolist(), best.tolist(), strict=True)
    ]
    hot = [i for i, at in enumerate(places) if at.sampling.temperature > 0 and chosen[i] is not None]
    keyed = [i for i in hot if rules[i].keyed]
    if keyed:
        for i, token in zip(keyed, draw(z[keyed], [places[i] for i in keyed], generator), strict=True):
            chosen[i] = token
    weighed = [i for i in hot if not rules[i].keyed]
    probs: dict[int, torch.Tensor] = {}
    if weighed:
        cut = kept(z[weighed], [places[i].sampling for i in weighed])
        drawn = pick(cut, [places[i] for i in weighed], generator, Lane.DRAFT)
        for i, token, row_probs in zip(weighed, drawn, torch.softmax(cut, 1), strict=True):
            chosen[i], probs[i] = token, row_probs
    confidence: dict[int, float] = {}
    adaptive = [i for i in asked.adaptive if chosen[i] is not None]
    if adaptive:
        ids = torch.tensor([[token or 0] for token in chosen], device=z.device)
        own = z.gather(1, ids)[:, 0] if hot else best
        found = (own - torch.logsumexp(z, 1)).exp().tolist()
        confidence = {i: found[i] for i in adaptive}
    return Choice(chosen, probs, logprobs, confidence)


def draft_of(sequence: Sequence) -> Draft:
    """The draft of a sequence that drafts."""
    assert sequence.draft is not None
    return sequence.draft
