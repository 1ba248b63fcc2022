"""Acceptance: which drafts become text. One `verify` for every row of a batch; without drafts it is plain sampling.

A rule turns what is known about drafted rows into one decision per row; the first refusal of a sequence ends its
draft, and a token from that row's own distribution takes its place. Here p is the policy after every processor at that
position (its drafted prefix included), q what the draft was drawn from after the same processors.

The exact rule is rejection sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318):
accept x if u q(x) < p(x), else draw from norm(max(p - q, 0)); when every draft has passed, one more token comes from p.
`coupled` draws policy and drafter with the same noise and accepts while they agree: the text is that of the seed,
drafted or not. The other rules accept more, and the text is then no sample of the policy: `lossless` is False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from decoding.noise import Lane
from decoding.rules import RULES, Evidence, Rule
from decoding.sampling import (
    Drawn,
    Position,
    coins,
    draw,
    kept,
    log_softmax_rows,
    pick,
    process,
    processes,
    reported,
    tempered,
    token_logprobs,
)
from decoding.state import Sequence
from decoding.upload import uploaded


@dataclass(slots=True)
class Check:
    """Rows of z that belong to one sequence, from `start` on: row i follows its first i drafts.

    scores: [k] the judge head's logits at the drafts' own positions, if its rule asks for them. drafts: the k tokens.
    """

    sequence: Sequence
    start: int
    scores: torch.Tensor | None = None
    drafts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.drafts = tuple(self.sequence.draft.tokens) if self.sequence.draft else ()

    @property
    def rule(self) -> Rule:
        """The rule that its drafts go by."""
        draft = self.sequence.draft
        return RULES[(draft.spec.accept if draft else None) or "rejection"]

    @property
    def weighs(self) -> bool:
        """Whether its drafts are weighed by probabilities; else each row has a token of its own to compare with."""
        return bool(self.drafts) and not self.rule.keyed and self.sequence.sampling.temperature > 0


def verify(z: torch.Tensor, checks: Seq[Check], generator: torch.Generator) -> list[list[Drawn]]:
    """What each check's sequence gets: accepted drafts, then one token of the policy's own (see `Rule.bonus`).

    z: [S, W] fp32 rows of all checks, in order, edited in place. A token of None means that nothing was allowed there.
    Rows of requests with a seed use keyed noise; the others use `generator`.
    """
    places = [Position(c.sequence, c.drafts[:i]) for c in checks for i in range(len(c.drafts) + 1)]
    assert len(places) == len(z), "one row per position"
    report = {row: k for row, at in enumerate(places) if (k := reported(at.sequence)) is not None}
    lp = log_softmax_rows(z, list(report))  # before the processors edit z
    unfiltered = unfiltered_rows(z, checks)
    for row, at in enumerate(places):
        if processes(at):
            process(z[row], at)
    best, tokens = z.max(dim=1)  # first of equal maxima: the lower id
    choice, alive = tokens.tolist(), [math.isfinite(value) for value in best.tolist()]
    weighed = {row for c in checks if c.weighs for row in rows_of(c)}
    drawing = [
        row for row, at in enumerate(places) if at.sampling.temperature > 0 and alive[row] and row not in weighed
    ]
    if drawing:
        part = z if len(drawing) == len(z) else z[drawing]
        for row, token in zip(drawing, draw(part, [places[row] for row in drawing], generator), strict=True):
            choice[row] = token
    found: list[list[Drawn]] = [[] for _ in checks]
    final: dict[int, int] = {c.start: i for i, c in enumerate(checks) if not c.drafts}  # row -> check
    if any(c.drafts for c in checks):
        _decide(z, checks, places, choice, alive, unfiltered, generator, found, final)
    at_row = {row: i for i, row in enumerate(report)}
    for row, i in final.items():
        found[i].append(Drawn(choice[row] if alive[row] else None))
    for check, drawn in zip(checks, found, strict=True):
        rows = [check.start + i for i, each in enumerate(drawn) if check.start + i in at_row and each.token is not None]
        for row in rows:
            each = drawn[row - check.start]
            assert each.token is not None
            entry = at_row[row]
            each.logprob = token_logprobs(lp[entry : entry + 1], [each.token], report[row])[0]
    return found


def rows_of(check: Check) -> range:
    """Its rows of z."""
    return range(check.start, check.start + len(check.drafts) + 1)


def unfiltered_rows(z: torch.Tensor, checks: Seq[Check]) -> dict[int, torch.Tensor]:
    """Log-probs [k, W] of the drafted rows, by check, for rules that read them."""
    return {
        i: torch.log_softmax(z[c.start : c.start + len(c.drafts)], 1)
        for i, c in enumerate(checks)
        if c.drafts and (c.rule.compares or c.rule.judges)
    }


def _decide(
    z: torch.Tensor,
    checks: Seq[Check],
    places: Seq[Position],
    choice: list[int],
    alive: Seq[bool],
    unfiltered: Mapping[int, torch.Tensor],
    generator: torch.Generator,
    found: list[list[Drawn]],
    final: dict[int, int],
) -> None:
    """Accepted drafts into `found`; into `final` the row whose token follows them, which `choice` then holds."""
    open_rows = [row for c in checks if c.weighs for row in rows_of(c)]
    place = {row: i for i, row in enumerate(open_rows)}
    cut = kept(z[open_rows], [places[row].sampling for row in open_rows]) if open_rows else z[:0]  # [m, W]
    probs = torch.softmax(cut, 1)
    closing: list[tuple[int, torch.Tensor, Lane]] = []  # (row, log-weights [W], lane) of tokens that are still drawn
    for name, rule in RULES.items():
        mine = [(i, c) for i, c in enumerate(checks) if c.drafts and c.rule.name == name]
        if not mine:
            continue
        verdict, exact = _verdicts(rule, mine, z, places, choice, alive, probs, place, unfiltered, generator)
        end = 0
        for i, check in mine:
            begin, end = end, end + len(check.drafts)
            count = next((n for n, ok in enumerate(verdict[begin:end]) if not ok), len(check.drafts))
            label = "rejection" if not rule.lossless else name
            found[i] += [
                Drawn(token, accepted=label if exact[begin + n] else name)
                for n, token in enumerate(check.drafts[:count])
            ]
            row = check.start + count
            draft = check.sequence.draft
            assert draft is not None
            if count == len(check.drafts) and not draft.bonus:
                continue
            final[row] = i
            if check.weighs and alive[row]:
                closing.append((row, *_closing(check, count, probs, cut, place[row])))
    for lane in (Lane.TOKEN, Lane.RESIDUAL):
        group = [(row, weights) for row, weights, own in closing if own is lane]
        if group:
            rows = [row for row, _ in group]
            drawn = pick(torch.stack([w for _, w in group]), [places[row] for row in rows], generator, lane)
            for row, token in zip(rows, drawn, strict=True):
                choice[row] = token


def _verdicts(
    rule: Rule,
    mine: Seq[tuple[int, Check]],
    z: torch.Tensor,
    places: Seq[Position],
    choice: Seq[int],
    alive: Seq[bool],
    probs: torch.Tensor,
    place: Mapping[int, int],
    unfiltered: Mapping[int, torch.Tensor],
    generator: torch.Generator,
) -> tuple[list[bool], list[bool]]:
    """For each drafted row of `mine`: whether the draft is accepted, and whether the exact rule accepts it."""
    if rule.lossless and not any(c.weighs for _, c in mine):
        same = [alive[row] and choice[row] == x for _, c in mine for row, x in zip(rows_of(c), c.drafts)]
        return same, same
    tokens = torch.tensor([x for _, c in mine for x in c.drafts], device=z.device)
    weighed = torch.tensor([c.weighs for _, c in mine for _ in c.drafts], device=z.device)
    agree = torch.tensor([choice[row] for _, c in mine for row in rows_of(c)[:-1]], device=z.device) == tokens
    p, q = agree.float(), torch.ones(len(tokens), device=z.device)
    if bool(weighed.any()):
        at = torch.tensor([place.get(row, 0) for _, c in mine for row in rows_of(c)[:-1]], device=z.device)
        p = torch.where(weighed, probs[at, tokens].nan_to_num(0.0), p)
        q = torch.tensor(
            [float(c.sequence.draft.probs[i][x]) if c.sequence.draft and c.sequence.draft.probs else 1.0
             for _, c in mine for i, x in enumerate(c.drafts)],
            device=z.device,
        )  # fmt: skip
    found = evidence(rule, mine, z, places, agree, weighed, p, q, unfiltered, generator)
    allowed = torch.cat([_picked(z, c) for _, c in mine]) > -torch.inf
    return (rule.accept(found) & allowed).tolist(), (found.exact & allowed).tolist()


def _closing(check: Check, count: int, probs: torch.Tensor, cut: torch.Tensor, at: int) -> tuple[torch.Tensor, Lane]:
    """Log-weights [W] of the token that follows `count` accepted drafts, and the lane that draws it."""
    draft = check.sequence.draft
    assert draft is not None
    if count == len(check.drafts):
        return cut[at], Lane.TOKEN
    if not check.rule.residual:
        return cut[at], Lane.RESIDUAL
    rest = probs[at].clone()
    if draft.probs:
        q = draft.probs[count]
        rest[: q.shape[0]] -= q
        rest.clamp_min_(0.0)
    else:
        rest[check.drafts[count]] = 0.0
    if not bool(rest.sum() > 0):
        return cut[at], Lane.RESIDUAL  # p = q up to rounding: nothing is left to make up for
    return rest.log(), Lane.RESIDUAL


def _picked(rows: torch.Tensor, check: Check) -> torch.Tensor:
    """The drafted tokens' entries in their own rows: [k]."""
    ids = torch.tensor(check.drafts, device=rows.device)[:, None]
    return rows[check.start : check.start + len(check.drafts)].gather(1, ids)[:, 0]


