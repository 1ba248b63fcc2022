"""From mixed rows to tokens: hard masks, penalties, bias, temperature, top-k, top-p, min-p, draw, log-probs.

Order of the processors: hard masks (allowed ids, min tokens) -> repetition, presence, frequency penalties -> bias ->
temperature -> top-k -> top-p -> min-p, each truncation over what the one before it kept, as in transformers. Ties go
to the lower id everywhere. Reported log-probs are of the row as the policy made it, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.core import Sampling, Sequence, TokenLogprob
from decoding.noise import Lane, gumbel, key_tensor, noise_key

_CANDIDATES = 64  # kept sets are nearly always smaller; the rare larger one sorts its whole row


@dataclass(slots=True)
class Drawn:
    """What one row gave: the token, or None if no token was allowed, and its log-prob if asked for."""

    token: int | None
    logprob: TokenLogprob | None = None


def verify(z: torch.Tensor, sequences: Seq[Sequence], generator: torch.Generator) -> list[Drawn]:
    """Draw one token per row from z: [n, W] fp32, edited in place; row i belongs to sequences[i].

    Rows of requests with a seed use noise keyed by (seed, path, position); the others use `generator`.
    """
    wants = [s.group.request.sampling.logprobs for s in sequences]
    reported = {i: k for i, k in enumerate(wants) if k is not None}
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


def process(row: torch.Tensor, sequence: Sequence) -> None:
    """Hard masks, penalties and bias on one row [W], in place."""
    request, s = sequence.group.request, sequence.group.request.sampling
    if s.allowed_token_ids is not None:
        allowed = torch.tensor([i for i in s.allowed_token_ids if i < row.shape[0]], device=row.device)
        kept = row[allowed].clone()
        row.fill_(-torch.inf)
        row[allowed] = kept
    if len(sequence.output) < s.min_tokens:
        row[
            torch.tensor(sorted({*request.eos_ids, *s.stop_token_ids}), dtype=torch.int64, device=row.device)
        ] = -torch.inf
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(
            sorted({i for i in {*sequence.tracks[0].prompt, *sequence.counts} if i < row.shape[0]}), device=row.device
        )
        if len(sequence.tracks) > 1:  # a mix has no natural zero: use log-probs, which no shift of a model changes
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
    """Sample one token per row of processed logits z [n, W] at each request's temperature and truncation."""
    n = z.shape[0]
    params = [s.group.request.sampling for s in sequences]
    temperatures = torch.tensor([p.temperature for p in params], device=z.device)
    z = z / temperatures[:, None]
    tokens = [0] * n
    whole: list[int] = []
    cut: list[int] = []
    for i, p in enumerate(params):
        (cut if p.top_k or p.top_p < 1.0 or p.min_p > 0.0 else whole).append(i)
    for unseeded in (False, True):
        rows = [i for i in whole if (params[i].seed is None) == unseeded]
        if rows:
            ids = torch.arange(z.shape[1], device=z.device)[None]  # [1, W]
            part = z if len(rows) == n else z[rows]
            noise = _noise(part.shape, ids, None if unseeded else [sequences[i] for i in rows], generator, z.device)
            _put(tokens, rows, (part + noise).argmax(dim=1).tolist())
    if cut:
        values, ids = truncate(z[cut], [params[i] for i in cut])  # [c, m] each, -inf beyond the kept
        noise = torch.empty_like(values)
        for unseeded in (False, True):
            rows = [r for r, i in enumerate(cut) if (params[i].seed is None) == unseeded]
            if rows:
                who = None if unseeded else [sequences[cut[r]] for r in rows]
                noise[rows] = _noise((len(rows), values.shape[1]), ids[rows], who, generator, z.device)
        _put(tokens, cut, ids.gather(1, (values + noise).argmax(dim=1, keepdim=True))[:, 0].tolist())
    return tokens


def truncate(z: torch.Tensor, params: Seq[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens of each row, best first: (values [n, m], -inf beyond the kept ones; ids [n, m]).

    Kept = the first k, then the shortest prefix of those whose probability reaches top_p (the crossing token
    included; Holtzman et al. 2020), then those at least min_p times as likely as the best (Nguyen et al. 2024).
    """
    n, width = z.shape
    most = min(width, max(_CANDIDATES, *(p.top_k for p in params)) + 1)
    values, ids = top_stable(z, most)
    kept = _kept(values, torch.logsumexp(z, 1), params)  # [n]
    # A kept set that reaches the last candidate's value may go on beyond it: those rows are sorted whole.
    edge = values.gather(1, (kept - 1)[:, None])[:, 0] == values[:, -1]
    short = [i for i in range(n) if most < width and bool(edge[i])]
    if short:
        whole_values, whole_ids = torch.sort(z[short], dim=1, descending=True, stable=True)
        whole_kept = _kept(whole_values, torch.logsumexp(z[short], 1), [params[i] for i in short])
        m = max(most, int(whole_kept.max()))
        values = torch.nn.functional.pad(values, (0, m - most), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, m - most))
        values[short], ids[short], kept[short] = whole_values[:, :m], whole_ids[:, :m], whole_kept
    beyond = torch.arange(values.shape[1], device=z.device)[None] >= kept[:, None]
    return values.masked_fill(beyond, -torch.inf), ids


def _kept(values: torch.Tensor, total: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """How many of the descending `values` [n, m] are kept, [n] int64. total: [n] log-sum-exp of the whole rows."""
    device, m = values.device, values.shape[1]
    rank = torch.arange(m, device=device)[None]
    k = torch.tensor([p.top_k or 1 << 62 for p in params], device=device)[:, None]
    finite = torch.isfinite(values)
    in_k = (rank < k) & finite
    head = torch.logsumexp(values.masked_fill(~in_k, -torch.inf), 1)
    norm = torch.where(k[:, 0] < 1 << 62, head, total)[:, None]
    probs = torch.exp(values - norm).masked_fill(~in_k, 0.0)
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    before = probs.double().cumsum(1) - probs  # mass of the better ones
    keep = in_k & ((before < top_p) | (top_p >= 1.0))
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    keep &= torch.exp(values - values[:, :1]) >= min_p
    keep[:, 0] = True
    return keep.sum(1)


def top_stable(z: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The m best of each row, descending, equal values by ascending id: (values [n, m], ids [n, m]).

    Where the m-th value ties with one left out, which of them is in the set is not defined; `truncate` looks for it.
    """
    _, ids = torch.topk(z, m, dim=1)
    ids = ids.sort(dim=1).values
    values, order = torch.sort(z.gather(1, ids), dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


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
    if values.shape[1] > k and bool((values[:, k] == values[:, k - 1]).any()):
        values, ids = torch.sort(lp, dim=1, descending=True, stable=True)
    tops = [tuple(zip(i[:k], v[:k], strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, chosen, tops, strict=True)]


def _noise(
    shape: Seq[int], ids: torch.Tensor, seeded: Seq[Sequence] | None, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Gumbel noise [n, m]: keyed for `seeded` sequences, else from the generator."""
    if seeded is None:
        return -torch.log(torch.empty(tuple(shape), device=device).exponential_(generator=generator))
    keys = [_key(sequence) for sequence in seeded]
    return gumbel(key_tensor(keys, device), ids)


def _key(sequence: Sequence) -> int:
    seed = sequence.group.request.sampling.seed
    assert seed is not None
    return noise_key(seed, sequence.path, len(sequence.output), Lane.TOKEN)


def _put(tokens: list[int], rows: Seq[int], drawn: Seq[int]) -> None:
    for row, token in zip(rows, drawn, strict=True):
        tokens[row] = token
