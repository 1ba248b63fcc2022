"""The policy: each row's models, weighted and summed in fp32, with gates, solvers and plausibility.

z = sum of ungated w_j z_j + sum over gated terms of 1[v in gate_j] w_j z_j, over the tokens that every term has; then
tokens that are implausible beside the best allowed one are masked. A token whose logit is not finite in any term is
-inf in the mix, and infinities are never subtracted from each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from decoding.core import Gate, Policy, Rows, Solver
from decoding.state import Sample
from decoding.truncate import top_p_mask

Allowed = Callable[[Sample, int], torch.Tensor | None]  # (sample, its i-th row) -> [W] bool, None: every token is
Starts = Callable[[str, int], torch.Tensor]  # (text model, width) -> [W] bool, ids that begin a word


@dataclass(slots=True)
class Mixed:
    """z: [S, W] fp32 mixed logits of all samples' rows. `weights`: what a solver chose, by row (J floats)."""

    z: torch.Tensor
    weights: dict[int, list[float]]


def mix(samples: Sequence[Sample], rows: Mapping[str, Rows], allowed: Allowed, starts: Starts) -> Mixed:
    """The mixed logits of all samples' rows, in order; W is the widest mix, narrower ones are padded with -inf.

    Samples with the same models and the same shape of policy are computed together, whatever their weights and
    strategies.
    """
    total = sum(sample.count for sample in samples)
    groups: dict[object, list[tuple[int, Sample]]] = {}
    start = 0
    for sample in samples:
        groups.setdefault(_shape(sample), []).append((start, sample))
        start += sample.count
    if len(groups) == 1:
        return _mix_group(next(iter(groups.values())), rows, allowed, starts)
    widest = max(sample.sequence.group.width for sample in samples)
    device = next(iter(rows.values())).logits.device
    mixed = Mixed(torch.full((total, widest), -torch.inf, device=device), {})
    for members in groups.values():
        index = [at + i for at, sample in members for i in range(sample.count)]
        part = _mix_group(members, rows, allowed, starts)
        mixed.z[torch.tensor(index, device=device), : part.z.shape[1]] = part.z
        mixed.weights |= part.weights
    return mixed


def _shape(sample: Sample) -> object:
    """What must agree for rows to be mixed in one go: everything but weights and thresholds."""
    group = sample.sequence.group
    policy = group.policy
    gates = tuple(term.gate and (term.gate.of, term.gate.outside) for term in policy.terms)
    of = policy.plausibility and policy.plausibility.of
    models = tuple(track.model for track in sample.sequence.tracks)
    return (group.width, models, group.term_tracks, policy.logprobs, gates, of, policy.solver)


def _mix_group(
    members: Sequence[tuple[int, Sample]], rows: Mapping[str, Rows], allowed: Allowed, starts: Starts
) -> Mixed:
    samples = [sample for _, sample in members]
    first = samples[0].sequence
    policies = [sample.sequence.group.policy for sample in samples for _ in range(sample.count)]
    policy, width = policies[0], first.group.width
    tracks = [_rows(rows[track.model], j, samples, width) for j, track in enumerate(first.tracks)]
    gated = any(term.gate for term in policy.terms)
    if policy.logprobs or gated or policy.solver:
        tracks = [torch.log_softmax(track, 1) for track in tracks]
    terms = [tracks[j] for j in first.group.term_tracks]  # terms of one model and prompt share a track
    chosen: dict[int, list[float]] = {}
    if policy.solver:
        weights = _solve(policy.solver, terms, samples, starts(first.group.request.text_model, width))
        index = [at + i for at, sample in members for i in range(sample.count)]
        chosen = dict(zip(index, weights.tolist(), strict=True))
    else:
        values = [[term.weight for term in each.terms] for each in policies]
        weights = torch.tensor(values, device=terms[0].device)  # [n, J]
    names = {term.name: j for j, term in enumerate(policy.terms)}
    z = _gated_sum(terms, weights, policies, names) if gated else _sum(terms, weights, not policy.plausibility)
    z = z.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    if policy.plausibility:
        reference = terms[names[policy.plausibility.of]]
        ratios = [each.plausibility.ratio for each in policies if each.plausibility]
        _mask_implausible(z, reference, ratios, samples, allowed)
    return Mixed(z, chosen)


