"""Why each token was chosen: what every role thought of it, with which weight, and where the base ranked it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from decoding.download import Download, Later
from decoding.events import RoleTrace, TokenTrace
from decoding.hosting import Rows
from decoding.plan import Sample
from decoding.upload import uploaded


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
    """One entry per chosen token. Each model's rows are read once, for all tokens together; waits once for them."""
    found: dict[tuple[int, int], float] = {}  # (entry, track) -> log-prob
    ranks: dict[int, int] = {}  # entry -> rank under the first term
    down = Download()
    values: list[tuple[list[tuple[int, int]], Later]] = []  # of which entries and tracks
    places: list[tuple[list[int], Later]] = []  # of which entries
    wanted: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for i, each in enumerate(chosen):
        group = each.sample.sequence.group
        for j, track in enumerate(each.sample.sequence.tracks):
            row = each.sample.offsets[j] + each.row
            wanted.setdefault((track.model, group.width), []).append((i, j, row))
    for (model, width), entries in wanted.items():
        logits = rows[model].logits
        index = uploaded([row for _, _, row in entries], logits.device)
        part = logits[index, :width].float()  # [e, width]
        tokens = uploaded([chosen[i].token for i, _, _ in entries], logits.device)[:, None]
        own = part.gather(1, tokens)
        lp = (own - torch.logsumexp(part, 1, keepdim=True))[:, 0]
        values.append(([(i, j) for i, j, _ in entries], down.want(lp)))
        first = [e for e, (i, j, _) in enumerate(entries) if j == chosen[i].sample.sequence.group.term_tracks[0]]
        if first:
            if len(first) < len(entries):
                at = uploaded(first, logits.device)
                part, own, tokens = part[at], own[at], tokens[at]
            above = (part > own).sum(1)
            equal = (part == own).logical_and_(torch.arange(width, device=logits.device) < tokens).sum(1)
            places.append(([entries[e][0] for e in first], down.want(above + equal)))
    down.fetch()
    for keys, lps in values:
        found |= zip(keys, lps().tolist(), strict=True)
    for which, above_it in places:
        ranks |= zip(which, above_it().tolist(), strict=True)
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
