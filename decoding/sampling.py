"""From mixed rows to tokens: hard masks, penalties, bias, temperature, top-k, top-p, min-p, draw, log-probs.

Order of the processors: hard masks (allowed ids, min tokens) -> repetition, presence, frequency penalties -> bias ->
temperature -> top-k -> top-p -> min-p, each truncation over what the one before it kept, as in transformers. Ties go
to the lower id everywhere. Reported log-probs are of the row as the policy made it, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.core import Sampling
from decoding.events import TokenLogprob, TokenTrace
from decoding.noise import GUMBEL_MAX, Lane, gumbel, key_tensor, noise_key, uniform
from decoding.state import Sequence
from decoding.truncate import first_ids, keep_rows, top_stable, truncate
from decoding.upload import upload, uploaded

_SMALL = 1024  # a row of so few ids is hashed whole
_COLDEST = 1e-30  # a temperature below it is this one: fp32 has no smaller number worth dividing by


@dataclass(slots=True)
class Drawn:
    """What one row gave: the token, or None if no token was allowed, and its log-prob if asked for.

    `accepted`: the rule that let a drafted token pass. `trace` is filled in for requests that ask for it.
    """

    token: int | None
    logprob: TokenLogprob | None = None
    accepted: str | None = None
    trace: TokenTrace | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a sequence's text where a token is to be chosen: behind its output and the `drafted` tokens."""

    sequence: Sequence
    drafted: tuple[int, ...] = ()

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn here."""
        return self.sequence.sampling

    @property
    def length(self) -> int:
        """Tokens before it, the prompt's not counted."""
        return len(self.sequence.output) + len(self.drafted)

    @property
    def counts(self) -> Mapping[int, int]:
        """How often each id stands before it, the prompt not counted."""
        if not self.drafted:
            return self.sequence.counts
        counts = dict(self.sequence.counts)
        for token in self.drafted:
            counts[token] = counts.get(token, 0) + 1
        return counts

    def key(self, lane: Lane) -> int:
        """Key of the noise of `lane` here; the request has a seed."""
        seed = self.sequence.group.seed
        assert seed is not None
        return noise_key(seed, self.sequence.path, self.length, lane)


def reported(sequence: Sequence) -> int | None:
    """How many of the best tokens are reported beside the chosen one, None if nothing is."""
    request = sequence.group.request
    wanted = request.sampling.logprobs
    return 0 if wanted is None and (request.program.trace or sequence.goal is not None) else wanted


def processes(at: Position) -> bool:
    """Whether `process` would change anything: most requests pay nothing for what they do not use."""
    s = at.sampling
    return (
        at.sequence.constraint is not None
        or s.allowed_token_ids is not None
        or at.length < s.min_tokens
        or s.repetition_penalty != 1.0
        or bool(at.length and (s.presence_penalty or s.frequency_penalty))
        or bool(s.logit_bias)
    )


def hard_mask(at: Position, width: int, device: torch.device) -> torch.Tensor | None:
    """Which ids may come next whatever the policy says: [width] bool, or None if every one may."""
    request, s = at.sequence.group.request, at.sampling
    waits = at.length < s.min_tokens
    if s.allowed_token_ids is None and not waits and at.sequence.constraint is None:
        return None
    mask = torch.full((width,), s.allowed_token_ids is None, device=device)
    if s.allowed_token_ids is not None:
        mask.index_fill_(0, uploaded([i for i in s.allowed_token_ids if i < width], device, torch.int64), True)
    if waits:
        ends = sorted(i for i in {*request.eos_ids, *s.stop_token_ids} if i < width)
        mask.index_fill_(0, uploaded(ends, device, torch.int64), False)
    if at.sequence.constraint is not None:
        made = at.sequence.draft.masks if at.sequence.draft else []
        if len(at.drafted) < len(made):  # the constraint itself has been rolled back to the output
            mask &= upload(made[len(at.drafted)][:width], device)
        else:
            assert not at.drafted, "every drafted token has its mask"
            mask &= upload(at.sequence.constraint.allowed(width), device)
    return mask


