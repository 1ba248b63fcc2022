"""`accept.verify` where every decision stays on the device: the tokens come back together, in one copy at the end.

Kernels cut and draw; what the acceptance rules say of each drafted row is a tensor that `triton_kernels.sample_verify`
follows without knowing a rule. Requests without a seed draw from keys of their own, out of the engine's generator, so
their tokens are others than the host's, of the same distribution; those of seeds are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from triton_kernels.cutoffs import Cutoffs, cutoffs
from triton_kernels.sample_verify import chosen_probs, draw, top_logprobs, verify

from decoding.accept import Check, evidence, rows_of, unfiltered_rows
from decoding.events import TokenLogprob
from decoding.noise import Lane, key_halves
from decoding.rules import RULES
from decoding.sampling import Drawn, Position, process, processes, reported

Tensor = torch.Tensor
_NO_K = (1 << 31) - 1


@dataclass(slots=True)
class _Params:
    """How n rows are drawn from: temperature, top_p, min_p [n] fp32, top_k [n] int32, keys of two lanes [n, 2] int32."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    token_keys: Tensor
    residual_keys: Tensor

    @classmethod
    def of(cls, places: Seq[Position], generator: torch.Generator, device: torch.device) -> _Params:
        """Two copies to the device, whatever the batch."""
        drawn = [at.sampling for at in places]
        real = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in drawn], dtype=torch.float32).to(device)
        seeded = [at.sequence.group.seed is not None for at in places]
        whole = torch.tensor(
            [
                [min(p.top_k, _NO_K), known, *_halves(at, Lane.TOKEN, known), *_halves(at, Lane.RESIDUAL, known)]
                for at, p, known in zip(places, drawn, seeded, strict=True)
            ],
            dtype=torch.int32,
        ).to(device)
        keys = whole[:, 2:]
        if not all(seeded):
            fresh = torch.randint(-(1 << 31), 1 << 31, keys.shape, generator=generator, device=device)
            keys = torch.where(whole[:, 1:2] > 0, keys, fresh.int())
        temperature, top_p, min_p = (column.contiguous() for column in real.unbind(1))
        return cls(
            temperature, top_p, min_p, whole[:, 0].contiguous(), keys[:, :2].contiguous(), keys[:, 2:].contiguous()
        )


def verify_on_device(
    z: Tensor, checks: Seq[Check], generator: torch.Generator, kernel: bool | None = None
) -> list[list[Drawn]]:
    """See `accept.verify`. kernel: as the wrappers of `triton_kernels` take it; False runs their references."""
    places = [Position(c.sequence, c.drafts[:i]) for c in checks for i in range(len(c.drafts) + 1)]
    assert len(places) == len(z), "one row per position"
    params = _Params.of(places, generator, z.device)
    touched = [row for row, at in enumerate(places) if processes(at)]
    report = {row: k for row, at in enumerate(places) if (k := reported(at.sequence)) is not None}
    before = [row for row in touched if row in report]
    saved = z[_ids(before, z.device)]  # log-probs are of the rows before the processors
    unfiltered = unfiltered_rows(z, checks)
    for row in touched:
        process(z[row], places[row])
    every = torch.arange(len(z), dtype=torch.int32, device=z.device)
    cuts = cutoffs(z, every, z.shape[1], params.temperature, params.top_k, params.top_p, params.min_p, kernel=kernel)
    weighed = {row for c in checks if c.weighs for row in rows_of(c)}
    own = [row for row in range(len(z)) if row not in weighed]
    choice = torch.full((len(z),), -1, dtype=torch.int32, device=z.device)
    if own:
        at = every if len(own) == len(z) else _ids(own, z.device).int()
        tokens = draw(z, at, params.temperature, cuts, params.token_keys[at.long()], kernel=kernel)
        choice = tokens if len(own) == len(z) else choice.index_copy(0, at.long(), tokens)
    if any(c.drafts for c in checks):
        length, final, exact = _decide(z, checks, places, choice, params, cuts, unfiltered, generator, kernel)
    else:
        length, final, exact = torch.zeros_like(choice), choice, choice[:0]
    told = _LogProbs(z, saved, before, report, checks, length, final, kernel)
    found, labels, numbers = _down(torch.stack([length, final]), exact, told.packed)
    return _drawn(checks, found.tolist(), labels.tolist(), told.entries(numbers))


