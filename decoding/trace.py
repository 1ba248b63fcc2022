"""Why each token was chosen: what every role thought of it, with which weight, and where the base ranked it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from decoding.events import RoleTrace, TokenTrace
from decoding.hosting import Rows
from decoding.state import Sample


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token of a sample's `row`-th row: its mixed log-prob, weights if a solver set them, how a draft passed."""

    sample: Sample
    row: int
    token: int
    mixed: float
    weights: Sequence[float] | None
    accepted: str | None = None


def trace(chosen: Sequence[Chosen], rows: Mapping[str, Rows]) -> list[TokenTrace]:
    """One entry per chosen token. Each model's rows are read once, for all tokens together."""
    found: dict[tuple[int, int], float] = {}  # (entry, track) -> log-prob
    ranks: dict[int, int] = {}  # entry -> rank under the first term
    wanted: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for i, each in enumerate(chosen):
        group = each.sample.sequence.group
        for j, track in enumerate(each.sample.sequence.tracks):
            row = each.sample.offsets[j] + each.row
            wanted.setdefault((track.model, group.width), []).append((i, j, row))
    for (model, width), entries in wanted.items():
        logits = rows[model].logits
        index = torch.tensor([row for _, _, row in entries], device=logits.device)
        part = logits[index, :width].float()  # [e, width]
        tokens = torch.tensor([chosen[i].token for i, _, _ in entries], device=logits.device)[:, None]
        own = part.gather(1, tokens)
        values = (own - torch.logsumexp(part, 1, keepdim=True))[:, 0].tolist()
        found |= {(i, j): value for (i, j, _), value in zip(entries, values, strict=True)}
        first = [e for e, (i, j, _) in enumerate(entries) if j == chosen[i].sample.sequence.group.term_tracks[0]]
        if first:
            part, own, tokens = (x if len(first) == len(entries) else x[first] for x in (part, own, tokens))
            above = (part > own).sum(1)
            equal = (part == own).logical_and_(torch.arange(width, device=logits.device) < tokens).sum(1)
            ranks |= {entries[e][0]: rank for e, rank in zip(first, (above + equal).tolist(), strict=True)}
    return [_entry(i, each, found, ranks[i]) for i, each in enumerate(chosen)]


def _entry(i: int, each: Chosen, found: Mapping[tuple[int, int], float], rank: int) -> TokenTrace:
    group = each.sample.sequence.group
    terms = group.policy.terms
    weights = each.weights or [term.weight for term in terms]
    roles = tuple(
        RoleTrace(term.name, found[i, track], weight)
        for term, track, weight in zip(terms, group.term_tracks, weights, strict=True)
    )
    return TokenTrace(each.token, each.mixed, rank, roles, each.accepted is not None, each.accepted)