def process(row: torch.Tensor, at: Position) -> None:
    """Hard masks, penalties and bias on one row [W], in place. Beyond the request's own width, rows are -inf."""
    s, sequence = at.sampling, at.sequence
    row = row[: sequence.group.width]
    mask = hard_mask(at, row.shape[0], row.device)
    if mask is not None:
        row.masked_fill_(~mask, -torch.inf)
    counts = at.counts
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(
            sorted({i for i in {*sequence.group.request.prompts[0], *counts} if i < row.shape[0]}),
            device=row.device,
        )
        # A mix has no natural zero: log-probs have one, and no shift of a model's logits changes them.
        if len(sequence.group.policy.terms) > 1:
            row -= torch.logsumexp(row, 0)
        old = row[seen]
        row[seen] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    if counts and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device, dtype=torch.float32)
        row[ids] -= s.presence_penalty + s.frequency_penalty * times
    if s.logit_bias:
        ids = torch.tensor([i for i, _ in s.logit_bias], device=row.device)
        row[ids] += torch.tensor([b for _, b in s.logit_bias], device=row.device)


def draw(z: torch.Tensor, places: Seq[Position], generator: torch.Generator, lane: Lane = Lane.TOKEN) -> list[int]:
    """Sample one token per row of processed logits z [n, W] at each request's temperature and truncation.

    The draw is the argmax of log p + Gumbel noise of `lane` where noise is keyed, else the inverse of the cumulative
    sum.
    """
    n = z.shape[0]
    params = [at.sampling for at in places]
    z = tempered(z, params)
    tokens = [0] * n
    cut = [i for i, p in enumerate(params) if _truncates(p)]
    whole = sorted(set(range(n)).difference(cut))
    if cut:
        values, ids, wide = truncate(z if len(cut) == n else z[cut], [params[i] for i in cut])
        if wide:  # too many are kept for a short list: the whole row, with the others masked
            rest = [cut[row] for row in wide]
            z[rest] = keep_rows(z if len(rest) == n else z[rest], [params[i] for i in rest])
        whole += [cut[row] for row in wide]
        place = {i: row for row, i in enumerate(cut) if row not in set(wide)}
        for rows, keyed in _by_noise(list(place), places):
            at = [place[i] for i in rows]
            keys = [places[i].key(lane) for i in rows] if keyed else None
            _put(tokens, rows, _pick(values[at], ids[at], keys, generator))
    _put(tokens, whole, pick(z if whole == list(range(n)) else z[whole], [places[i] for i in whole], generator, lane))
    return tokens