def _decide(
    z: Tensor,
    checks: Seq[Check],
    places: Seq[Position],
    choice: Tensor,
    params: _Params,
    cuts: Cutoffs,
    unfiltered: Mapping[int, Tensor],
    generator: torch.Generator,
    kernel: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted drafts [S], the token that follows them [S], -1 for none, whether the exact rule accepts [n]), int32."""
    device = z.device
    drafts = torch.tensor([x for c in checks for x in (*c.drafts, -1)], dtype=torch.int32).to(device)  # [n]
    begins = torch.tensor([*(c.start for c in checks), len(z)], dtype=torch.int32).to(device)
    q, q_row = _drafted_from(z, checks)
    accepted = torch.zeros(len(z), dtype=torch.bool, device=device)
    exact = torch.zeros(len(z), dtype=torch.int32, device=device)
    for name, rule in RULES.items():
        mine = [(i, c) for i, c in enumerate(checks) if c.drafts and c.rule.name == name]
        if not mine:
            continue
        rows = _ids([row for _, c in mine for row in rows_of(c)[:-1]], device)
        asked = drafts[rows]
        agree = choice[rows] == asked
        allowed = z.gather(1, drafts.clamp_min(0).long()[:, None])[rows, 0] > -torch.inf
        if rule.lossless and not any(c.weighs for _, c in mine):
            accepted[rows] = agree & allowed
            exact[rows] = (agree & allowed).int()
            continue
        held = torch.tensor([c.weighs for _, c in mine for _ in c.drafts]).to(device)
        chance = chosen_probs(z, rows.int(), asked, params.temperature, cuts, kernel=kernel)
        p = torch.where(held, chance, agree.float())
        at = q_row[rows].long()
        drawn_from = torch.where(at >= 0, q[at.clamp_min(0), asked.clamp(0, q.shape[1] - 1).long()], 1.0)
        found = evidence(rule, mine, z, places, agree, held, p, drawn_from, unfiltered, generator)
        accepted[rows] = rule.accept(found) & allowed
        exact[rows] = (found.exact & allowed).int()
    bonus = torch.tensor([c.sequence.draft is None or c.sequence.draft.bonus or not c.drafts for c in checks]).to(
        device
    )
    length, row = verify(accepted, begins, bonus, kernel=kernel)
    ends = row.clamp_min(0).long()
    final = choice[ends]
    closing = [i for i, c in enumerate(checks) if c.weighs]
    if closing:
        at = _ids(closing, device)
        rows = ends[at]
        counts = torch.tensor([len(checks[i].drafts) for i in closing]).to(device)
        whole = length[at] == counts
        plain = whole | torch.tensor([not checks[i].rule.residual for i in closing]).to(device)
        keys = torch.where(whole[:, None], params.token_keys[rows], params.residual_keys[rows])
        dense = torch.where(plain, -1, q_row[rows])
        one = torch.where(plain | (dense >= 0), -1, drafts[rows])
        tokens = draw(
            z, rows.int(), params.temperature, cuts, keys, q=q, q_row=dense.int(), one_hot=one.int(), kernel=kernel
        )
        final = final.index_copy(0, at, tokens)
    return length, torch.where(row < 0, -1, final), exact


def _drafted_from(z: Tensor, checks: Seq[Check]) -> tuple[Tensor, Tensor]:
    """Drafters' distributions [D, W], and which of them each row's draft was drawn from: [n] int32, -1 for none."""
    made: list[Tensor] = []
    place = [-1] * len(z)
    for c in checks:
        for i, probs in enumerate(c.sequence.draft.probs[: len(c.drafts)] if c.sequence.draft and c.weighs else ()):
            place[c.start + i] = len(made)
            made.append(probs)
    q = torch.zeros(max(1, len(made)), z.shape[1], device=z.device)
    for row, probs in zip(q, made):
        row[: probs.shape[0]] = probs
    return q, torch.tensor(place, dtype=torch.int32).to(z.device)


class _LogProbs:
    """Log-probs of the tokens that are told of, and of the best ones beside them: on the device, then as entries."""

    def __init__(
        self,
        z: Tensor,
        saved: Tensor,
        before: Seq[int],
        report: Mapping[int, int],
        checks: Seq[Check],
        length: Tensor,
        final: Tensor,
        kernel: bool | None,
    ) -> None:
        """z [n, W] with rows `before` as they are in `saved`; report: how many of the best tokens, by row."""
        self._k = list[int]()
        self._order = list[int]()
        parts: list[Tensor] = []
        spot = {c.start + i: (s, i) for s, c in enumerate(checks) for i in range(len(c.drafts) + 1)}
        drafts = {c.start + i: x for c in checks for i, x in enumerate((*c.drafts, 0))}
        apart = set(before)
        for source, rows in ((z, [row for row in report if row not in apart]), (saved, list(before))):
            if not rows:
                continue
            device = z.device
            k = min(max(report[row] for row in rows), z.shape[1])
            where, drafted = torch.tensor([[*spot[row], drafts[row]] for row in rows]).to(device).split((2, 1), 1)
            ahead = where[:, 1] < length[where[:, 0]]
            tokens = torch.where(ahead, drafted[:, 0], final[where[:, 0]].clamp_min(0)).int()
            index = torch.arange(len(rows)) if source is saved else torch.tensor(rows)
            chosen, values, ids = top_logprobs(source, index.int().to(device), tokens, k, kernel=kernel)
            parts += [chosen, values.flatten(), ids.int().flatten().view(torch.float32)]
            self._order += rows
            self._k += [k]
        self._report, self._apart = report, apart
        self.packed = torch.cat(parts) if parts else torch.empty(0, device=z.device)

    def entries(self, numbers: Tensor) -> dict[int, tuple[float, list[tuple[int, float]]]]:
        """By row: the chosen token's log-prob, and the best tokens with theirs."""
        found: dict[int, tuple[float, list[tuple[int, float]]]] = {}
        at = 0
        groups = [
            [row for row in self._order if row not in self._apart],
            [row for row in self._order if row in self._apart],
        ]
        for rows, k in zip([rows for rows in groups if rows], self._k, strict=True):
            m = len(rows)
            chosen = numbers[at : at + m].tolist()
            values = numbers[at + m : at + m + m * k].view(m, k).tolist()
            ids = numbers[at + m + m * k : at + m + 2 * m * k].view(torch.int32).view(m, k).tolist()
            at += m + 2 * m * k
            for row, own, v, i in zip(rows, chosen, values, ids, strict=True):
                wanted = min(self._report[row], k)
                found[row] = (own, list(zip(i[:wanted], v[:wanted])))
        return found