def evidence(
    rule: Rule,
    mine: Seq[tuple[int, Check]],
    z: torch.Tensor,
    places: Seq[Position],
    agree: torch.Tensor,
    weighed: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    unfiltered: Mapping[int, torch.Tensor],
    generator: torch.Generator,
) -> Evidence:
    """What `rule` sees of the D drafted rows of its checks.

    agree [D] bool: the row's own token is the draft; weighed [D] bool: what counts are the probabilities p, q [D]
    instead, which are 0 or 1 elsewhere.
    """
    rows = [row for _, c in mine for row in rows_of(c)[:-1]]
    tokens = uploaded([x for _, c in mine for x in c.drafts], z.device)
    spots = [places[row] for row in rows]
    u = coins(spots, generator, z.device)
    exact = torch.where(weighed, u * q < p, agree)
    specs = [c.sequence.draft.spec for _, c in mine if c.sequence.draft for _ in c.drafts]
    greedy = uploaded([at.sampling.temperature == 0 for at in spots], z.device)
    mixed = uploaded([len(at.sequence.group.policy.terms) > 1 for at in spots], z.device)
    found = Evidence(exact, u, p, q, specs, tokens, greedy, mixed)
    if rule.opens:
        found.open = torch.log_softmax(tempered(z[uploaded(rows, z.device)], [at.sampling for at in spots]), 1)
    if rule.compares or rule.judges:
        found.lp = torch.cat([unfiltered[i] for i, _ in mine])
    if rule.compares:
        made = [lp for _, c in mine if c.sequence.draft for lp in c.sequence.draft.logprobs]
        found.q_lp = torch.full((len(made), z.shape[1]), -torch.inf, device=z.device)
        for row, lp in zip(found.q_lp, made, strict=True):
            row[: lp.shape[0]] = lp
    if rule.judges:
        found.scores = torch.cat([c.scores for _, c in mine if c.scores is not None])
    return found
