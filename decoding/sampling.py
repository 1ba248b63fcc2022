"""From mixed rows to tokens: hard masks, penalties, bias, temperature, top-k, top-p, min-p, draw, log-probs.

Order of the processors: hard masks (allowed ids, min tokens) -> repetition, presence, frequency penalties -> bias ->
temperature -> top-k -> top-p -> min-p, each truncation over what the one before it kept, as in transformers. Ties go
to the lower id everywhere. Reported log-probs are of the row as the policy made it, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.core import Sampling, TokenLogprob, TokenTrace
from decoding.noise import GUMBEL_MAX, Lane, gumbel, key_tensor, noise_key
from decoding.state import Sequence
from decoding.truncate import first_ids, keep_rows, top_stable, truncate

_COLDEST = 1e-30  # a temperature below it is this one: fp32 has no smaller number worth dividing by


@dataclass(slots=True)
class Drawn:
    """What one row gave: the token, or None if no token was allowed, and its log-prob if asked for.

    `trace` is filled in by the engine for requests that ask for it.
    """

    token: int | None
    logprob: TokenLogprob | None = None
    trace: TokenTrace | None = None


def verify(z: torch.Tensor, sequences: Seq[Sequence], generator: torch.Generator) -> list[Drawn]:
    """Draw one token per row from z: [n, W] fp32, edited in place; row i belongs to sequences[i].

    Rows of requests with a seed use noise keyed by (seed, path, position); the others use `generator`.
    """
    reported = {i: k for i, s in enumerate(sequences) if (k := _reported(s)) is not None}
    lp = log_softmax_rows(z, list(reported))  # before the processors edit z
    for i, sequence in enumerate(sequences):
        if _processes(sequence):
            process(z[i], sequence)
    best, tokens = z.max(dim=1)  # first of equal maxima: the lower id
    choice, alive = tokens.tolist(), torch.isfinite(best).tolist()
    drawing = [i for i, s in enumerate(sequences) if s.group.request.sampling.temperature > 0 and alive[i]]
    if drawing:
        rows = z if len(drawing) == len(sequences) else z[drawing]
        for i, token in zip(drawing, draw(rows, [sequences[i] for i in drawing], generator), strict=True):
            choice[i] = token
    drawn = [Drawn(token if ok else None) for token, ok in zip(choice, alive, strict=True)]
    for row, (i, k) in enumerate(reported.items()):
        if alive[i]:
            drawn[i].logprob = token_logprobs(lp[row : row + 1], [choice[i]], k)[0]
    return drawn


def _reported(sequence: Sequence) -> int | None:
    """How many of the best tokens are reported beside the chosen one, None if nothing is."""
    request = sequence.group.request
    wanted = request.sampling.logprobs
    return 0 if wanted is None and request.program.trace else wanted


def _processes(sequence: Sequence) -> bool:
    """Whether `process` would change anything: most requests pay nothing for what they do not use."""
    s = sequence.group.request.sampling
    return (
        s.allowed_token_ids is not None
        or len(sequence.output) < s.min_tokens
        or s.repetition_penalty != 1.0
        or (bool(sequence.counts) and bool(s.presence_penalty or s.frequency_penalty))
        or bool(s.logit_bias)
    )


def hard_mask(sequence: Sequence, width: int, device: torch.device) -> torch.Tensor | None:
    """Which ids may come next whatever the policy says: [width] bool, or None if every one may."""
    request, s = sequence.group.request, sequence.group.request.sampling
    waits = len(sequence.output) < s.min_tokens
    if s.allowed_token_ids is None and not waits:
        return None
    mask = torch.full((width,), s.allowed_token_ids is None, device=device)
    if s.allowed_token_ids is not None:
        mask[torch.tensor([i for i in s.allowed_token_ids if i < width], device=device)] = True
    if waits:
        ends = sorted(i for i in {*request.eos_ids, *s.stop_token_ids} if i < width)
        mask[torch.tensor(ends, dtype=torch.int64, device=device)] = False
    return mask


def process(row: torch.Tensor, sequence: Sequence) -> None:
    """Hard masks, penalties and bias on one row [W], in place."""
    s = sequence.group.request.sampling
    mask = hard_mask(sequence, row.shape[0], row.device)
    if mask is not None:
        row.masked_fill_(~mask, -torch.inf)
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(
            sorted({i for i in {*sequence.group.request.prompts[0], *sequence.counts} if i < row.shape[0]}),
            device=row.device,
        )
        # A mix has no natural zero: log-probs have one, and no shift of a model's logits changes them.
        if len(sequence.group.policy.terms) > 1:
            row -= torch.logsumexp(row, 0)
        old = row[seen]
        row[seen] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    if sequence.counts and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(list(sequence.counts), device=row.device)
        times = torch.tensor(list(sequence.counts.values()), device=row.device, dtype=torch.float32)
        row[ids] -= s.presence_penalty + s.frequency_penalty * times
    if s.logit_bias:
        ids = torch.tensor([i for i, _ in s.logit_bias], device=row.device)
        row[ids] += torch.tensor([b for _, b in s.logit_bias], device=row.device)


def draw(z: torch.Tensor, sequences: Seq[Sequence], generator: torch.Generator) -> list[int]:
    """Sample one token per row of processed logits z [n, W] at each request's temperature and truncation.

    The draw is the argmax of log p + Gumbel noise where the noise is keyed, else the inverse of the cumulative sum.
    """
    n = z.shape[0]
    params = [s.group.request.sampling for s in sequences]
    # From the best logit down: a tiny temperature then sends all others to -inf, and nothing to +inf.
    scale = torch.tensor([max(p.temperature, _COLDEST) for p in params], device=z.device)[:, None]
    z = (z - z.amax(1, keepdim=True)) / scale
    tokens = [0] * n
    cut = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1.0 or p.min_p > 0.0]
    whole = sorted(set(range(n)).difference(cut))
    if cut:
        values, ids, wide = truncate(z if len(cut) == n else z[cut], [params[i] for i in cut])
        if wide:  # too many are kept for a short list: the whole row, with the others masked
            rest = [cut[row] for row in wide]
            z[rest] = keep_rows(z if len(rest) == n else z[rest], [params[i] for i in rest])
        whole += [cut[row] for row in wide]
        place = {i: row for row, i in enumerate(cut) if row not in set(wide)}
        for rows, who in _by_noise(list(place), params):
            at = [place[i] for i in rows]
            _put(tokens, rows, _pick(values[at], ids[at], [sequences[i] for i in rows] if who else None, generator))
    for rows, who in _by_noise(whole, params):
        part = z if rows == list(range(n)) else z[rows]
        _put(tokens, rows, _pick(part, None, [sequences[i] for i in rows] if who else None, generator))
    return tokens


def _by_noise(rows: list[int], params: Seq[Sampling]) -> list[tuple[list[int], bool]]:
    """The rows in two parts, unseeded and seeded; empty parts are left out."""
    seeded = [i for i in rows if params[i].seed is not None]
    free = [i for i in rows if params[i].seed is None]
    return [(part, who) for part, who in ((free, False), (seeded, True)) if part]


def _pick(
    z: torch.Tensor, ids: torch.Tensor | None, seeded: Seq[Sequence] | None, generator: torch.Generator
) -> list[int]:
    """One draw per row from softmax(z [n, m]); `ids` [n, m] names the columns, None if they are the ids themselves."""
    if seeded is None:
        cumulative = torch.softmax(z, 1).cumsum(1, dtype=torch.float64)  # [n, m]
        u = torch.rand(z.shape[0], 1, generator=generator, device=z.device, dtype=torch.float64)
        column = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # never a column of mass 0
    else:
        keys = key_tensor([_key(sequence) for sequence in seeded], z.device)
        if ids is None:
            return _gumbel_argmax(z, keys)
        column = (z + gumbel(keys, ids)).argmax(dim=1, keepdim=True)
    return (column if ids is None else ids.gather(1, column))[:, 0].tolist()


def _gumbel_argmax(z: torch.Tensor, keys: torch.Tensor) -> list[int]:
    """argmax of z + noise over whole rows [n, W], hashing only ids that can still win.

    The noise is bounded, so once the likeliest id's score is known, ids further below it than the bound are out.
    """
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


def _key(sequence: Sequence) -> int:
    seed = sequence.group.request.sampling.seed
    assert seed is not None
    return noise_key(seed, sequence.path, len(sequence.output), Lane.TOKEN)


def _put(tokens: list[int], rows: Seq[int], drawn: Seq[int]) -> None:
    for row, token in zip(rows, drawn, strict=True):
        tokens[row] = token
