"""The policy: each row's models, weighted and summed in fp32, with gates, solvers and plausibility.

z = sum of ungated w_j z_j + sum over gated terms of 1[v in gate_j] w_j z_j, over the tokens that every term has; then
tokens that are implausible beside the best allowed one are masked. A token whose logit is not finite in any term is
-inf in the mix, and infinities are never subtracted from each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from decoding.combine import Gating, KernelRows, TorchRows, rows_together
from decoding.core import Policy, Solver
from decoding.download import Download
from decoding.hosting import Rows
from decoding.plan import Sample
from decoding.sampling import Position
from decoding.truncate import cut_below
from decoding.upload import uploaded

if TYPE_CHECKING:
    from decoding.device_mix import DeviceRows

Allowed = Callable[[Sample, int], torch.Tensor | None]  # (sample, its i-th row) -> [W] bool, None: every token is
Processed = Callable[[Sample, int], Position | None]  # where its i-th row is wanted after the processors alone
Starts = Callable[[str, int], torch.Tensor]  # (text model, width) -> [W] bool, ids that begin a word


@dataclass(slots=True)
class Mixed:
    """z: [S, W] fp32 mixed logits of all samples' rows. solved: what solvers chose, [n, J] with the rows of z.

    processed: rows of z that the processors have changed already. best: [S] fp32, the rows' maxima before that, on the
    device path.
    """

    z: torch.Tensor
    solved: list[tuple[list[int], torch.Tensor]]
    processed: set[int] = field(default_factory=set)
    best: torch.Tensor | None = None

    def weights(self, down: Download) -> Callable[[], dict[int, list[float]]]:
        """What gives the solvers' choices by row, J floats each, once `down` has fetched."""
        wanted = [(rows, down.want(w)) for rows, w in self.solved]
        return lambda: {row: own for rows, w in wanted for row, own in zip(rows, w().tolist(), strict=True)}


def mix(
    samples: Sequence[Sample],
    rows: Mapping[str, Rows],
    allowed: Allowed,
    starts: Starts,
    kernel: bool | None = None,
    processed: Processed = lambda *_: None,
) -> Mixed:
    """The mixed logits of all samples' rows, in order; W is the widest mix, narrower ones are padded with -inf.

    Samples with the same models and the same shape of policy are computed together, whatever their weights and
    strategies. kernel: True for the kernels of `triton_kernels`, False for their specifications, None for the host's,
    which leaves the processors to others.
    """
    total = sum(sample.count for sample in samples)
    groups: dict[object, list[tuple[int, Sample]]] = {}
    start = 0
    for sample in samples:
        groups.setdefault(_shape(sample), []).append((start, sample))
        start += sample.count
    if len(groups) == 1:
        return _mix_group(next(iter(groups.values())), rows, allowed, starts, kernel, processed)
    widest = max(sample.sequence.group.width for sample in samples)
    device = next(iter(rows.values())).logits.device
    mixed = Mixed(torch.full((total, widest), -torch.inf, device=device), [])
    mixed.best = None if kernel is None else torch.empty(total, device=device)
    for members in groups.values():
        index = uploaded([at + i for at, sample in members for i in range(sample.count)], device)
        part = _mix_group(members, rows, allowed, starts, kernel, processed)
        mixed.z[index, : part.z.shape[1]] = part.z
        if mixed.best is not None and part.best is not None:
            mixed.best[index] = part.best
        mixed.solved += part.solved
        mixed.processed |= part.processed
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
    members: Sequence[tuple[int, Sample]],
    rows: Mapping[str, Rows],
    allowed: Allowed,
    starts: Starts,
    kernel: bool | None,
    processed: Processed,
) -> Mixed:
    samples = [sample for _, sample in members]
    group = samples[0].sequence.group
    policies = [sample.sequence.group.policy for sample in samples for _ in range(sample.count)]
    policy, of = policies[0], group.term_tracks  # terms of one model and prompt share a track
    tracks = [(rows[track.model].logits, _offsets(j, samples)) for j, track in enumerate(samples[0].sequence.tracks)]
    logprobs = bool(policy.logprobs or policy.solver or any(term.gate for term in policy.terms))
    source = rows_together(tracks, group.width, logprobs, kernel)
    solved: list[tuple[list[int], torch.Tensor]] = []
    if policy.solver:
        terms = [source.rows(t) for t in of]
        weights = _solve(policy.solver, terms, samples, starts(group.request.text_model, group.width))
        solved = [([at + i for at, sample in members for i in range(sample.count)], weights)]
    else:
        values = [[term.weight for term in each.terms] for each in policies]
        weights = uploaded(values, tracks[0][0].device)  # [n, J]
    names = {term.name: of[j] for j, term in enumerate(policy.terms)}
    gatings = [_gating(policies, j, names) for j in range(len(of))]
    ratios = [each.plausibility.ratio for each in policies if each.plausibility]
    floor = (names[policy.plausibility.of], ratios) if policy.plausibility else None
    if not isinstance(source, TorchRows | KernelRows):
        return _mix_on_device(members, source, weights, gatings, floor, solved, allowed, processed)
    z = source.mix(of, weights, gatings)
    if floor is not None:
        masks = [allowed(sample, i) for sample in samples for i in range(sample.count)]
        z = _mask_implausible(z, source.rows(floor[0]), ratios, masks)
    return Mixed(z, solved)


