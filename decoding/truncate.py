"""Which tokens a truncation keeps: top-k, top-p and min-p over rows, exactly, ties to the lower id.

Short lists of candidates decide nearly every row; a row that keeps more than fit is settled by sorting its values.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from decoding.core import Sampling

_CANDIDATES = 128  # kept sets are nearly always smaller; the rare larger one sorts its whole row


def truncate(z: torch.Tensor, params: Seq[Sampling]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The kept tokens of each row, best first: (values [n, m], -inf beyond the kept ones; ids [n, m]; wide rows).

    Kept = the first k, then the shortest prefix of those whose probability reaches top_p (the crossing token
    included; Holtzman et al. 2020), then those at least min_p times as likely as the best (Nguyen et al. 2024).
    `wide` lists the rows that keep too many for a short list: theirs is `keep_mask`.
    """
    width = z.shape[1]
    most = min(width, _CANDIDATES)
    values, ids = top_stable(z, most)
    kept = kept_counts(values, torch.logsumexp(z, 1), params)  # [n]
    # A kept set that reaches the last candidate's value may go on beyond it.
    edge = (values.gather(1, (kept - 1)[:, None])[:, 0] == values[:, -1]).tolist()
    wide = [i for i, at_edge in enumerate(edge) if at_edge and most < width]
    beyond = torch.arange(most, device=z.device)[None] >= kept[:, None]
    return values.masked_fill(beyond, -torch.inf), ids, wide


def keep_mask(row: torch.Tensor, p: Sampling) -> torch.Tensor:
    """The row [W] with everything that `p` truncates at -inf: what `truncate` keeps, for any number of kept ids."""
    # Only values are sorted: numpy does that an order of magnitude faster than a stable sort with indices.
    if row.device.type == "cpu":
        values = torch.from_numpy(np.sort(-row.numpy())).neg_()
    else:
        values = torch.sort(row, descending=True).values
    kept = int(kept_counts(values[None], torch.logsumexp(row, 0)[None], [p])[0])
    ids = first_ids(row, values[kept - 1], kept)
    return torch.full_like(row, -torch.inf).index_copy_(0, ids, row[ids])


def first_ids(row: torch.Tensor, least: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` best of a row [W] whose count-th best value is `least`; equal values: the lower ids."""
    above = (row > least).nonzero()[:, 0]
    return torch.cat([above, (row == least).nonzero()[: count - len(above), 0]])


def kept_counts(values: torch.Tensor, total: torch.Tensor, params: Seq[Sampling]) -> torch.Tensor:
    """How many of the descending `values` [n, m] are kept, [n] int64. total: [n] log-sum-exp of the whole rows."""
    device, m = values.device, values.shape[1]
    rank = torch.arange(m, device=device)[None]
    k = torch.tensor([min(p.top_k, 1 << 62) or 1 << 62 for p in params], device=device)[:, None]
    in_k = (rank < k) & torch.isfinite(values)
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


def top_p_mask(lp: torch.Tensor, top_p: Seq[float]) -> torch.Tensor:
    """The top-p set of each row of log-probs lp [n, W] at temperature 1, the crossing token included: [n, W] bool."""
    params = [Sampling(top_p=p) for p in top_p]
    values, _, wide = truncate(lp, params)
    counts = torch.isfinite(values).sum(1)
    least = values.gather(1, (counts - 1)[:, None])  # [n, 1]
    mask = lp >= least
    for row in (mask.sum(1) != counts).nonzero()[:, 0].tolist():  # ties at the edge
        mask[row] = False
        mask[row, first_ids(lp[row], least[row, 0], int(counts[row]))] = True
    for row in wide:
        mask[row] = torch.isfinite(keep_mask(lp[row], params[row]))
    return mask
