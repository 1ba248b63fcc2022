"""One token of each row's truncated, tempered distribution: the argmax of log-weights and keyed Gumbel noise.

    token = argmax over kept v of (z_v - best) / T + gumbel(key, v)

(the Gumbel-max trick, for instance Maddison et al. 2014, arXiv:1411.0030). Rows whose draft was refused draw from the
residual max(p - q, 0) (Leviathan et al. 2023, arXiv:2211.17192, section 2.3): q is a drafter's row, or 1 for one id.
If the residual has no mass, they draw from p. Equal scores: the lower id.

Launches: 2, over chunks of rows and over rows. Bytes: z read once, q once where there is one; noise is computed only in
chunks that hold a kept token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_kernels.cutoffs import COLDEST, Cutoffs
from triton_kernels.dispatch import on_kernel, power_of_two
from triton_kernels.noise import gumbel

Tensor = torch.Tensor
CHUNK = 2048
_MASK32, _SHIFTS = 0xFFFFFFFF, ((16, 0x7FEB352D), (15, 0x846CA68B))


class Residual(NamedTuple):
    """What is taken from the rows' p before they draw.

    q [m, Wq] fp32 probabilities of drafters and q_row [n] int32, which of them, -1: none; both None without such
    drafters. removed [n] int32: the id that a draft without probabilities named, -1: none.
    """

    q: Tensor | None
    q_row: Tensor | None
    removed: Tensor


def uniform_reference(keys: Tensor, ids: Tensor) -> Tensor:
    """[n, m] fp32 of keys [n, 2] int32 and ids [m]: `noise.uniform` in wide integers."""
    low, high = (keys.long() & _MASK32).unsqueeze(2).unbind(1)  # [n, 1] each
    h = (ids[None].long() * 0x9E3779B1 + low) & _MASK32
    for other in (high, 0):
        for shift, factor in _SHIFTS:
            h = ((h ^ (h >> shift)) * factor) & _MASK32
        h = h ^ (h >> 16) ^ other
    return ((h >> 9).float() + 0.5) * 2.0**-23


def draw_reference(
    z: Tensor, temperature: Tensor, cut: Cutoffs, keys: Tensor, rows: Tensor, residual: Residual | None = None
) -> Tensor:
    """See `draw`."""
    at = rows.long().clamp_min(0)
    z, width = z[at], z.shape[1]
    ids = torch.arange(width, device=z.device)
    least, last, best, total = (x[at, None] for x in cut[:4])
    keep = (z > -torch.inf) & ((z > least) | ((z == least) & (ids <= last))) & (rows >= 0)[:, None]
    t = temperature[at, None]
    d = ((z - best) / torch.where(t == 0, 1.0, t.clamp_min(COLDEST))).masked_fill(~keep, -torch.inf)
    noise = -torch.log(-torch.log(uniform_reference(keys[at], ids)))
    token = torch.where(keep.any(1), (d + noise).argmax(1), -1)
    if residual is not None:
        p = torch.exp(d - total).masked_fill(~keep, 0.0)
        removed = residual.removed[at, None]
        used, rest = removed[:, 0] >= 0, p.masked_fill(ids == removed, 0.0)
        if residual.q is not None and residual.q_row is not None:
            own = residual.q_row[at].long()
            q = torch.zeros_like(p)
            q[:, : residual.q.shape[1]] = residual.q[own.clamp_min(0)]
            rest = torch.where((own >= 0)[:, None], (p - q).clamp_min(0.0), rest)
            used = used | (own >= 0)
        token = torch.where(used & (rest > 0).any(1), (rest.log() + noise).argmax(1), token)
    return token.int()


@triton.jit
def _store_best(scores_ptr, tokens_ptr, to, score, at):
    best = tl.max(score, axis=0)
    tl.store(scores_ptr + to, best)
    tl.store(tokens_ptr + to, tl.min(tl.where(score == best, at, 2147483647), axis=0))


@triton.jit(do_not_specialize=["m"])
def _draw_kernel(
    z_ptr, rows_ptr, temperature_ptr, least_ptr, last_ptr, best_ptr, total_ptr, keys_ptr,
    q_ptr, q_row_ptr, removed_ptr, scores_ptr, tokens_ptr, m, width, stride, chunks, q_width, q_stride,
    DENSE: tl.constexpr, RESIDUAL: tl.constexpr, COLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + s).to(tl.int64)
    i = tl.maximum(row, 0)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z_ptr + i * stride + at, mask=(at < width) & (row >= 0), other=-float("inf"))
    least, last = tl.load(least_ptr + i), tl.load(last_ptr + i)
    keep = (x > -float("inf")) & ((x > least) | ((x == least) & (at <= last)))
    to, more = s * chunks + chunk, m.to(tl.int64) * chunks
    if tl.max(keep.to(tl.int32), axis=0) > 0:
        temperature = tl.load(temperature_ptr + i)
        scale = tl.where(temperature == 0.0, 1.0, tl.maximum(temperature, COLDEST))
        best = tl.load(best_ptr + i)
        d = tl.maximum(tl.where(keep, x, best) - best, -200.0 * scale) / scale  # lower ones cannot win
        noise = gumbel(tl.load(keys_ptr + 2 * i), tl.load(keys_ptr + 2 * i + 1), at)
        _store_best(scores_ptr, tokens_ptr, to, tl.where(keep, d + noise, -float("inf")), at)
        if RESIDUAL:
            removed = tl.load(removed_ptr + i)
            used = removed >= 0
            p = tl.where(keep, tl.exp(d - tl.load(total_ptr + i)), 0.0)
            rest = tl.where(at == removed, 0.0, p)
            if DENSE:
                own = tl.load(q_row_ptr + i).to(tl.int64)
                q = tl.load(q_ptr + own * q_stride + at, mask=(at < q_width) & (own >= 0), other=0.0)
                rest = tl.where(own >= 0, tl.maximum(p - q, 0.0), rest)
                used = used | (own >= 0)
            rest = tl.where(used, rest, 0.0)
            score = tl.where(rest > 0.0, tl.log(tl.where(rest > 0.0, rest, 1.0)) + noise, -float("inf"))
            _store_best(scores_ptr, tokens_ptr, more + to, score, at)
    else:
        tl.store(scores_ptr + to, -float("inf"))
        if RESIDUAL:
            tl.store(scores_ptr + more + to, -float("inf"))


@triton.jit(do_not_specialize=["m"])
def _join_kernel(
    scores_ptr, tokens_ptr, token_ptr, m, chunks, RESIDUAL: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    s, at = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    token = tl.full([], -1, tl.int32)
    for part in tl.static_range(2 if RESIDUAL else 1):  # the residual's, where it has any, goes before p's
        from_ = (part * m.to(tl.int64) + s) * chunks + at
        scores = tl.load(scores_ptr + from_, mask=at < chunks, other=-float("inf"))
        best = tl.max(scores, axis=0)
        tokens = tl.load(tokens_ptr + from_, mask=(at < chunks) & (scores == best), other=2147483647)
        token = tl.where(best > -float("inf"), tl.min(tokens, axis=0), token)
    tl.store(token_ptr + s, token)


def draw(
    z: Tensor,
    temperature: Tensor,
    cut: Cutoffs,
    keys: Tensor,
    rows: Tensor | None = None,
    residual: Residual | None = None,
    *,
    kernel: bool | None = None,
) -> Tensor:
    """Tokens [m] int32 of rows `rows` [m] int32 (-1: none; None: all n) of z; -1 where nothing is allowed.

    z [n, W] fp32, finite or -inf; temperature [n] fp32 and `cut` of the same rows, which keeps one token where it is 0;
    keys [n, 2] int32, the low and high half of each row's key. Raises ValueError if the shapes do not fit.
    """
    n, width = z.shape
    if keys.shape != (n, 2) or temperature.shape != (n,) or cut.least.shape != (n,):
        raise ValueError(f"draw: z {tuple(z.shape)}, keys {tuple(keys.shape)} and parameters do not fit")
    if residual is not None and residual.q is not None and residual.q.shape[1] > width:
        raise ValueError(f"draw: q {tuple(residual.q.shape)} is wider than z {tuple(z.shape)}")
    rows = torch.arange(n, dtype=torch.int32, device=z.device) if rows is None else rows.contiguous()
    if not on_kernel(z, kernel):
        return draw_reference(z, temperature, cut, keys, rows, residual)
    z = z if z.stride(1) == 1 else z.contiguous()
    m, block = rows.shape[0], min(CHUNK, power_of_two(width, 32))
    chunks = triton.cdiv(width, block)
    scores = torch.empty(2, m, chunks, device=z.device)
    tokens = torch.empty(2, m, chunks, dtype=torch.int32, device=z.device)
    token = torch.empty(m, dtype=torch.int32, device=z.device)
    q, q_row, removed = residual or Residual(None, None, rows)
    dense = q is not None
    q = z if q is None else q if q.stride(1) == 1 else q.contiguous()
    if m:
        _draw_kernel[(m, chunks)](
            z, rows, temperature.contiguous(), *(x.contiguous() for x in cut[:4]), keys.contiguous(),
            q, rows if q_row is None else q_row.contiguous(), removed.contiguous(),
            scores, tokens, m, width, z.stride(0), chunks, q.shape[1], q.stride(0),
            dense, residual is not None, COLDEST, block,
        )  # fmt: skip
        _join_kernel[(m,)](scores, tokens, token, m, chunks, residual is not None, power_of_two(chunks))
    return token
