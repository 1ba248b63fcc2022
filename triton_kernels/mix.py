"""The policy's row: a weighted sum of models' rows with gates and plausibility, then hard masks, penalties and bias.

    z_v = sum of ungated w_j z_jv + sum over gated terms of 1[v in gate_j] w_j z_jv

over the tokens that every used term has; the others are -inf, and a weight of 0 leaves its term out. Outside its gate a
token keeps the ungated sum, another track's row, or nothing (emulated fine-tuning: Mitchell et al. 2023,
arXiv:2310.12962). With a plausibility floor, tokens less than `ratio` times as likely as the best allowed one are out
(contrastive decoding: Li et al. 2022, arXiv:2210.15097, equation 2). The policy's maximum and log-sum-exp are taken
there. Then come the mask of allowed tokens, v > 0 ? v / t : v t for the repetition penalty (Keskar et al. 2019,
arXiv:1909.05858), and sums for the other penalties and bias.

Launches: 2, over chunks of rows and over rows; 3 with a floor, whose best token is known when every chunk is mixed.
Bytes: each track's rows read once, z written once in fp32, a bit for each masked token read; a floor reads the
reference row again, and z, and writes z again. Edited tokens are read and written once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two
from triton_kernels.row_stats import CHUNK, joined, sum_above

Tensor = torch.Tensor
BASE, OF, DROP = 0, 1, 2  # what tokens outside a gate keep: the ungated sum, the gate's own row, nothing
_BASE, _OF, _DROP = tl.constexpr(BASE), tl.constexpr(OF), tl.constexpr(DROP)


class Gates(NamedTuple):
    """G gates. tracks, outside: G numbers; least [G, n] fp32 and last [G, n] int32: cuts of the unshifted rows."""

    tracks: Sequence[int]
    outside: Sequence[int]
    least: Tensor
    last: Tensor


class Edits(NamedTuple):
    """Changes to single tokens, row i's at start[i] up to start[i + 1]; an id at most once a row, none beyond z.

    start [n + 1] int32, ids int32, add and times fp32, relative [n] bool: `times` acts on log-probs of the masked row.
    """

    start: Tensor
    ids: Tensor
    add: Tensor
    times: Tensor
    relative: Tensor


class Mixed(NamedTuple):
    """z [n, W] fp32, finite or -inf; the policy's maximum and log-sum-exp [n] fp32, before masks and edits."""

    z: Tensor
    policy_best: Tensor
    policy_lse: Tensor


