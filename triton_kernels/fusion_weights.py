"""Dynamic fusion's weights: for each row the expert i and the alpha that steer the base as far as the experts went.

With P the base, Q the small model, Q_t the experts and P~ ~ P exp(a d_i), d_i = log Q_i - log Q centred under P:

    A(a) = log E_P[exp(a d_i)],  f(a) = KL(P~, P) = a A'(a) - A(a),  g(a) = KL(P, P~) = A(a)
    (i, a) = argmin (f - F)^2 + (g - G)^2,  F = mean_t KL(Q_t, Q),  G = mean_t KL(Q, Q_t)

over experts and a in {0, step, .., max_alpha} (Fan et al. 2024, arXiv:2406.15480, section 3.3; up to a constant the
paper's sum over experts). Ties go to the smaller a, then the earlier expert. f and g grow with a, which bounds the loss
within a cell of the grid from below: `refine` tries 8 points in each expert's two most promising cells and takes what
is strictly better. Tokens that some row cannot say are left out of all rows, and the rest is renormalised.

Launches: 3 that read every row once, (2 + m) n V values, for all rows and experts: the sums behind F, G and the
centres; the moments E_P[exp(a d)] and E_P[exp(a d) d] at all grid points; the same at the finer points, of rows that
have any. After each, one that joins its parts in fp64; between them about 50 of torch's on a few numbers a row. Nothing
waits for the device. The second pass takes an exponential a token and grid point; by an H100's rates (not measured)
these take about twice as long as its reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two

Tensor = torch.Tensor
Divergences = Callable[[Tensor], tuple[Tensor, Tensor]]
"""alphas [n or 1, m, K], negative where there is nothing to try -> f and g [n, m, K], of any value there."""

_PART = 2048  # tokens a program of the sums
_TILE = 1024  # tokens a program of the moments, by _CELL points: two programs fit a multiprocessor's registers
_CELL = 8  # points that are tried at once, and within a cell


def fusion_weights_reference(
    base: Tensor, small: Tensor, experts: Sequence[Tensor], max_alpha: float, step: float, refine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fusion_weights`; in the rows' own dtype."""
    usable = torch.stack([torch.isfinite(row) for row in (base, small, *experts)]).all(0)  # [n, V]

    def normalised(row: Tensor) -> Tensor:
        return torch.log_softmax(row.masked_fill(~usable, -torch.inf), 1).masked_fill(~usable, 0.0)

    p, q = torch.exp(normalised(base)) * usable, normalised(small)
    p = p / p.sum(1, keepdim=True)
    f, g, deltas = [], [], []
    for row in experts:
        t = normalised(row)
        d = t - q  # [n, V]
        f.append((torch.exp(t) * usable * d).sum(1))
        g.append(-(torch.exp(q) * usable * d).sum(1))
        deltas.append(d - (p * d).sum(1, keepdim=True))

    def divergences(alphas: Tensor) -> tuple[Tensor, Tensor]:
        a = alphas.expand(len(base), -1, -1)[..., None].to(base.dtype)  # [n, m, K, 1]
        d = torch.stack(deltas, 1)[:, :, None]  # [n, m, 1, V]
        exponents = torch.log(p)[:, None, None] + a * d
        level = torch.logsumexp(exponents, -1)  # [n, m, K]
        mean = (torch.exp(exponents - level[..., None]) * d).sum(-1)
        return a[..., 0] * mean - level, level

    return _solve(torch.stack(f).mean(0), torch.stack(g).mean(0), divergences, len(experts), max_alpha, step, refine)


@triton.jit
def _usable(base_ptr, small_ptr, expert_ptrs, base_stride, small_stride, expert_strides, row, at, inside):
    """Which tokens [PART] all rows can say, and what base and small give them; 0 for the others."""
    least, most = float("-inf"), float("inf")
    base = tl.load(base_ptr + row * base_stride + at, mask=inside, other=least).to(tl.float32)
    small = tl.load(small_ptr + row * small_stride + at, mask=inside, other=least).to(tl.float32)
    usable = (base > least) & (base < most) & (small > least) & (small < most)  # false for NaN too
    for i in tl.static_range(len(expert_ptrs)):
        expert = tl.load(expert_ptrs[i] + row * expert_strides[i] + at, mask=inside, other=least).to(tl.float32)
        usable = usable & (expert > least) & (expert < most)
    return usable, tl.where(usable, base, 0.0), tl.where(usable, small, 0.0)


