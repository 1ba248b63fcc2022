"""Which tokens a truncation keeps: top-k, top-p and min-p over rows, exactly, ties to the lower id.

On CPUs a kernel searches for the edge of each kept set. Elsewhere short lists of candidates decide nearly every row,
and a row that keeps more than fit is settled by sorting its values; that code is the kernel's specification.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from decoding.core import Sampling
from decoding.host_build import load_kernels

_CANDIDATES = 128  # kept sets are nearly always smaller
_NO_K = 1 << 62


def truncate(z: torch.Tensor, params: Seq[Sampling]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The kept tokens of each row, best first: (values [n, m], -inf beyond the kept ones; ids [n, m]; wide rows).

    Kept = the first k, then the shortest prefix of those whose probability reaches top_p (the crossing token
    included; Holtzman et al. 2020), then those at least min_p times as likely as the best (Nguyen et al. 2024).
    `wide` lists the rows that keep too many for a short list: theirs is `keep_rows`.
    """
    edges = _edges(z, params)
    if edges is None:
        return listed(z, params)
    most = min(z.shape[1], _CANDIDATES)
    values, ids, counts = torch.ops.trimtab.kept_lists(z.contiguous(), *edges, most)
    return values, ids, (counts > most).nonzero()[:, 0].tolist()