def mix_reference(
    tracks: Sequence[Tensor],
    index: Tensor,
    width: int,
    weights: Tensor,
    terms: Sequence[int],
    shifts: Tensor | None = None,
    gate_of: Sequence[int] | None = None,
    gates: Gates | None = None,
    floor: tuple[int, Tensor] | None = None,
    bits: Tensor | None = None,
    mask_of: Tensor | None = None,
    edits: Edits | None = None,
    hide: bool = True,
) -> Mixed:
    """See `mix`."""
    raw = [x[i.long(), :width].float() for x, i in zip(tracks, index)]  # [n, W] each
    rows = raw if shifts is None else [x - shift[:, None] for x, shift in zip(raw, shifts)]
    n, device = index.shape[1], weights.device
    ids = torch.arange(width, device=device)
    z, closed, before = torch.zeros(n, width, device=device), torch.zeros(n, width, dtype=torch.bool, device=device), -1
    for j in _order(terms, gate_of):
        g = gate_of[j] if gate_of else -1
        if gates is not None and g not in (-1, before):
            before, x, least, last = g, raw[gates.tracks[g]], gates.least[g][:, None], gates.last[g][:, None]
            closed = (x < least) | ((x == least) & (ids > last))
            if gates.outside[g] == OF:
                z = torch.where(closed, rows[gates.tracks[g]], z)
            elif gates.outside[g] == DROP:
                z = z.masked_fill(closed, -torch.inf)
        weight = weights[:, j : j + 1]
        z = z + weight * rows[terms[j]].masked_fill(closed | (weight == 0), 0.0)
    z = z.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    allowed = torch.ones(n, width, dtype=torch.bool, device=device)
    if bits is not None and mask_of is not None:
        words = bits[mask_of.long().clamp_min(0)][:, ids // 32] >> (ids % 32).int()  # [n, W]
        allowed = (mask_of < 0)[:, None] | (words & 1 != 0)
    if floor is not None:
        by = rows[floor[0]].nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        best = by.masked_fill(~allowed | (z == -torch.inf), -torch.inf).amax(1)
        z = z.masked_fill(by < (best + floor[1])[:, None], -torch.inf)
    best, lse = z.amax(1), torch.logsumexp(z, 1)
    if hide:
        z = z.masked_fill(~allowed, -torch.inf)
    if edits is not None:
        row = torch.repeat_interleave(torch.arange(n, device=device), edits.start.long().diff())
        at = edits.ids.long()
        shift = torch.where(edits.relative, torch.logsumexp(z, 1), 0.0).nan_to_num(0.0, 0.0, 0.0)[row]
        v = z[row, at] - shift
        v = torch.where(v > 0, v / edits.times, v * edits.times)
        z[row, at] = torch.where(edits.times == 1, z[row, at], v + shift) + edits.add
    return Mixed(z, best, lse)


def _order(terms: Sequence[int], gate_of: Sequence[int] | None) -> list[int]:
    """The terms as they are summed: ungated ones, then gate by gate, as the gates first appear."""
    first = list(dict.fromkeys([-1, *(gate_of or ())]))
    return sorted(range(len(terms)), key=lambda j: first.index(gate_of[j] if gate_of else -1))


@triton.jit
def _read(tracks, strides, index_ptr, shifts_ptr, i, n, at, use, T: tl.constexpr, SHIFTED: tl.constexpr):
    """(the row, the row less its shift or 0, whether that is finite) of track T at tokens `at` where `use`."""
    row = tracks[T] + tl.load(index_ptr + T * n + i).to(tl.int64) * strides[T]
    x = tl.load(row + at, mask=use, other=0.0).to(tl.float32)
    sound = tl.abs(x) < float("inf")
    v = tl.where(sound, x, 0.0)
    if SHIFTED:
        shift = tl.load(shifts_ptr + T * n + i) + tl.zeros_like(v)  # blocks: the interpreter spoils single booleans
        known = tl.abs(shift) < float("inf")
        sound = sound & known
        v = tl.where(sound, v - tl.where(known, shift, 0.0), 0.0)
    return x, v, sound


@triton.jit
def _allowed(bits_ptr, mask_of_ptr, i, at, inside, words, MASKED: tl.constexpr):
    if MASKED:
        mask = tl.load(mask_of_ptr + i)
        word = tl.load(bits_ptr + mask.to(tl.int64) * words + at // 32, mask=inside & (mask >= 0), other=-1)
        return inside & (((word >> (at % 32)) & 1) != 0)
    return inside


@triton.jit
def _settle(z, allowed, z_ptr, parts_ptr, i, n, chunk, chunks, at, inside, width):
    """Write a chunk of the masked row, and (maximum, sum) without and with the mask: parts [5, n, chunks]."""
    part, step = parts_ptr + i * chunks + chunk, n.to(tl.int64) * chunks
    best = tl.max(z, axis=0)
    tl.store(part, best)
    tl.store(part + step, sum_above(z, best))
    masked = tl.where(allowed, z, -float("inf"))
    best = tl.max(masked, axis=0)
    tl.store(part + 2 * step, best)
    tl.store(part + 3 * step, sum_above(masked, best))
    tl.store(z_ptr + i * width + at, masked, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _mix_kernel(
    tracks, strides, index_ptr, shifts_ptr, weights_ptr, least_ptr, last_ptr, bits_ptr, mask_of_ptr, z_ptr, parts_ptr,
    n, width, chunks, words,
    TERMS: tl.constexpr, COLUMNS: tl.constexpr, GATE_OF: tl.constexpr, GATES: tl.constexpr, OUTSIDE: tl.constexpr,
    FLOOR: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    z, sound = tl.zeros([BLOCK], tl.float32), inside
    closed = at < 0
    for j in tl.static_range(len(TERMS)):
        if GATE_OF[j] >= 0 and (j == 0 or GATE_OF[j] != GATE_OF[j - 1]):  # a gate's terms stand together
            x, v, known = _read(tracks, strides, index_ptr, shifts_ptr, i, n, at, inside, GATES[GATE_OF[j]], SHIFTED)
            least, last = tl.load(least_ptr + GATE_OF[j] * n + i), tl.load(last_ptr + GATE_OF[j] * n + i)
            closed = (x < least) | ((x == least) & (at > last))
            if OUTSIDE[GATE_OF[j]] == _OF:
                z, sound = tl.where(closed, v, z), tl.where(closed, known & inside, sound)
            if OUTSIDE[GATE_OF[j]] == _DROP:
                sound = sound & (closed == 0)
        weight = tl.load(weights_ptr + i * len(TERMS) + COLUMNS[j]) + tl.zeros_like(z)
        use = inside & (closed == 0) & (weight != 0.0)  # a row of weight 0 is not even read
        _, v, known = _read(tracks, strides, index_ptr, shifts_ptr, i, n, at, use, TERMS[j], SHIFTED)
        z += tl.where(use, v * weight, 0.0)
        sound = sound & (known | (use == 0))
    z = tl.where(sound & (tl.abs(z) < float("inf")), z, -float("inf"))
    allowed = _allowed(bits_ptr, mask_of_ptr, i, at, inside, words, MASKED)
    if FLOOR >= 0:
        _, v, known = _read(tracks, strides, index_ptr, shifts_ptr, i, n, at, inside, FLOOR, SHIFTED)
        usable = allowed & (z > -float("inf")) & known
        best_ptr = parts_ptr + (4 * n.to(tl.int64) + i) * chunks
        tl.store(best_ptr + chunk, tl.max(tl.where(usable, v, -float("inf")), axis=0))
        tl.store(z_ptr + i * width + at, z, mask=inside)
    else:
        _settle(z, allowed, z_ptr, parts_ptr, i, n, chunk, chunks, at, inside, width)


@triton.jit(do_not_specialize=["n"])
def _floor_kernel(
    tracks, strides, index_ptr, shifts_ptr, ratios_ptr, bits_ptr, mask_of_ptr, z_ptr, parts_ptr,
    n, width, chunks, words,
    FLOOR: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    i, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, parts = chunk * BLOCK + tl.arange(0, BLOCK), tl.arange(0, CHUNKS)
    inside = at < width
    bests = tl.load(parts_ptr + (4 * n.to(tl.int64) + i) * chunks + parts, mask=parts < chunks, other=-float("inf"))
    least = tl.max(bests, axis=0) + tl.load(ratios_ptr + i)
    _, v, known = _read(tracks, strides, index_ptr, shifts_ptr, i, n, at, inside, FLOOR, SHIFTED)
    z = tl.load(z_ptr + i * width + at, mask=inside, other=-float("inf"))
    z = tl.where(tl.where(known, v, -float("inf")) < least, -float("inf"), z)
    allowed = _allowed(bits_ptr, mask_of_ptr, i, at, inside, words, MASKED)
    _settle(z, allowed, z_ptr, parts_ptr, i, n, chunk, chunks, at, inside, width)


@triton.jit(do_not_specialize=["n"])
def _finish_kernel(
    z_ptr, parts_ptr, best_ptr, lse_ptr, start_ptr, ids_ptr, add_ptr, times_ptr, relative_ptr, n, width, chunks,
    EDITED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    part, step = parts_ptr + i * chunks, n.to(tl.int64) * chunks
    best, lse = joined(part, part + step, chunks, CHUNKS)
    tl.store(best_ptr + i, best)
    tl.store(lse_ptr + i, lse)
    if EDITED:
        best, lse = joined(part + 2 * step, part + 3 * step, chunks, CHUNKS)
        shift = tl.where((tl.load(relative_ptr + i) != 0) & (lse > -float("inf")), lse, 0.0)
        end = tl.load(start_ptr + i + 1)
        for begin in range(tl.load(start_ptr + i), end, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            place = z_ptr + i * width + tl.load(ids_ptr + at, mask=at < end, other=0)
            old = tl.load(place, mask=at < end, other=0.0)
            times = tl.load(times_ptr + at, mask=at < end, other=1.0)
            v = old - shift
            v = tl.where(v > 0, v / times, v * times) + shift
            new = tl.where(times == 1.0, old, v) + tl.load(add_ptr + at, mask=at < end, other=0.0)
            tl.store(place, new, mask=at < end)


def mix(
    tracks: Sequence[Tensor],
    index: Tensor,
    width: int,
    weights: Tensor,
    terms: Sequence[int],
    shifts: Tensor | None = None,
    gate_of: Sequence[int] | None = None,
    gates: Gates | None = None,
    floor: tuple[int, Tensor] | None = None,
    bits: Tensor | None = None,
    mask_of: Tensor | None = None,
    edits: Edits | None = None,
    hide: bool = True,
    *,
    kernel: bool | None = None,
) -> Mixed:
    """Row i of z from rows index[:, i] of T tracks.

    tracks: [R_t, V_t] each, fp32, bf16 or fp16; index [T, n] int32 or int64. weights [n, J] fp32 of J terms, `terms`
    the track of each. shifts [T, n] fp32: taken from the tracks' rows (`row_stats`). gate_of: of each term its gate, or
    -1. floor: (track, log of the ratio [n] fp32, -inf for rows without). bits [M, at least W / 32] int32 and mask_of
    [n] int32, -1 for rows without: id v is allowed if bit v % 32 of word v // 32 is set. hide False: masks say where
    the floor's best token is looked for, and are not applied. Raises ValueError if the shapes do not fit.
    """
    n = index.shape[1]
    if index.shape[0] != len(tracks) or weights.shape != (n, len(terms)) or any(x.shape[1] < width for x in tracks):
        raise ValueError(f"mix: {len(tracks)} tracks, index {tuple(index.shape)}, weights {tuple(weights.shape)}")
    if (bits is None) != (mask_of is None) or (bits is not None and 32 * bits.shape[1] < width):
        raise ValueError("mix: masks and the numbers of the rows' masks do not fit")
    if not on_kernel(weights, kernel):
        return mix_reference(
            tracks, index, width, weights, terms, shifts, gate_of, gates, floor, bits, mask_of, edits, hide
        )
    words = 0 if bits is None else bits.shape[1]
    order = _order(terms, gate_of)
    gates = gates or Gates((), (), weights, weights)
    rows = tuple(x if x.stride(1) == 1 else x.contiguous() for x in tracks)
    block = min(CHUNK, power_of_two(width, 32))
    chunks = triton.cdiv(width, block)
    z, parts = torch.empty(n, width, device=weights.device), torch.empty(5, n, chunks, device=weights.device)
    best, lse = torch.empty(2, n, device=weights.device)
    if not n:
        return Mixed(z, best, lse)
    unused: Any = weights  # where a kernel takes a pointer that it will not follow
    strides = tuple(x.stride(0) for x in rows)
    given = (rows, strides, index.contiguous(), unused if shifts is None else shifts.contiguous())
    masks = (unused, unused) if bits is None or mask_of is None else (bits.contiguous(), mask_of.contiguous())
    of = tuple(gate_of[j] if gate_of else -1 for j in order)
    _mix_kernel[(n, chunks)](
        *given, weights.contiguous(), gates.least.contiguous(), gates.last.contiguous(), *masks, z, parts,
        n, width, chunks, words,
        tuple(terms[j] for j in order), tuple(order), of, tuple(gates.tracks), tuple(gates.outside),
        -1 if floor is None else floor[0], shifts is not None, bits is not None and (hide or floor is not None), block,
    )  # fmt: skip
    if floor is not None:
        _floor_kernel[(n, chunks)](
            *given, floor[1].contiguous(), *masks, z, parts, n, width, chunks, words,
            floor[0], shifts is not None, bits is not None and hide, block, power_of_two(chunks),
        )  # fmt: skip
    changes, size = (unused,) * 5 if edits is None else [x.contiguous() for x in edits], power_of_two(chunks)
    _finish_kernel[(n,)](z, parts, best, lse, *changes, n, width, chunks, edits is not None, size, 256)
    return Mixed(z, best, lse)