def _mix_on_device(
    members: Sequence[tuple[int, Sample]],
    source: DeviceRows,
    weights: torch.Tensor,
    gatings: Sequence[Gating | None],
    floor: tuple[int, Sequence[float]] | None,
    solved: list[tuple[list[int], torch.Tensor]],
    allowed: Allowed,
    processed: Processed,
) -> Mixed:
    """The rows that nobody wants without the processors get them on the way.

    One launch hides either all its masks' tokens or none: beside a row that the floor wants a mask of and that is not
    to be processed, rows with masks are left alone too.
    """
    spots = [(at + i, sample, i) for at, sample in members for i in range(sample.count)]
    places = [processed(sample, i) for _, sample, i in spots]
    masks = [
        allowed(sample, i) if floor or place else None for (_, sample, i), place in zip(spots, places, strict=True)
    ]
    hide = all(mask is None or place for mask, place in zip(masks, places, strict=True))
    if not hide:
        places = [place if mask is None else None for mask, place in zip(masks, places, strict=True)]
    of = members[0][1].sequence.group.term_tracks
    z, best = source.mix(of, weights, gatings, floor, masks, places, hide)
    return Mixed(z, solved, {row for (row, _, _), place in zip(spots, places, strict=True) if place}, best)


def _solve(
    solver: Solver, terms: Sequence[torch.Tensor], samples: Sequence[Sample], starts: torch.Tensor
) -> torch.Tensor:
    """A solver's weights for all rows, [n, J]. Behind a draft its state is the one with that draft accepted.

    A state is the host's: it waits for the device once for each row of the longest draft but the last.
    """
    total = sum(sample.count for sample in samples)
    if not solver.stateful or total == len(samples):
        states = [sample.sequence.solver_state for sample in samples for _ in range(sample.count)]
        return solver.weights(terms, states, starts)
    weights = torch.zeros(total, len(terms), device=terms[0].device, dtype=terms[0].dtype)
    begins = [sum(sample.count for sample in samples[:i]) for i in range(len(samples))]
    state = [sample.sequence.solver_state for sample in samples]
    for step in range(max(sample.count for sample in samples)):
        members = [i for i, sample in enumerate(samples) if step < sample.count]
        at = uploaded([begins[i] + step for i in members], weights.device)
        chosen = solver.weights([term[at] for term in terms], [state[i] for i in members], starts)
        weights[at] = chosen
        tokens = [samples[i].token_after(step) for i in members]
        if all(token is None for token in tokens):
            continue
        for i, own, token in zip(members, chosen.tolist(), tokens, strict=True):
            if token is not None:
                state[i] = solver.advance(state[i], own, token)
    return weights


def _offsets(j: int, samples: Sequence[Sample]) -> list[int]:
    """Where the samples' rows of track j are in its model's rows."""
    return [sample.offsets[j] + i for sample in samples for i in range(sample.count)]


def _gating(policies: Sequence[Policy], j: int, names: Mapping[str, int]) -> Gating | None:
    """Term j's gate for all rows; `names` gives the track of each term. Policies of one shape have the same gates."""
    gates = [policy.terms[j].gate for policy in policies]
    found = [gate for gate in gates if gate is not None]
    return Gating(names[found[0].of], tuple(gate.top_p for gate in found), found[0].outside) if found else None


def _mask_implausible(
    z: torch.Tensor,
    reference: torch.Tensor,
    ratios: Sequence[float],
    masks: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """z [n, W] with -inf where p_of < ratio x its maximum over allowed tokens; reference: [n, W]."""
    usable = z > -torch.inf  # [n, W]
    for row, mask in zip(usable, masks, strict=True):
        if mask is not None:
            row &= mask[: z.shape[1]]
    best = torch.where(usable, reference, -torch.inf).amax(1)  # [n]
    logs = torch.tensor([math.log(ratio) if ratio > 0 else -math.inf for ratio in ratios], device=z.device)
    return cut_below(z, reference, best + logs)