def keep_rows(z: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """The rows z [n, W] with everything that `params` truncate at -inf: what `truncate` keeps, however many ids."""
    edges = _edges(z, params)
    if edges is None:
        return torch.stack([keep_sorted(row, p) for row, p in zip(z, params, strict=True)])
    z = z.contiguous()
    return torch.ops.trimtab.cut_rows(z, z, *edges)  # type: ignore[no-any-return]


def keep_mask(row: torch.Tensor, p: Sampling) -> torch.Tensor:
    """`keep_rows` of one row [W]."""
    return keep_rows(row[None], [p])[0]


def top_p_mask(lp: torch.Tensor, top_p: Seq[float]) -> torch.Tensor:
    """The top-p set of each row of log-probs lp [n, W] at temperature 1, the crossing token included: [n, W] bool.

    All of a row that holds NaN or +inf or no finite number: whatever uses it will see them.
    """
    params = [Sampling(top_p=p) for p in top_p]
    edges = _edges(lp, params)
    return top_p_listed(lp, params) if edges is None else ~_beyond(lp, *edges)


def cut_below(z: torch.Tensor, by: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """z [n, W] fp32 with -inf wherever `by` [n, W] fp32 is below `least` [n]."""
    # torch's own masking branches on every token, and on flat rows guesses wrong on half of them.
    if z.device.type == "cpu" and z.dtype == by.dtype == torch.float32 and load_kernels():
        last = torch.full(least.shape, z.shape[1])
        return torch.ops.trimtab.cut_rows(z.contiguous(), by.contiguous(), least.float().contiguous(), last)  # type: ignore[no-any-return]
    return z.masked_fill(by < least[:, None], -torch.inf)


# -- by the kernel ----------------------------------------------------------------------------------------------------


def kernel_edges(
    rows: torch.Tensor, index: torch.Tensor, width: int, k: Seq[int], top_p: Seq[float], min_p: Seq[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept sets' edges: values of the last kept tokens [n] fp32, and the highest ids kept at them [n] int64.

    rows: [R, V] fp32 or bf16 on the CPU; index: [n] int64, which rows; of them the first `width` tokens.
    """
    limits = torch.tensor([top_p, min_p], dtype=torch.float64)  # [2, n]
    return torch.ops.trimtab.kept_edges(rows, index, width, torch.tensor(k), *limits)  # type: ignore[no-any-return]


def _edges(z: torch.Tensor, params: Seq[Sampling]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of the rows z [n, W]; None where the kernel does not apply: other devices and dtypes, no compiler."""
    if z.device.type != "cpu" or z.dtype != torch.float32 or z.stride(1) != 1 or not load_kernels():
        return None
    k, top_p, min_p = [min(p.top_k, _NO_K) for p in params], [p.top_p for p in params], [p.min_p for p in params]
    return kernel_edges(z, torch.arange(z.shape[0]), z.shape[1], k, top_p, min_p)


def _beyond(z: torch.Tensor, least: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """What the edges cut off of z: [n, W] bool."""
    ids = torch.arange(z.shape[1])[None]
    return (z < least[:, None]).logical_or_((z == least[:, None]).logical_and_(ids > last[:, None]))


# -- the specification ------------------------------------------------------------------------------------------------


def listed(z: torch.Tensor, params: Seq[Sampling]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """`truncate` by short lists of candidates."""
    width = z.shape[1]
    most = min(width, _CANDIDATES)
    values, ids = top_stable(z, most)
    kept = kept_counts(values, torch.logsumexp(z - values[:, :1], 1), params)  # [n]
    # A kept set that reaches the last candidate's value may go on beyond it, and top-p is of all that top-k keeps.
    edge = (values.gather(1, (kept - 1)[:, None])[:, 0] == values[:, -1]).tolist()
    far = [p.top_k > most and p.top_p < 1.0 for p in params]
    wide = [i for i in range(len(params)) if most < width and (edge[i] or far[i])]
    beyond = torch.arange(most, device=z.device)[None] >= kept[:, None]
    return values.masked_fill(beyond, -torch.inf), ids, wide


def keep_sorted(row: torch.Tensor, p: Sampling) -> torch.Tensor:
    """`keep_rows` of one row [W] by sorting it."""
    # Only values are sorted: numpy does that an order of magnitude faster than a stable sort with indices.
    if row.device.type == "cpu":
        values = torch.from_numpy(np.sort(-row.numpy())).neg_()
    else:
        values = torch.sort(row, descending=True).values
    kept = int(kept_counts(values[None], torch.logsumexp(row - values[0], 0)[None], [p])[0])
    ids = first_ids(row, values[kept - 1], kept)
    return torch.full_like(row, -torch.inf).index_copy_(0, ids, row[ids])


def first_ids(row: torch.Tensor, least: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` best of a row [W] whose count-th best value is `least`; equal values: the lower ids."""
    above = (row > least).nonzero()[:, 0]
    return torch.cat([above, (row == least).nonzero()[: count - len(above), 0]])


def kept_counts(values: torch.Tensor, total: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """How many of the descending `values` [n, m] are kept, [n] int64.

    total: [n] log-sum-exp of the whole rows less their best value.
    """
    values = values.double() - values[:, :1]  # large numbers would swallow the logarithm of a sum
    device, m = values.device, values.shape[1]
    rank = torch.arange(m, device=device)[None]
    k = torch.tensor([min(p.top_k, _NO_K) or _NO_K for p in params], device=device)[:, None]
    in_k = (rank < k) & torch.isfinite(values)
    head = torch.logsumexp(values.masked_fill(~in_k, -torch.inf), 1)
    norm = torch.where(k[:, 0] < _NO_K, head, total)[:, None]
    probs = torch.exp(values - norm).masked_fill(~in_k, 0.0)
    limits = torch.tensor([[p.top_p, p.min_p] for p in params], device=device, dtype=torch.float64)  # [n, 2]
    top_p, min_p = limits[:, :1], limits[:, 1:]
    before = probs.cumsum(1) - probs  # mass of the better ones
    keep = in_k & ((before < top_p) | (top_p >= 1.0))
    keep &= values >= min_p.log()  # in logs: exp would round what is nearly 1 to it
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


def top_p_listed(lp: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """`top_p_mask` by short lists of candidates."""
    values, _, wide = listed(lp, params)
    counts = torch.isfinite(values).sum(1).clamp_min(1)
    least = values.gather(1, (counts - 1)[:, None])  # [n, 1]
    mask = lp >= least
    for row in (mask.sum(1) != counts).nonzero()[:, 0].tolist():  # ties at the edge
        mask[row] = False
        mask[row, first_ids(lp[row], least[row, 0], int(counts[row]))] = True
    for row in wide:
        mask[row] = torch.isfinite(keep_sorted(lp[row], params[row]))
    return mask | ~torch.isfinite(lp.amax(1, keepdim=True))