def kept(z: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """Processed logits z [n, W] at temperature, -inf outside the truncation: their softmax is what is drawn from."""
    z = tempered(z, params)
    cut = [i for i, p in enumerate(params) if _truncates(p)]
    if len(cut) == len(params):
        return keep_rows(z, params)
    if cut:
        z[cut] = keep_rows(z[cut], [params[i] for i in cut])
    return z


def tempered(z: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """z [n, W] from the best logit down, over the temperature: a copy.

    A tiny temperature then sends all others to -inf, and nothing to +inf.
    """
    scale = uploaded([max(p.temperature, _COLDEST) for p in params], z.device)[:, None]
    best = z.amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # -inf where nothing is allowed: not nan
    return (z - best) / scale


def pick(z: torch.Tensor, places: Seq[Position], generator: torch.Generator, lane: Lane = Lane.TOKEN) -> list[int]:
    """One draw per row from softmax(z [n, W])."""
    tokens = [0] * len(places)
    for rows, keyed in _by_noise(list(range(len(places))), places):
        part = z if len(rows) == len(places) else z[rows]
        keys = [places[i].key(lane) for i in rows] if keyed else None
        _put(tokens, rows, _pick(part, None, keys, generator))
    return tokens


def coins(places: Seq[Position], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """One uniform in (0, 1) per position, of the lane that accepts drafts: [n] fp32."""
    u = torch.rand(len(places), generator=generator, device=device)
    for rows, keyed in _by_noise(list(range(len(places))), places):
        if keyed:
            keys = key_tensor([places[i].key(Lane.ACCEPT) for i in rows], device)
            u[uploaded(rows, device)] = uniform(keys, torch.zeros(1, 1, dtype=torch.int32, device=device))[:, 0]
    return u


def _truncates(p: Sampling) -> bool:
    return bool(p.top_k or p.top_p < 1.0 or p.min_p > 0.0)


def _by_noise(rows: list[int], places: Seq[Position]) -> list[tuple[list[int], bool]]:
    """The rows in two parts, without and with keyed noise; empty parts are left out."""
    keyed = [i for i in rows if places[i].sequence.group.seed is not None]
    free = [i for i in rows if places[i].sequence.group.seed is None]
    return [(part, who) for part, who in ((free, False), (keyed, True)) if part]


def _pick(z: torch.Tensor, ids: torch.Tensor | None, keyed: Seq[int] | None, generator: torch.Generator) -> list[int]:
    """One draw per row from softmax(z [n, m]); `ids` [n, m] names the columns, None if they are the ids themselves."""
    if keyed is None:
        cumulative = torch.softmax(z, 1).cumsum(1, dtype=torch.float64)  # [n, m]
        u = torch.rand(z.shape[0], 1, generator=generator, device=z.device, dtype=torch.float64)
        column = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # never a column of mass 0
    else:
        keys = key_tensor(keyed, z.device)
        if ids is None:
            return _gumbel_argmax(z, keys)
        column = (z + gumbel(keys, ids)).argmax(dim=1, keepdim=True)
    return (column if ids is None else ids.gather(1, column))[:, 0].tolist()


def _gumbel_argmax(z: torch.Tensor, keys: torch.Tensor) -> list[int]:
    """argmax of z + noise over whole rows [n, W], hashing only ids that can still win.

    The noise is bounded, so once the likeliest id's score is known, ids further below it than the bound are out.
    """
    if z.shape[1] <= _SMALL:
        ids = torch.arange(z.shape[1], device=z.device, dtype=torch.int32)[None]
        return (z + gumbel(keys, ids)).argmax(dim=1).tolist()
    best, first = z.max(dim=1, keepdim=True)
    floor = best + gumbel(keys, first) - GUMBEL_MAX  # [n, 1]
    tokens: list[int] = []
    for row in range(z.shape[0]):
        ids = (z[row] >= floor[row]).nonzero()[:, 0]  # [c], ascending: the first maximum is the lower id
        score = z[row, ids] + gumbel(keys[row : row + 1], ids[None])[0]
        tokens.append(int(ids[score.argmax()]))
    return tokens


def log_softmax_rows(z: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Log-softmax of the given rows of z [n, W], a copy: [len(rows), W] fp32."""
    return torch.log_softmax(z if len(rows) == z.shape[0] else z[rows], dim=1)


def token_logprobs(lp: torch.Tensor, tokens: Seq[int], k: int) -> list[TokenLogprob]:
    """Entries for the chosen `tokens`, one per row of lp [n, W], each with the k best (ties: the lower id)."""
    chosen = lp.gather(1, torch.tensor(tokens, device=lp.device)[:, None])[:, 0].tolist()
    if not k:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    k = min(k, lp.shape[1])
    values, ids = top_stable(lp, min(k + 1, lp.shape[1]))
    for row in (values[:, k:] == values[:, k - 1 : k]).any(dim=1).nonzero()[:, 0].tolist():
        tied = first_ids(lp[row], values[row, k - 1], k).sort().values  # a tie at the edge: lower ids are in
        values[row, :k], order = lp[row, tied].sort(descending=True, stable=True)
        ids[row, :k] = tied[order]
    tops = [tuple(zip(i[:k], v[:k], strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, chosen, tops, strict=True)]


def _put(tokens: list[int], rows: Seq[int], drawn: Seq[int]) -> None:
    for row, token in zip(rows, drawn, strict=True):
        tokens[row] = token
