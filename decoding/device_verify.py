"""`accept.verify` where every decision stays on the device: the tokens come back together, in the tick's one copy.

Kernels cut and draw; what the acceptance rules say of each drafted row is a tensor that `triton_kernels.sample_verify`
follows without knowing a rule. Requests without a seed draw from keys of their own, out of the engine's generator, so
their tokens are others than the host's, of the same distribution; those of seeds are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as Seq

import torch

from decoding.accept import Check, evidence, rows_of, unfiltered_rows
from decoding.device_logprobs import LogProbs
from decoding.device_params import DrawParams
from decoding.device_process import process_on_device
from decoding.download import Download
from decoding.events import TokenLogprob
from decoding.noise import Lane
from decoding.rules import RULES
from decoding.sampling import Drawn, Position, processes, reported
from decoding.upload import upload, uploaded
from triton_kernels.cutoffs import Cutoffs, cutoffs
from triton_kernels.draw import Residual, draw
from triton_kernels.row_stats import row_stats
from triton_kernels.sample_verify import verify

Tensor = torch.Tensor


def verify_on_device(
    z: Tensor,
    checks: Seq[Check],
    generator: torch.Generator,
    down: Download,
    kernel: bool | None = None,
    processed: Set[int] = frozenset(),
    best: Tensor | None = None,
) -> Callable[[], list[list[Drawn]]]:
    """What gives the result of `accept.verify`, once `down` has fetched.

    kernel: as the wrappers of `triton_kernels` take it; False runs their references. processed: rows that the
    processors have changed already. best: [n] fp32, the rows' maxima before the processors.
    """
    places = [Position(c.sequence, c.drafts[:i]) for c in checks for i in range(len(c.drafts) + 1)]
    assert len(places) == len(z), "one row per position"
    params = _params(places, checks, generator, z.device)
    changed = [row for row, at in enumerate(places) if processes(at)]
    touched = [row for row in changed if row not in processed]
    report = {row: k for row, at in enumerate(places) if (k := reported(at.sequence)) is not None}
    before = [row for row in touched if row in report]
    saved = z[_ids(before, z.device)]  # log-probs are of the rows before the processors
    unfiltered = unfiltered_rows(z, checks)
    if touched:
        process_on_device(z, touched, [places[row] for row in touched], kernel)
    if best is not None and changed:
        best = best.index_fill(0, _ids(changed, z.device), torch.nan)
    every = torch.arange(len(z), dtype=torch.int32, device=z.device)
    cut = cutoffs(z, every, z.shape[1], *params.limits, params.more[0], best, kernel=kernel)
    weighed = {row for c in checks if c.weighs for row in rows_of(c)}
    own = [row for row in range(len(z)) if row not in weighed]
    choice = torch.full((len(z),), -1, dtype=torch.int32, device=z.device)
    if len(own) == len(z):
        choice = draw(z, params.temperature, cut, params.keys, kernel=kernel)
    elif own:
        at = _ids(own, z.device)
        choice[at] = draw(z, params.temperature, cut, params.keys, at.int(), kernel=kernel)
    if any(c.drafts for c in checks):
        length, final, exact = _decide(z, checks, places, choice, params, cut, unfiltered, generator, kernel)
    else:
        length, final, exact = torch.zeros_like(choice), choice, choice[:0]
    told = _log_probs(down, z, saved, before, report, checks, length, final, kernel)
    lengths, finals, passed = (down.want(x) for x in (length, final, exact))
    return lambda: _drawn(checks, lengths().tolist(), finals().tolist(), passed().tolist(), told())


def _params(places: Seq[Position], checks: Seq[Check], generator: torch.Generator, device: torch.device) -> DrawParams:
    """With two columns [n] more: drafts, -1 for none, and those without probabilities, which a refused row leaves out.

    Refused rows of weighed drafts draw on a lane of their own.
    """
    lanes: list[Lane] = []
    drafts: list[int] = []
    removed: list[int] = []
    for c in checks:
        draft = c.sequence.draft
        one_hot = c.weighs and c.rule.residual and draft is not None and not draft.probs
        lanes += [*[Lane.RESIDUAL if c.weighs else Lane.TOKEN] * len(c.drafts), Lane.TOKEN]
        drafts += [*c.drafts, -1]
        removed += [*(c.drafts if one_hot else [-1] * len(c.drafts)), -1]
    return DrawParams.of(places, lanes, generator, device, drafts, removed)


def _decide(
    z: Tensor,
    checks: Seq[Check],
    places: Seq[Position],
    choice: Tensor,
    params: DrawParams,
    cut: Cutoffs,
    unfiltered: Mapping[int, Tensor],
    generator: torch.Generator,
    kernel: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted drafts [S], the token after them [S] or -1, whether the exact rule accepts [n]), int32."""
    device, (drafts, removed) = z.device, params.more
    q, q_row = _drafted_from(z, checks)
    accepted = torch.zeros(len(z), dtype=torch.bool, device=device)
    exact = torch.zeros(len(z), dtype=torch.int32, device=device)
    allowed = z.gather(1, drafts.clamp_min(0).long()[:, None])[:, 0] > -torch.inf
    assert cut.prob is not None
    for name, rule in RULES.items():
        mine = [(i, c) for i, c in enumerate(checks) if c.drafts and c.rule.name == name]
        if not mine:
            continue
        rows = _ids([row for _, c in mine for row in rows_of(c)[:-1]], device)
        asked = drafts[rows]
        passes = own = choice[rows] == asked
        if not rule.lossless or any(c.weighs for _, c in mine):
            weighed = uploaded([c.weighs for _, c in mine for _ in c.drafts], device)
            p = torch.where(weighed, cut.prob[rows], own.float())
            at = q_row[rows].long()
            drawn_from = torch.where(at >= 0, q[at.clamp_min(0), asked.long()], 1.0)
            found = evidence(rule, mine, z, places, own, weighed, p, drawn_from, unfiltered, generator)
            passes, own = rule.accept(found), found.exact
        accepted[rows] = passes & allowed[rows]
        exact[rows] = (own & allowed[rows]).int()
    begins = uploaded([*(c.start for c in checks), len(z)], device, torch.int32)
    bonus = uploaded([not c.drafts or c.sequence.draft is None or c.sequence.draft.bonus for c in checks], device)
    length, row = verify(accepted, begins, bonus, kernel=kernel)
    final = torch.where(row < 0, -1, choice[row.clamp_min(0).long()])
    closing = [i for i, c in enumerate(checks) if c.weighs]
    if closing:
        at = _ids(closing, device)
        whole = [row for c in checks if c.drafts and not c.rule.residual for row in rows_of(c)]
        left = Residual(q, q_row.index_fill(0, _ids(whole, device), -1), removed)
        final[at] = draw(z, params.temperature, cut, params.keys, row[at], left, kernel=kernel)
    return length, final, exact


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
    return q, uploaded(place, z.device, torch.int32)