@triton.jit
def _fusion_sums_kernel(
    base_ptr, small_ptr, expert_ptrs, base_stride, small_stride, expert_strides, tops_ptr, totals_ptr, means_ptr,
    width, PART: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    experts: tl.constexpr = len(expert_ptrs)
    at = part * PART + tl.arange(0, PART)
    usable, base, small = _usable(
        base_ptr, small_ptr, expert_ptrs, base_stride, small_stride, expert_strides, row, at, at < width
    )
    to = row * tl.num_programs(1) + part
    tops_ptr += to * (2 + experts)
    totals_ptr += to * (2 + experts)
    means_ptr += to * (3 * experts)
    # The least that is still finite where a part holds no usable token: its scale is 0 when parts are joined.
    least = -1e38
    base_top = tl.max(tl.where(usable, base, least), 0)
    small_top = tl.max(tl.where(usable, small, least), 0)
    p = tl.exp(tl.where(usable, base - base_top, -1e30))
    q = tl.exp(tl.where(usable, small - small_top, -1e30))
    tl.store(tops_ptr, base_top)
    tl.store(tops_ptr + 1, small_top)
    tl.store(totals_ptr, tl.sum(p, 0))
    tl.store(totals_ptr + 1, tl.sum(q, 0))
    for i in tl.static_range(experts):  # the second load of an expert's part finds it in the cache
        expert = tl.load(expert_ptrs[i] + row * expert_strides[i] + at, mask=usable, other=0.0).to(tl.float32)
        top = tl.max(tl.where(usable, expert, least), 0)
        t = tl.exp(tl.where(usable, expert - top, -1e30))
        # Relative to the tops: offsets of raw logits, which would swamp d, wait for fp64.
        d = (expert - top) - (small - small_top)
        tl.store(tops_ptr + 2 + i, top)
        tl.store(totals_ptr + 2 + i, tl.sum(t, 0))
        tl.store(means_ptr + 3 * i, tl.sum(p * d, 0))
        tl.store(means_ptr + 3 * i + 1, tl.sum(q * d, 0))
        tl.store(means_ptr + 3 * i + 2, tl.sum(t * d, 0))


@triton.jit
def _joined(tops_ptr, totals_ptr, at, inside):
    """Of parts, in fp64: the scale [PARTS] of each to the common top, the total of all, and its logarithm in full."""
    tops = tl.load(tops_ptr + at, mask=inside, other=-1e38).to(tl.float64)
    top = tl.max(tops, 0)
    scale = tl.exp(tops - top)
    # No usable token at all makes 0, of which there is no logarithm.
    total = tl.maximum(tl.sum(scale * tl.load(totals_ptr + at, mask=inside, other=0.0), 0), 1e-300)
    return tops, scale, total, top + tl.log(total)


@triton.jit
def _fusion_targets_kernel(
    tops_ptr, totals_ptr, means_ptr, goals_ptr, level_ptr, centre_ptr, parts, EXPERTS: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, PARTS) < parts
    to = row * parts + tl.arange(0, PARTS)
    at = to * (2 + EXPERTS)
    _, p_scale, p_total, p_norm = _joined(tops_ptr, totals_ptr, at, inside)
    q_tops, q_scale, q_total, q_norm = _joined(tops_ptr, totals_ptr, at + 1, inside)
    p = p_scale * tl.load(totals_ptr + at, mask=inside, other=0.0)
    q = q_scale * tl.load(totals_ptr + at + 1, mask=inside, other=0.0)
    f, g = 0.0, 0.0
    for i in tl.static_range(EXPERTS):
        t_tops, t_scale, t_total, t_norm = _joined(tops_ptr, totals_ptr, at + 2 + i, inside)
        t = t_scale * tl.load(totals_ptr + at + 2 + i, mask=inside, other=0.0)
        offset = t_tops - q_tops  # what each part's d left out
        mean_at = means_ptr + (to * EXPERTS + i) * 3
        p_mean = tl.sum(p_scale * tl.load(mean_at, mask=inside, other=0.0) + p * offset, 0) / p_total
        q_mean = tl.sum(q_scale * tl.load(mean_at + 1, mask=inside, other=0.0) + q * offset, 0) / q_total
        t_mean = tl.sum(t_scale * tl.load(mean_at + 2, mask=inside, other=0.0) + t * offset, 0) / t_total
        f += (t_mean - (t_norm - q_norm)) / EXPERTS
        g += ((t_norm - q_norm) - q_mean) / EXPERTS
        tl.store(centre_ptr + row * EXPERTS + i, p_mean)
    tl.store(goals_ptr + row * 2, f)
    tl.store(goals_ptr + row * 2 + 1, g)
    tl.store(level_ptr + row, p_norm)


@triton.jit
def _fusion_moments_kernel(
    base_ptr, small_ptr, expert_ptrs, base_stride, small_stride, expert_strides, level_ptr, centre_ptr, alpha_ptr,
    alpha_stride, found_ptr, width, points, ALL: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    experts: tl.constexpr = len(expert_ptrs)
    alpha_ptr += row * alpha_stride
    every = tl.arange(0, ALL)
    if tl.max(tl.load(alpha_ptr + every, mask=every < experts * points, other=-1.0), 0) < 0:
        return  # nothing to try: the row costs no reads
    at = part * TILE + tl.arange(0, TILE)
    usable, base, small = _usable(
        base_ptr, small_ptr, expert_ptrs, base_stride, small_stride, expert_strides, row, at, at < width
    )
    base -= tl.load(level_ptr + row).to(tl.float32)
    found_ptr += (row * tl.num_programs(1) + part) * experts * 3 * points
    for i in tl.static_range(experts):
        expert = tl.load(expert_ptrs[i] + row * expert_strides[i] + at, mask=usable, other=0.0).to(tl.float32)
        d = expert - small - tl.load(centre_ptr + row * experts + i).to(tl.float32)
        for first in range(0, points, CELL):
            point = i * points + first + tl.arange(0, CELL)
            alpha = tl.load(alpha_ptr + point)  # [CELL]
            if tl.max(alpha, 0) >= 0:
                # A maximum for each point: with one for all, tokens far from the base underflow where they matter.
                exponent = tl.where(usable[None, :], base[None, :] + alpha[:, None] * d[None, :], -1e30)  # [CELL, TILE]
                top = tl.max(exponent, 1)
                tilted = tl.exp(exponent - top[:, None])
                to = found_ptr + 3 * i * points + first + tl.arange(0, CELL)
                tl.store(to, top)
                tl.store(to + points, tl.sum(tilted, 1))
                tl.store(to + 2 * points, tl.sum(tilted * d[None, :], 1))


@triton.jit
def _fusion_divergences_kernel(
    found_ptr, alpha_ptr, alpha_stride, level_ptr, centre_ptr, f_ptr, g_ptr, tiles, points, TILES: tl.constexpr,
    CELL: tl.constexpr,
):  # fmt: skip
    row, i, experts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    point = tl.program_id(2) * CELL + tl.arange(0, CELL)
    alpha = tl.load(alpha_ptr + row * alpha_stride + i * points + point).to(tl.float64)  # [CELL]
    to = (row * experts + i) * points + point
    if tl.max(alpha, 0) < 0:
        return
    tile = tl.arange(0, TILES)
    at = found_ptr + ((row * tiles + tile[:, None]) * experts + i) * 3 * points + point[None, :]  # [TILES, CELL]
    inside = (tile < tiles)[:, None]
    tops = tl.load(at, mask=inside, other=-1e38).to(tl.float64)
    top = tl.max(tops, 0)
    scale = tl.exp(tops - top[None, :])
    total = tl.sum(scale * tl.load(at + points, mask=inside, other=0.0), 0)
    mean = tl.sum(scale * tl.load(at + 2 * points, mask=inside, other=0.0), 0) / total
    # Level and centre were rounded for the moments.
    level, centre = tl.load(level_ptr + row), tl.load(centre_ptr + row * experts + i)
    left = centre.to(tl.float32).to(tl.float64) - centre
    g = top + tl.log(total) + (level.to(tl.float32).to(tl.float64) - level) + alpha * left
    tl.store(f_ptr + to, alpha * (mean + left) - g)
    tl.store(g_ptr + to, g)


def fusion_weights(
    base: Tensor,
    small: Tensor,
    experts: Sequence[Tensor],
    max_alpha: float,
    step: float,
    refine: bool,
    *,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha [n], expert [n] int64, loss [n]); alpha and loss in base's dtype, the loss without the paper's constant.

    base, small and each expert [n, V]: log-probs or logits, on one device; fp32, bf16 or fp16 for the kernels. Raises
    ValueError if the shapes do not fit or there is no expert.
    """
    if not experts or base.ndim != 2 or any(row.shape != base.shape for row in (small, *experts)):
        shapes = [tuple(row.shape) for row in (base, small, *experts)]
        raise ValueError(f"fusion_weights: base, small and at least one expert of one shape [n, V], not {shapes}")
    if not on_kernel(base, kernel):
        return fusion_weights_reference(base, small, experts, max_alpha, step, refine)
    if not base.numel():
        nothing = base.new_zeros(len(base))
        return nothing, nothing.long(), nothing.clone()
    rows = [row if row.stride(1) == 1 else row.contiguous() for row in (base, small, *experts)]
    f, g, divergences = _evidence(rows)
    alpha, expert, loss = _solve(f, g, divergences, len(experts), max_alpha, step, refine)
    return alpha.to(base.dtype), expert, loss.to(base.dtype)


def _evidence(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Divergences]:
    """F and G [n] in fp64, and the moments' launches."""
    n, width = rows[0].shape
    m, parts, tiles = len(rows) - 2, triton.cdiv(width, _PART), triton.cdiv(width, _TILE)
    device, strides = rows[0].device, tuple(row.stride(0) for row in rows)
    given = (rows[0], rows[1], tuple(rows[2:]), strides[0], strides[1], strides[2:])
    tops, means = torch.empty(n, parts, 2 + m, device=device), torch.empty(n, parts, m, 3, device=device)
    totals = torch.empty_like(tops)
    _fusion_sums_kernel[(n, parts)](*given, tops, totals, means, width, _PART, num_warps=8)
    goals = torch.empty(n, 2, device=device, dtype=torch.float64)
    level, centre = torch.empty_like(goals[:, 0]), goals.new_empty(n, m)
    _fusion_targets_kernel[(n,)](tops, totals, means, goals, level, centre, parts, m, power_of_two(parts))

    def divergences(alphas: Tensor) -> tuple[Tensor, Tensor]:
        cells = triton.cdiv(alphas.shape[2], _CELL)
        points = cells * _CELL
        padded = torch.nn.functional.pad(alphas.float(), (0, points - alphas.shape[2]), value=-1.0).contiguous()
        stride = 0 if len(padded) == 1 else m * points
        found = torch.empty(n, tiles, m, 3, points, device=device)
        _fusion_moments_kernel[(n, tiles)](
            *given, level, centre, padded, stride, found, width, points, power_of_two(m * points), _CELL, _TILE,
            num_warps=8,
        )  # fmt: skip
        f, g = torch.empty(2, n, m, points, device=device, dtype=torch.float64).unbind(0)
        _fusion_divergences_kernel[(n, m, cells)](
            found, padded, stride, level, centre, f, g, tiles, points, power_of_two(tiles), _CELL
        )
        return f[..., : alphas.shape[2]], g[..., : alphas.shape[2]]

    return goals[:, 0], goals[:, 1], divergences


def _solve(
    target_f: Tensor, target_g: Tensor, divergences: Divergences, m: int, max_alpha: float, step: float, refine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha, expert, loss), [n] each: the grid, and the cells that may hold better."""
    count = round(max_alpha / step) + 1
    points = torch.arange(count, device=target_f.device, dtype=target_f.dtype) * step
    f, g = divergences(points.expand(1, m, -1))  # [n, m, K]
    f_goal, g_goal = target_f[:, None, None], target_g[:, None, None]
    loss = (f - f_goal) ** 2 + (g - g_goal) ** 2
    best, at = loss.transpose(1, 2).flatten(1).min(1)  # alpha-major
    alpha, expert = points[at // m], at % m
    if not refine or count < 2:
        return alpha, expert, best
    bound = _cell_bound(f, f_goal) + _cell_bound(g, g_goal)  # [n, m, K - 1]
    low, cells = bound.topk(min(2, count - 1), dim=2, largest=False)  # [n, m, 2]
    useful = (low < best[:, None, None])[..., None]
    finer = step / (_CELL + 1)
    within = torch.arange(1, _CELL + 1, device=points.device, dtype=points.dtype) * finer
    tries = torch.where(useful, points[cells][..., None] + within, -1.0).flatten(2)  # [n, m, 16]
    f, g = divergences(tries)
    loss = torch.where(tries < 0, torch.inf, (f - f_goal) ** 2 + (g - g_goal) ** 2)
    tried, at = loss.flatten(1).min(1)  # expert-major
    better = tried < best
    alpha = torch.where(better, tries.flatten(1).gather(1, at[:, None])[:, 0], alpha)
    return alpha, torch.where(better, at // tries.shape[2], expert), torch.where(better, tried, best)


def _cell_bound(values: Tensor, goal: Tensor) -> Tensor:
    """Least squared distance of a growing function to its goal within each cell of the grid: [n, m, K - 1]."""
    return torch.maximum(values[..., :-1] - goal, goal - values[..., 1:]).clamp_min(0) ** 2
