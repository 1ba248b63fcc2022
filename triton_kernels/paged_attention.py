"""Attention of a packed, ragged batch over a paged pool: decode rows, verify rows and prefill chunks in one launch.

    s_n = softcap(scale q . k_n)      softcap(x) = c tanh(x / c)
    y   = sum_n e^(s_n) v_n / (sum_n e^(s_n) + e^sink)

over the keys n that the query at position p may see: n <= p, n > p - window, n in p's own chunk. The softmax is
computed online, key block after key block (Dao 2023, arXiv:2307.08691, algorithm 1), over the blocks of a pool (Kwon et
al. 2023, arXiv:2309.06180). Sums, scores and the softmax are fp32; the weights are rounded to the values' dtype before
they meet them, fp32 is multiplied as three tf32 products.

A program takes a tile of BLOCK_Q neighbouring tokens of a track times the query heads of one KV head. Tile i belongs
to the last track s with starts[s] // BLOCK_Q + s <= i: a bound on tiles that needs no look at the data, where a track
gets one tile too many at most. Long contexts with few programs are split along the keys, at multiples of `split`
keys; a second kernel joins the parts (flash decoding: the same rescaling as between two key blocks).

Launches: 1, or 2 with splits. Bytes: a track's keys and values in sight once per tile (a decode row: once), query and
output once; with splits 4 v_dim + 8 bytes written and read per row, head and part that has keys.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two

Tensor = torch.Tensor
SCAN = 128  # tracks, or parts, looked at at once
BLOCK_N = 64  # keys a step; splits begin at its multiples
LEAST_SPLIT = 256
MOST_PROGRAMS = 4096  # with parts; most of them may have no keys to look at
FEW_TOKENS = 64  # a batch with so many tokens more than tracks has a long span
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)  # the running maximum before any key: finite, for infinities must not be subtracted


def paged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    ends: Tensor,
    tables: Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `paged_attention`; track after track."""
    kv_heads, size = keys.shape[1], keys.shape[3]
    out = query.new_zeros(*query.shape[:2], values.shape[3])
    bounds = starts.tolist()
    for track, (first, last, end) in enumerate(zip(bounds[:-1], bounds[1:], ends.tolist(), strict=True)):
        if first == last or end <= 0:
            continue
        table = tables[track, : -(-end // size)].long()
        k = keys[table].permute(1, 2, 0, 3).flatten(2)[:, :, :end].float()  # [KH, dk, L]
        v = values[table].transpose(0, 1).flatten(1, 2)[:, :end].float()  # [KH, L, dv]
        q = query[first:last].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [KH, G, m, dk]
        scores = (q @ k[:, None]) * scale  # [KH, G, m, L]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        own = torch.arange(end - (last - first), end, device=query.device)[:, None]
        key = torch.arange(end, device=query.device)
        seen = key <= own  # [m, L]
        if window:
            seen &= key > own - window
        if chunk:
            seen &= key >= own - own % chunk
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :end].nan_to_num(0.0)  # a row without keys is zero
        out[first:last] = (weights @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
    return out


@triton.jit
def _with_sink(m, total, acc, sinks_ptr, head, inside, HAS_SINKS: tl.constexpr):
    """One more score, in powers of two as all of them, that has no value. m, total [R], acc [R, dv]."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.exp2(sink - top)
        acc = acc * shrink[:, None]
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["starts_ptr", "ends_ptr", "tracks", "table_stride", "tokens", "split"])
def _attention_kernel(
    query_ptr, keys_ptr, values_ptr, starts_ptr, ends_ptr, tables_ptr, sinks_ptr, out_ptr, top_ptr, total_ptr, acc_ptr,
    tracks, tokens, table_stride, query_token, query_head, keys_block, keys_head, values_block, values_head,
    scale, softcap, split,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)

    # The tile's track: as many as begin at or before this tile, less one. A track's first tile grows with the track.
    found = 0
    for base in range(0, tracks, SCAN):
        each = base + tl.arange(0, SCAN)
        begin = tl.load(starts_ptr + each, mask=each < tracks, other=0) // BLOCK_Q + each
        found += tl.sum(((begin <= tile) & (each < tracks)).to(tl.int32), axis=0)
    track = found - 1
    start = tl.load(starts_ptr + track)
    length = tl.load(starts_ptr + track + 1) - start
    end = tl.load(ends_ptr + track)
    skipped = (tile - (start // BLOCK_Q + track)) * BLOCK_Q  # tokens of the span before this tile
    if skipped >= length:
        return

    # Rows: the group's heads of the first token, then of the second, ..
    row = tl.arange(0, BLOCK_M)
    local = skipped + row // GROUP
    inside = (row < BLOCK_Q * GROUP) & (local < length)
    token = (start + local).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    own = end - length + local  # positions
    first = end - length + skipped
    last = tl.minimum(first + BLOCK_Q, end)  # one more than the last key in sight
    low = 0
    if WINDOW:
        low = tl.maximum(low, first - WINDOW + 1)
    if CHUNK:
        low = tl.maximum(low, first - first % CHUNK)
    if SPLITS:
        low = tl.maximum(low, tl.program_id(2) * split)
        last = tl.minimum(last, (tl.program_id(2) + 1) * split)
    low = low // BLOCK_N * BLOCK_N  # whole blocks from a fixed grid: the sums do not depend on the tile's other rows

    k_dim, v_dim, step = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    q_at = token[:, None] * query_token + head[:, None] * query_head + k_dim[None, :]
    q = tl.load(query_ptr + q_at, mask=inside[:, None] & (k_dim < K_DIM)[None, :], other=0.0)  # [BLOCK_M, dk]
    keys_ptr += kv_head.to(tl.int64) * keys_head
    values_ptr += kv_head.to(tl.int64) * values_head
    table_ptr = tables_ptr + tl.cast(track, tl.int64) * table_stride
    top = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for at in range(low, last, BLOCK_N):
        n = at + step
        stored = n < last
        held = n // SIZE * SIZE < last  # the same for all of a block: its keys are then loaded as vectors
        block = tl.load(table_ptr + n // SIZE, mask=held, other=0).to(tl.int64)
        k_at = block[None, :] * keys_block + k_dim[:, None] * SIZE + (n % SIZE)[None, :]
        k = tl.load(keys_ptr + k_at, mask=held[None, :] & (k_dim < K_DIM)[:, None], other=0.0)  # [dk, BLOCK_N]
        scores = tl.dot(q, k, input_precision="tf32x3") * scale  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            # tanh by an exponential that cannot overflow
            small = tl.exp2(tl.abs(scores) * (-2.0 * LOG2E / softcap))
            capped = softcap * (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0.0, -capped, capped)
        seen = n[None, :] <= own[:, None]
        if WINDOW:
            seen = seen & (n[None, :] > own[:, None] - WINDOW)
        if CHUNK:
            seen = seen & (n[None, :] >= (own - own % CHUNK)[:, None])
        scores = tl.where(seen & stored[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(weights, axis=1)
        v_at = block[:, None] * values_block + (n % SIZE)[:, None] * V_DIM + v_dim[None, :]
        v = tl.load(values_ptr + v_at, mask=stored[:, None] & (v_dim < V_DIM)[None, :], other=0.0)  # [BLOCK_N, dv]
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")

    to = token * HEADS + head
    written = inside[:, None] & (v_dim < V_DIM)[None, :]
    if SPLITS:
        to += tl.program_id(2).to(tl.int64) * tokens * HEADS
        tl.store(top_ptr + to, top, mask=inside)
        tl.store(total_ptr + to, total, mask=inside)
        if last > low:
            tl.store(acc_ptr + to[:, None] * V_DIM + v_dim[None, :], acc, mask=written)
    else:
        y = _with_sink(top, total, acc, sinks_ptr, head, inside, HAS_SINKS)
        tl.store(out_ptr + to[:, None] * V_DIM + v_dim[None, :], y.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows", "parts"])
def _join_kernel(
    top_ptr, total_ptr, acc_ptr, sinks_ptr, out_ptr, rows, parts,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # token * HEADS + head
    inside = row < rows
    v_dim = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_R], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    # First the parts that have keys: few of many, where a context is short or seen through a window.
    low, high = parts, 0
    for base in range(0, parts, SCAN):
        part = base + tl.arange(0, SCAN)
        there = (part < parts)[None, :] & inside[:, None]
        some = tl.load(total_ptr + part[None, :].to(tl.int64) * rows + row[:, None], mask=there, other=0.0) > 0.0
        low = tl.minimum(low, tl.min(tl.where(some, part[None, :], parts)))
        high = tl.maximum(high, tl.max(tl.where(some, part[None, :] + 1, 0)))
    at = row + tl.cast(low, tl.int64) * rows
    for _ in range(low, high):
        m = tl.load(top_ptr + at, mask=inside, other=NOTHING)
        share = tl.load(total_ptr + at, mask=inside, other=0.0)
        there = (inside & (share > 0.0))[:, None] & (v_dim < V_DIM)[None, :]
        part = tl.load(acc_ptr + at[:, None] * V_DIM + v_dim[None, :], mask=there, other=0.0)
        higher = tl.maximum(top, m)
        shrink, grown = tl.exp2(top - higher), tl.exp2(m - higher)
        top = higher
        total = total * shrink + share * grown
        acc = acc * shrink[:, None] + part * grown[:, None]
        at += rows
    y = _with_sink(top, total, acc, sinks_ptr, (row % HEADS).to(tl.int32), inside, HAS_SINKS)
    written = inside[:, None] & (v_dim < V_DIM)[None, :]
    tl.store(out_ptr + row[:, None] * V_DIM + v_dim[None, :], y.to(out_ptr.dtype.element_ty), mask=written)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    ends: Tensor,
    tables: Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    split: int | None = None,
    kernel: bool | None = None,
) -> Tensor:
    """[T, H, v_dim]: each token attends to its track's keys up to itself, which are in the pool already.

    query [T, H, k_dim], any strides over tokens and heads; keys [blocks, KH, k_dim, B], values [blocks, KH, B, v_dim]
    of the same dtype, B a power of two. starts [S + 1] int32: where each track's tokens begin in the batch, and T;
    ends [S] int32: the keys it has, its tokens being the last of them; tables [S, blocks] int32: its blocks in order.
    A track may have no tokens; a token without keys (ends less than its tokens) gets zeros. window: keys in sight,
    itself included; chunk: keys of the own chunk only; softcap: bound on the scores; 0 for none. sinks [H]: one more
    score per head, without a value. split: keys per part, a multiple of 64, 0 for one part; a row then has the same
    bits in every batch. None chooses by sizes known on the host. Raises ValueError if the shapes do not fit.
    """
    tokens, heads, k_dim = query.shape
    blocks, kv_heads, _, size = keys.shape
    tracks, v_dim = tables.shape[0], values.shape[3]
    fits = keys.shape[2] == k_dim and values.shape[:3] == (blocks, kv_heads, size) and heads % kv_heads == 0
    fits = fits and starts.shape == (tracks + 1,) and ends.shape == (tracks,)
    if not fits or (sinks is not None and sinks.shape != (heads,)):
        raise ValueError(
            f"paged_attention: query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, "
            f"starts {tuple(starts.shape)}, ends {tuple(ends.shape)}, tables {tuple(tables.shape)} or sinks do not fit"
        )
    if size & (size - 1) or (split is not None and split % BLOCK_N):
        raise ValueError(
            f"paged_attention: blocks of {size} keys must be a power of two, splits multiples of {BLOCK_N}"
        )
    if not on_kernel(query, kernel):
        return paged_attention_reference(
            query, keys, values, starts, ends, tables,
            scale=scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    for each in (keys, values, starts, ends):
        assert each.is_contiguous()
    query = query if query.stride(2) == 1 else query.contiguous()
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    out = query.new_empty(tokens, heads, v_dim)
    if not tokens:
        return out

    group = heads // kv_heads
    long = split is None and tokens - tracks >= FEW_TOKENS
    narrow = query.dtype.itemsize == 2
    tall = 128 if narrow and max(k_dim, v_dim) <= 128 else 64
    block_m = power_of_two(group, tall if long else 32)
    block_q = max(1, block_m // group)
    tiles = tokens // block_q + tracks
    reach = tables.shape[1] * size
    if split is None:
        split = choose_split(tiles * kv_heads, reach, query.device)
    parts = -(-reach // split) if split else 1
    spread = (parts, tokens, heads) if parts > 1 else (0,)
    top, total = query.new_empty(2, *spread, dtype=torch.float32)
    acc = query.new_empty(*spread, v_dim, dtype=torch.float32)
    _attention_kernel[(tiles, kv_heads, parts)](
        query, keys, values, starts, ends, tables, sinks, out, top, total, acc,
        tracks, tokens, tables.stride(0), query.stride(0), query.stride(1),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), scale, softcap, split,
        heads, group, k_dim, v_dim, size, window, chunk, softcap != 0.0, sinks is not None,
        parts > 1, block_q, block_m, BLOCK_N, power_of_two(k_dim, 16), power_of_two(v_dim, 16), SCAN,
        num_warps=8 if block_m >= 128 else 4, num_stages=3 if narrow else 2,
    )  # fmt: skip
    if parts > 1:
        rows, block_v = tokens * heads, power_of_two(v_dim)
        block_r = max(1, 256 // block_v)
        _join_kernel[(triton.cdiv(rows, block_r),)](
            top, total, acc, sinks, out, rows, parts, heads, v_dim, sinks is not None, block_r, block_v, SCAN,
            num_warps=2,
        )  # fmt: skip
    return out


def choose_split(programs: int, reach: int, device: torch.device) -> int:
    """Keys per part where `programs` programs over up to `reach` keys each would leave processors idle, 0 elsewhere."""
    if programs >= 2 * _processors(device) or reach <= LEAST_SPLIT:
        return 0
    return max(LEAST_SPLIT, -(-reach * programs // (MOST_PROGRAMS * BLOCK_N)) * BLOCK_N)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132