def _solve(
    solver: Solver, terms: Sequence[torch.Tensor], samples: Sequence[Sample], starts: torch.Tensor
) -> torch.Tensor:
    """A solver's weights for all rows, [n, J]. Behind a draft its state is the one with that draft accepted."""
    total = sum(sample.count for sample in samples)
    if not solver.stateful or total == len(samples):
        states = [sample.sequence.solver_state for sample in samples for _ in range(sample.count)]
        return solver.weights(terms, states, starts)
    weights = torch.zeros(total, len(terms), device=terms[0].device, dtype=terms[0].dtype)
    begins = [sum(sample.count for sample in samples[:i]) for i in range(len(samples))]
    state = [sample.sequence.solver_state for sample in samples]
    for step in range(max(sample.count for sample in samples)):
        members = [i for i, sample in enumerate(samples) if step < sample.count]
        at = [begins[i] + step for i in members]
        weights[at] = solver.weights([term[at] for term in terms], [state[i] for i in members], starts)
        for i, row in zip(members, at):
            token = samples[i].token_after(step)
            if token is not None:
                state[i] = solver.advance(state[i], weights[row].tolist(), token)
    return weights


def _rows(rows: Rows, j: int, samples: Sequence[Sample], width: int) -> torch.Tensor:
    """Rows of track j, a copy: [n, width] fp32."""
    logits = rows.logits  # [R, V]
    index = [sample.offsets[j] + i for sample in samples for i in range(sample.count)]
    if index != list(range(logits.shape[0])):
        logits = logits[torch.tensor(index, device=logits.device)]
    return logits[:, :width].to(torch.float32, copy=True)


def _sum(terms: Sequence[torch.Tensor], weights: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """sum_j w_j z_j, [n, W]; `in_place` may spend terms[0].

    A weight of 0 (only a solver's) leaves its term out: 0 * inf is nan.
    """
    zero = (weights == 0).any(dim=0).tolist()
    ones = bool((weights[:, 0] == 1.0).all())
    alone = in_place and all(term is not terms[0] for term in terms[1:])
    if zero[0]:
        total = torch.zeros_like(terms[0]).addcmul_(terms[0].masked_fill(weights[:, :1] == 0, 0.0), weights[:, :1])
    elif ones:
        total = terms[0] if alone else terms[0].clone()
    else:
        total = terms[0].mul_(weights[:, :1]) if alone else terms[0] * weights[:, :1]
    for j in range(1, len(terms)):
        column = weights[:, j : j + 1]
        total.addcmul_(terms[j].masked_fill(column == 0, 0.0) if zero[j] else terms[j], column)
    return total


def _gated_sum(
    terms: Sequence[torch.Tensor], weights: torch.Tensor, policies: Sequence[Policy], names: Mapping[str, int]
) -> torch.Tensor:
    """The mix of a policy with gates, over log-probs [n, W]."""
    plain = [j for j, term in enumerate(policies[0].terms) if term.gate is None]
    total = _sum([terms[j] for j in plain], weights[:, plain]) if plain else torch.zeros_like(terms[0])
    sets: dict[tuple[str, tuple[float, ...]], torch.Tensor] = {}
    for j, term in enumerate(policies[0].terms):
        if term.gate is None:
            continue
        gates = [_gate(policy, j) for policy in policies]
        key = (term.gate.of, tuple(gate.top_p for gate in gates))
        of = terms[names[term.gate.of]]
        inside = sets.get(key)
        if inside is None:
            inside = sets[key] = top_p_mask(of, key[1])
            if term.gate.outside == "drop":
                total.masked_fill_(~inside, -torch.inf)
            elif term.gate.outside == "of":
                total = torch.where(inside, total, of)
        total += (terms[j] * weights[:, j : j + 1]).masked_fill_(~inside, 0.0)
    return total


def _gate(policy: Policy, j: int) -> Gate:
    gate = policy.terms[j].gate
    assert gate is not None, "policies of one shape have the same gates"
    return gate


def _mask_implausible(
    z: torch.Tensor,
    reference: torch.Tensor,
    ratios: Sequence[float],
    samples: Sequence[Sample],
    allowed: Allowed,
) -> None:
    """-inf where p_of < ratio x its maximum over allowed tokens; z, reference: [n, W]. z is edited in place."""
    row = 0
    best = torch.empty(len(z), 1, device=z.device)
    finite = torch.isfinite(z)
    for sample in samples:
        for i in range(sample.count):
            mask = allowed(sample, i)
            usable = finite[row] if mask is None else finite[row] & mask[: z.shape[1]]
            best[row] = reference[row].masked_fill(~usable, -torch.inf).max()
            row += 1
    logs = torch.tensor([math.log(ratio) if ratio > 0 else -math.inf for ratio in ratios], device=z.device)[:, None]
    z.masked_fill_(reference < best + logs, -torch.inf)