def _log_probs(
    down: Download,
    z: Tensor,
    saved: Tensor,
    before: Seq[int],
    report: Mapping[int, int],
    checks: Seq[Check],
    length: Tensor,
    final: Tensor,
    kernel: bool | None,
) -> Callable[[], dict[int, tuple[float, list[tuple[int, float]]]]]:
    """What gives, by row, the log-prob of the token that is told of, and of the best ones beside it.

    z [n, W] with rows `before` as they are in `saved`; report: how many of the best tokens, by row.
    """
    groups: list[tuple[list[int], LogProbs]] = []
    spot = {c.start + i: (s, i, x) for s, c in enumerate(checks) for i, x in enumerate((*c.drafts, 0))}
    apart = set(before)
    for source, rows in ((z, [row for row in report if row not in apart]), (saved, list(before))):
        if not rows:
            continue
        at = list(range(len(rows))) if source is saved else rows
        table = torch.tensor([[*spot[row], i] for row, i in zip(rows, at, strict=True)]).T.contiguous()
        which, place, drafted, index = upload(table, z.device)
        tokens = torch.where(place < length[which], drafted, final[which].clamp_min(0))
        _, lse = row_stats(source, index, z.shape[1], kernel=kernel)
        groups.append((rows, LogProbs(down, source, index, lse, tokens, [report[row] for row in rows], kernel)))
    return lambda: {row: entry for rows, own in groups for row, entry in zip(rows, own.entries(), strict=True)}


def _drawn(
    checks: Seq[Check],
    lengths: Seq[int],
    finals: Seq[int],
    exact: Seq[int],
    told: Mapping[int, tuple[float, list[tuple[int, float]]]],
) -> list[list[Drawn]]:
    out = []
    for s, c in enumerate(checks):
        count, last = lengths[s], finals[s]
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
    return uploaded(list(rows), device, torch.int64)