def _drawn(
    checks: Seq[Check],
    found: tuple[Seq[int], Seq[int]],
    exact: Seq[int],
    told: Mapping[int, tuple[float, list[tuple[int, float]]]],
) -> list[list[Drawn]]:
    out = []
    for s, c in enumerate(checks):
        count, last = found[0][s], found[1][s]
        name = c.rule.name
        label = name if c.rule.lossless else "rejection"
        drawn = [
            Drawn(token, accepted=label if exact[c.start + i] else name) for i, token in enumerate(c.drafts[:count])
        ]
        if count < len(c.drafts) or not c.drafts or c.sequence.draft is None or c.sequence.draft.bonus:
            drawn.append(Drawn(last if last >= 0 else None))
        for i, each in enumerate(drawn):
            entry = told.get(c.start + i)
            if entry is not None and each.token is not None:
                each.logprob = TokenLogprob(each.token, entry[0], tuple(entry[1]))
        out.append(drawn)
    return out


def _ids(rows: Seq[int], device: torch.device) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64).to(device)


def _halves(at: Position, lane: Lane, seeded: bool) -> tuple[int, int]:
    return key_halves(at.key(lane)) if seeded else (0, 0)


def _down(*tensors: Tensor) -> list[Tensor]:
    """All of them on the host, in one copy; 32-bit numbers."""
    flat = torch.cat([x.contiguous().flatten().view(torch.int32) for x in tensors]).cpu()
    out, at = [], 0
    for x in tensors:
        out.append(flat[at : at + x.numel()].view(x.dtype).view(x.shape))
        at += x.numel()
    return out
