"""Where a row's top-k, top-p and min-p cut: each keeps a prefix of the order (value descending, id ascending).

    least, last = value of the last kept token, and the highest id that is kept among the tokens of that value
    total       = log sum of exp((z - best) / T) over the kept tokens

Top-k first, then the shortest prefix of what it keeps with top_p of that mass, the crossing token included (Holtzman
et al. 2020, arXiv:1904.09751), then what is at least min_p times as likely as the best (Nguyen et al. 2024,
arXiv:2407.01082). Nothing is sorted. Floats are mapped to integers in the same order, and the edge is searched among
these: each pass weighs what is above each of 8 pivots, and once few tokens lie between two of them they are listed and
searched there.

Launches: 1, a program a row. Reads of the row: 1 without truncation, at T = 0 and for top_k 1; 3 with top-k, top-p or
both, 2 if the row's maximum is given: the first pivots then lie below it, and the lowest of them finds all of the mass;
1 more with min-p. Flat rows take more: one for each time that more than 2048 tokens lie between two pivots, one for
ties that do not fit the list, and top-p behind a top-k above 2048 is a search of its own. Reads after the first come
from the L2 cache while the rows at work fit it (50 MB).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two
from triton_kernels.floats import finite_or_0, image, value_of, weight_of

Tensor = torch.Tensor
_LIST = 2048
_LOWEST, _INFINITE = tl.constexpr(-2139095040), tl.constexpr(2139095040)  # images of the lowest float and of infinity
COLDEST = 1e-30  # a temperature below it is this one: fp32 has no smaller number worth dividing by


class Cutoffs(NamedTuple):
    """Of n rows: least [n] fp32, last [n] int32, best [n] fp32 the maximum, total [n] fp32.

    Token v is kept if z[v] is finite and z[v] > least, or z[v] == least and v <= last. Rows without truncation have
    least -inf and last `width`; with min-p, least may be a bound between two tokens' values. A row of nothing finite
    has best and total -inf. prob [n] fp32: of the `chosen` ids, if asked for: exp((z - best) / T - total) or 0.
    """

    least: Tensor
    last: Tensor
    best: Tensor
    total: Tensor
    prob: Tensor | None = None


def cutoffs_reference(
    source: Tensor,
    index: Tensor,
    width: int,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    chosen: Tensor | None = None,
) -> Cutoffs:
    """See `cutoffs`; by sorting, in fp64."""
    z = source[index.long(), :width].float()  # [n, W]
    odd = ((z != z) | (z == torch.inf)).any(1, keepdim=True)
    z = z.masked_fill(~torch.isfinite(z), -torch.inf)
    values, ids = z.sort(dim=1, descending=True, stable=True)
    best, empty = values[:, :1], values[:, :1] == -torch.inf
    greedy = temperature[:, None] == 0
    k = torch.where(greedy, 1, top_k[:, None])
    scale = torch.where(greedy, 1.0, temperature[:, None].clamp_min(COLDEST)).double()
    d = (values.double() - best.clamp_min(-3e38)) / scale
    keep = values > -torch.inf
    plain = (((k == 0) | (k >= keep.sum(1, keepdim=True))) & (top_p[:, None] >= 1) & (min_p[:, None] <= 0)) | odd
    rank = torch.arange(width, device=z.device)[None]
    keep &= odd | (k == 0) | (rank < k)
    mass = d.exp() * keep
    before = mass.cumsum(1) - mass
    keep &= odd | (top_p[:, None] >= 1) | (rank == 0) | (before < top_p[:, None].double() * mass.sum(1, keepdim=True))
    keep &= odd | (d >= min_p[:, None].double().log().clamp_max(0.0))
    at = (keep.sum(1, keepdim=True) - 1).clamp_min(0)
    least = values.gather(1, at).masked_fill(plain | empty, -torch.inf)[:, 0]
    last = ids.gather(1, at).masked_fill(plain | empty, width)[:, 0].int()
    mass, prob = d.exp() * keep, None
    if chosen is not None:
        prob = ((mass * (ids == chosen[:, None])).sum(1) / mass.sum(1).clamp_min(1e-37)).float()
    return Cutoffs(least, last, best[:, 0], mass.sum(1).log().float(), prob)


@triton.jit
def _read(row, start, width, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    return tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)


@triton.jit
def _survey(row, width, scale, BLOCK: tl.constexpr):
    """(best, its lowest id, all mass, how many finite, the lowest that is no mask, whether NaN or +inf is there)."""
    tops, firsts = tl.full([BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    sums, lows = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("inf"), tl.float32)
    finite, odd = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, width, BLOCK, num_stages=6):
        x = _read(row, start, width, BLOCK)
        bad = (x != x) | (x == float("inf"))
        odd += bad.to(tl.int32)
        x = tl.where(bad, -float("inf"), x)
        finite += (x > -float("inf")).to(tl.int32)
        lows = tl.where(x > -1e4, tl.minimum(lows, x), lows)
        firsts = tl.where(x > tops, start + tl.arange(0, BLOCK), firsts)
        higher = tl.maximum(tops, x)
        base = finite_or_0(higher)
        sums = sums * weight_of(tops, base, scale) + weight_of(x, base, scale)
        tops = higher
    best = tl.max(tops, axis=0)
    first = tl.min(tl.where(tops == best, firsts, width), axis=0)
    mass = tl.sum(sums * weight_of(tops, finite_or_0(best), scale), axis=0)
    low = tl.minimum(tl.min(lows, axis=0), finite_or_0(best))
    return best, first, mass, tl.sum(finite, axis=0), low, tl.sum(odd, axis=0) > 0


@triton.jit
def _pivots(turn, lo, hi, best, low, PIVOTS: tl.constexpr):
    """[PIVOTS] images strictly between lo and hi (int64)."""
    j = tl.arange(0, PIVOTS)
    down, up = (j + 1).to(tl.float32) / PIVOTS, (j + 1).to(tl.float32) / (PIVOTS + 1)
    dense = best - (best - low) * down * down  # the edge is mostly near the best
    even = value_of(lo) * (1 - up) + value_of(hi - 1) * up
    sure = lo + 1 + (hi - lo - 2) * j.to(tl.int64) // (PIVOTS - 1)  # ends whatever the values are
    pivots = tl.where(turn < 3, image(tl.where(turn == 0, dense, even)).to(tl.int64), sure)
    return tl.minimum(tl.maximum(pivots, lo + 1), hi - 1)


@triton.jit
def _first_pivots(best, unit, by_mass, PIVOTS: tl.constexpr):
    """[PIVOTS] images (int64) below a best whose row is not known: mostly dense where the edge mostly is, then all."""
    j = tl.arange(0, PIVOTS)
    down = tl.where(by_mass, tl.where(j < PIVOTS - 2, 3.0 + 2.0 * j, 87.0), 4.0 * tl.exp2(0.5 * j))
    return tl.where(j < PIVOTS - 1, image(best - down * unit).to(tl.int64), _LOWEST)


@triton.jit
def _narrow(pivots, masses, counts, weighs, target, lo, hi, at_lo, at_hi, mass_hi):
    """(lo, hi, tokens from lo up, from hi up, mass from hi up) by what is above the pivots; lo reaches in any case."""
    reaches = (tl.where(weighs, masses, counts.to(tl.float32)) >= target) | (pivots <= lo)
    lo = tl.maximum(lo, tl.max(tl.where(reaches, pivots, lo), axis=0))
    hi = tl.minimum(hi, tl.min(tl.where(reaches, hi, pivots), axis=0))
    at_lo = tl.minimum(at_lo, tl.min(tl.where(reaches, counts, at_lo), axis=0))
    at_hi = tl.maximum(at_hi, tl.max(tl.where(reaches, 0, counts), axis=0))
    return lo, hi, at_lo, at_hi, tl.maximum(mass_hi, tl.max(tl.where(reaches, 0.0, masses), axis=0))


@triton.jit
def _weigh(row, width, pivots, best, scale, PIVOTS: tl.constexpr, BLOCK: tl.constexpr):
    """(mass, count) of the tokens from each pivot up: [PIVOTS] fp32 and int32."""
    cut = pivots.to(tl.int32)[:, None]
    masses, counts = tl.zeros([PIVOTS, BLOCK], tl.float32), tl.zeros([PIVOTS, BLOCK], tl.int32)
    for start in tl.range(0, width, BLOCK, num_stages=6):
        x = _read(row, start, width, BLOCK)
        above = image(x)[None, :] >= cut
        masses += tl.where(above, weight_of(x, best, scale)[None, :], 0.0)
        counts += above.to(tl.int32)
    return tl.sum(masses, axis=1), tl.sum(counts, axis=1)


@triton.jit
def _list(row, width, lo, end, values_ptr, ids_ptr, BLOCK: tl.constexpr):
    """Write the tokens with images in [lo, end), by ascending id; returns how many."""
    size = tl.full([], 0, tl.int32)
    for start in tl.range(0, width, BLOCK, num_stages=6):
        x = _read(row, start, width, BLOCK)
        inside = (image(x) >= lo) & (image(x) < end)
        more = tl.sum(inside.to(tl.int32), axis=0)
        if more > 0:
            to = size + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            tl.store(values_ptr + to, x, mask=inside)
            tl.store(ids_ptr + to, start + tl.arange(0, BLOCK), mask=inside)
            size += more
    tl.debug_barrier()  # other threads will read it
    return size


@triton.jit
def _nth_equal(row, width, value, n, BLOCK: tl.constexpr):
    """Id of the n-th token, n >= 1, whose value is `value`."""
    seen, start, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    while (start < width) & (seen < n):
        same = (_read(row, start, width, BLOCK) == value).to(tl.int32)
        nth = (same > 0) & (seen + tl.cumsum(same, axis=0) == n)
        last = tl.maximum(last, tl.max(tl.where(nth, start + tl.arange(0, BLOCK), 0), axis=0))
        seen += tl.sum(same, axis=0)
        start += BLOCK
    return last


@triton.jit
def _cutoffs_kernel(
    z_ptr, index_ptr, temperature_ptr, k_ptr, top_p_ptr, min_p_ptr, values_ptr, ids_ptr,
    least_ptr, last_ptr, best_ptr, total_ptr, chosen_ptr, prob_ptr, known_ptr, width, stride,
    CHOSEN: tl.constexpr, KNOWN: tl.constexpr, COLDEST: tl.constexpr, LIST: tl.constexpr, PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = z_ptr + tl.load(index_ptr + i).to(tl.int64) * stride
    temperature, k = tl.load(temperature_ptr + i), tl.load(k_ptr + i)
    top_p, min_p = tl.load(top_p_ptr + i), tl.load(min_p_ptr + i)
    scale = tl.where(temperature == 0.0, 1.0, tl.maximum(temperature, COLDEST))
    slot, in_list = i * LIST + tl.arange(0, LIST), tl.arange(0, LIST)

    # What is kept: the tokens above `edge` (an image) and the `ties` lowest ids at it; `reach` tokens are at or above.
    greedy = (temperature == 0.0) | (k == 1)
    pivots = tl.full([PIVOTS], _INFINITE, tl.int64)  # of the first pass, if it had any: above these nothing is weighed
    masses, counts = tl.zeros([PIVOTS], tl.float32), tl.zeros([PIVOTS], tl.int32)
    known = tl.load(known_ptr + i) if KNOWN else -float("inf")
    quick = (tl.abs(known) < float("inf")) & (greedy == 0) & ((k > 0) | (top_p < 1.0))
    if quick:
        best, first, low, odd = known, tl.full([], 0, tl.int32), known - 2048.0, tl.full([], 0, tl.int1)
        pivots = _first_pivots(best, tl.where(k > 0, 1.0, scale), k <= 0, PIVOTS)
        masses, counts = _weigh(row, width, pivots, best, scale, PIVOTS, BLOCK)
        mass, count = tl.max(masses, axis=0), tl.max(counts, axis=0)
    else:
        best, first, mass, count, low, odd = _survey(row, width, scale, BLOCK)
    top = finite_or_0(best)
    least, last = tl.full([], -float("inf"), tl.float32), tl.full([], 0, tl.int32) + width
    edge, ties, reach = tl.full([], _LOWEST, tl.int64), count, count
    base, base_mass = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)  # what is better than all of the list
    size = tl.full([], -1, tl.int32)  # of the list; -1: there is none
    searched = (odd == 0) & (count > 0) & (greedy == 0)
    for by_mass in tl.range(0, 2):
        weighs = by_mass == 1
        if searched & ((weighs & (top_p < 1.0)) | ((by_mass == 0) & (k > 0) & (k < count))):
            target = tl.where(weighs, tl.maximum(top_p * mass, 1e-37), k.to(tl.float32))
            # The tokens from `lo` up reach the target, those from `hi` up do not.
            lo, hi, at_lo, at_hi = edge, image(top).to(tl.int64) + 1, reach, tl.full([], 0, tl.int32)
            mass_hi = tl.full([], 0.0, tl.float32)
            bottom = tl.where(weighs, tl.maximum(low, top - 87.0 * scale), low)
            size = tl.where(base > 0, -1, size)  # the last list began below some of what is kept
            if size < 0:
                lo, hi, at_lo, at_hi, mass_hi = _narrow(
                    pivots, masses, counts, weighs, target, lo, hi, at_lo, at_hi, mass_hi
                )
            turn = tl.where(quick & (lo > _LOWEST), 1, 0)
            while (size < 0) & (hi - lo > 1) & (at_lo - at_hi > LIST):
                between = _pivots(turn, lo, hi, top, bottom, PIVOTS)
                more, more_counts = _weigh(row, width, between, top, scale, PIVOTS, BLOCK)
                lo, hi, at_lo, at_hi, mass_hi = _narrow(
                    between, more, more_counts, weighs, target, lo, hi, at_lo, at_hi, mass_hi
                )
                turn += 1
            if (size < 0) & (at_lo - at_hi <= LIST):
                whole = at_lo <= LIST  # all that is better fits as well, and serves the search that may follow
                end = tl.where(whole, image(top).to(tl.int64) + 1, hi)
                base, base_mass = tl.where(whole, 0, at_hi), tl.where(whole, 0.0, mass_hi)
                size = _list(row, width, lo, end, values_ptr + i * LIST, ids_ptr + i * LIST, BLOCK)
            x = tl.load(values_ptr + slot, mask=in_list < size, other=-float("inf"))
            images, weights = image(x), weight_of(x, top, scale)
            if size >= 0:
                if weighs:  # the order of a sum changes it: what is left must reach the target
                    target = tl.minimum(target, base_mass + tl.sum(tl.where(images >= lo, weights, 0.0), axis=0))
                while hi - lo > 1:
                    middle = lo + (hi - lo) // 2
                    at_middle = base + tl.sum((images >= middle).to(tl.int32), axis=0)
                    mass_middle = base_mass + tl.sum(tl.where(images >= middle, weights, 0.0), axis=0)
                    reached = tl.where(weighs, mass_middle, at_middle.to(tl.float32)) >= target
                    lo, hi = tl.where(reached, middle, lo), tl.where(reached, hi, middle)
                    at_lo, at_hi = tl.where(reached, at_middle, at_lo), tl.where(reached, at_hi, at_middle)
                    mass_hi = tl.where(reached, mass_hi, mass_middle)
            least = value_of(lo)
            one = weight_of(least, top, scale)
            wanted = tl.where(weighs, (target - mass_hi) / tl.maximum(one, 1e-30), target - at_hi)
            limit = tl.where(lo == edge, tl.minimum(ties, at_lo - at_hi), at_lo - at_hi)
            ties = tl.minimum(tl.maximum(tl.ceil(tl.minimum(wanted, 1e9)).to(tl.int32), 1), limit)
            mass = mass_hi + ties.to(tl.float32) * one
            edge, reach = lo, at_lo
            if size >= 0:
                same = images == lo
                nth = same & (tl.cumsum(same.to(tl.int32), axis=0) == ties)
                last = tl.max(tl.load(ids_ptr + slot, mask=nth, other=0), axis=0)
            else:
                last = _nth_equal(row, width, least, ties, BLOCK)

    if greedy & (count > 0) & (odd == 0):
        least, last, mass = best, first, tl.full([], 1.0, tl.float32)
    if searched & (min_p > 0.0):
        bound = top + tl.minimum(tl.log(min_p), 0.0) * scale
        if bound > least:
            above, _ = _weigh(row, width, image(bound).to(tl.int64) + tl.zeros([1], tl.int64), top, scale, 1, BLOCK)
            least, last, mass = bound, tl.full([], 0, tl.int32) + width, tl.sum(above, axis=0)
    tl.store(least_ptr + i, least)
    tl.store(last_ptr + i, last)
    tl.store(best_ptr + i, best)
    tl.store(total_ptr + i, tl.where(count > 0, tl.log(tl.maximum(mass, 1e-37)), -float("inf")))
    if CHOSEN:
        chosen = tl.load(chosen_ptr + i)
        x = tl.load(row + chosen, mask=(chosen >= 0) & (chosen < width), other=-float("inf")).to(tl.float32)
        keep = (tl.abs(x) < float("inf")) & ((x > least) | ((x == least) & (chosen <= last)))
        one = weight_of(tl.where(keep, x, top), top, scale)
        tl.store(prob_ptr + i, tl.where(keep, one / tl.maximum(mass, 1e-37), 0.0))


def cutoffs(
    source: Tensor,
    index: Tensor,
    width: int,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    chosen: Tensor | None = None,
    best: Tensor | None = None,
    *,
    kernel: bool | None = None,
) -> Cutoffs:
    """The cuts of rows `index` of `source`, of their first `width` tokens.

    source [R, V] fp32, bf16 or fp16, index [n] int32 or int64; of each of the n rows temperature [n] fp32 (0: only the
    best token is kept), top_k [n] int32 (0: none), top_p [n] fp32 (1: none), min_p [n] fp32 (0: none). Nothing is cut
    from a row that holds NaN or +inf; its best and total are of its finite tokens. chosen [n] int32: ids, -1 for none,
    whose probabilities are wanted. best [n] fp32: the rows' maxima, NaN where they are not known; rows whose maximum is
    given hold nothing but finite numbers and -inf. Raises ValueError if the shapes do not fit.
    """
    params, given = (temperature, top_k, top_p, min_p), () if best is None else (best,)
    if source.dim() != 2 or not 0 < width <= source.shape[1] or any(x.shape != index.shape for x in (*params, *given)):
        raise ValueError(f"cutoffs: source {tuple(source.shape)}, width {width} and parameters do not fit")
    if not on_kernel(source, kernel):
        return cutoffs_reference(source, index, width, *params, chosen)
    source = source if source.stride(1) == 1 else source.contiguous()
    index, n, device = index.contiguous(), index.shape[0], source.device
    least, top, total, prob = torch.empty(4, n, device=device)
    last = torch.empty(n, dtype=torch.int32, device=device)
    values = torch.empty(n, _LIST, device=device)
    ids = torch.empty(n, _LIST, dtype=torch.int32, device=device)
    if n:
        _cutoffs_kernel[(n,)](
            source, index, *(x.contiguous() for x in params), values, ids, least, last, top, total,
            last if chosen is None else chosen.contiguous(), prob, top if best is None else best.contiguous(),
            width, source.stride(0), chosen is not None, best is not None,
            COLDEST, _LIST, 8, min(1024, power_of_two(width, 32)), num_warps=16,
        )  # fmt: skip
    return Cutoffs(least, last, top, total, None if chosen is None else prob)
