"""Drafts verified and the tokens behind them drawn, without asking the device anything.

A sequence has k drafted rows and one bonus row; row i is the distribution behind its first i drafts. The first row
whose draft is refused ends the step, else the bonus row does; that row draws the step's last token, from the residual
where it refused (speculative sampling: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). A
sequence without drafts is one bonus row: plain sampling. What is accepted is the caller's to say.

`sample_verify` is all of it for a rule that needs p of the drafts only; the engine, whose rules look at more, calls the
parts.

Launches: 4: `cutoffs`, which gives p of the drafts, `verify`, and the 2 of `draw`; the caller's rule runs between the
first two. Bytes: z is read as often as `cutoffs` says, and once more for each sequence's last row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_kernels.cutoffs import Cutoffs, cutoffs
from triton_kernels.dispatch import on_kernel
from triton_kernels.draw import Residual, draw

Tensor = torch.Tensor


class Verified(NamedTuple):
    """Of S sequences, [S] int32 each: accepted drafts, the row that ends the step (-1: none), and the token it drew.

    token is -1 where no row ends the step, or nothing is allowed there.
    """

    length: Tensor
    row: Tensor
    token: Tensor


def verify_reference(accept: Tensor, starts: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """See `verify`."""
    begins, ends = starts[:-1].long(), starts[1:].long() - 1  # the bonus rows
    rows = torch.arange(accept.shape[0], device=accept.device)
    owner = torch.searchsorted(starts[1:].long(), rows, right=True).clamp_max(len(bonus) - 1)  # [n], its sequence
    row = ends.scatter_reduce(0, owner, torch.where(accept, ends[owner], rows), "amin")
    return (row - begins).int(), torch.where((row < ends) | bonus, row, -1).int()


@triton.jit
def _verify_kernel(accept_ptr, starts_ptr, bonus_ptr, length_ptr, row_ptr, BLOCK: tl.constexpr):
    s = tl.program_id(0)
    begin, end = tl.load(starts_ptr + s), tl.load(starts_ptr + s + 1) - 1
    row = end
    start = begin
    while (start < end) & (row == end):
        at = start + tl.arange(0, BLOCK)
        passed = tl.load(accept_ptr + at, mask=at < end, other=1)
        row = tl.minimum(row, tl.min(tl.where(passed != 0, end, at), axis=0))
        start += BLOCK
    tl.store(length_ptr + s, row - begin)
    tl.store(row_ptr + s, tl.where((row < end) | (tl.load(bonus_ptr + s) != 0), row, -1))


def verify(accept: Tensor, starts: Tensor, bonus: Tensor, *, kernel: bool | None = None) -> tuple[Tensor, Tensor]:
    """(length, row), [S] int32 each: how many drafts of each sequence are accepted, and the row that ends its step.

    accept [n] bool: whether the row's draft passes; bonus rows' entries are not read. starts [S + 1] int32: sequence
    s has rows starts[s] up to starts[s + 1], the last its bonus row. bonus [S] bool: whether that row may end the step;
    -1 does where it may not. Raises ValueError if the shapes do not fit.
    """
    if accept.dim() != 1 or starts.shape != (bonus.shape[0] + 1,):
        raise ValueError(f"verify: starts {tuple(starts.shape)} and bonus {tuple(bonus.shape)} do not fit")
    if not on_kernel(accept, kernel):
        return verify_reference(accept, starts, bonus)
    count = bonus.shape[0]
    length, row = torch.empty(2, count, dtype=torch.int32, device=accept.device)
    if count:
        _verify_kernel[(count,)](
            accept.contiguous(), starts.contiguous(), bonus.contiguous(), length, row, 32, num_warps=1
        )
    return length, row


def sample_verify(
    z: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    starts: Tensor,
    bonus: Tensor,
    drafts: Tensor,
    accept: Callable[[Tensor], Tensor],
    residual: Residual | None = None,
    best: Tensor | None = None,
    *,
    kernel: bool | None = None,
) -> tuple[Verified, Cutoffs]:
    """What S sequences get from their n rows of processed logits z [n, W] fp32, and the rows' cuts.

    The parameters are those of `cutoffs` and `draw`, a row each. keys [n, 2] int32: of the noise that the row draws
    with if it ends the step. drafts [n] int32: the row's draft, -1 in bonus rows. accept: p(draft) [n] fp32, 0 without
    a draft, to [n] bool, on the device. residual: what refused rows leave out; nothing in bonus rows. best: the
    rows' maxima, as `cutoffs` takes them.
    """
    index = torch.arange(z.shape[0], dtype=torch.int32, device=z.device)
    cut = cutoffs(z, index, z.shape[1], temperature, top_k, top_p, min_p, drafts, best, kernel=kernel)
    assert cut.prob is not None
    length, row = verify(accept(cut.prob), starts, bonus, kernel=kernel)
    return Verified(length, row, draw(z, temperature, cut, keys, row, residual, kernel=kernel)), cut
