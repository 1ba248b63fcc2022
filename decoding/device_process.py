"""`sampling.process` of many rows at once: masks, penalties and bias as masks and edits of `triton_kernels.mix`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.sampling import Position, hard_mask
from decoding.upload import uploaded
from triton_kernels.mix import Edits, mix

Tensor = torch.Tensor


def process_on_device(z: Tensor, rows: Sequence[int], places: Sequence[Position], kernel: bool | None = None) -> None:
    """Hard masks, penalties and bias on the given rows of z [n, W], in place; one place for each of them."""
    device, width = z.device, z.shape[1]
    masks = [hard_mask(at, at.sequence.group.width, device) for at in places]
    bits, mask_of = bits_of(masks, width, device)
    index = uploaded([list(rows)], device, torch.int64)
    ones = torch.ones(len(rows), 1, device=device)
    edits = edits_of(places, device)
    found = mix([z], index, width, ones, (0,), bits=bits, mask_of=mask_of, edits=edits, kernel=kernel)
    z[index[0]] = found.z


def bits_of(masks: Sequence[Tensor | None], width: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(bits, mask_of) as `triton_kernels.mix` takes them, of each row's allowed tokens [W] bool, None for all."""
    known = [mask[:width] for mask in masks if mask is not None]
    if not known:
        return None, None
    numbers = iter(range(len(known)))
    own = [-1 if mask is None else next(numbers) for mask in masks]
    padded = [torch.nn.functional.pad(mask, (0, width - len(mask))) for mask in known]
    return _packed(torch.stack(padded)), uploaded(own, device, torch.int32)


def edits_of(places: Sequence[Position | None], device: torch.device) -> Edits | None:
    """What penalties and bias do to single tokens of rows at `places`, None for rows that are left; None if nothing."""
    start, ids, add, times = [0], list[int](), list[float](), list[float]()
    for at in places:
        if at is not None:
            for token, more, factor in _edited(at):
                ids.append(token)
                add.append(more)
                times.append(factor)
        start.append(len(ids))
    if not ids:
        return None
    whole = uploaded([*start, *ids], device, torch.int32)
    real = uploaded([add, times], device, torch.float32)
    # A mix has no natural zero: its penalties act on log-probs.
    relative = uploaded([at is not None and len(at.sequence.group.policy.terms) > 1 for at in places], device)
    return Edits(whole[: len(start)], whole[len(start) :], real[0], real[1], relative)


def _edited(at: Position) -> list[tuple[int, float, float]]:
    """(token, what is added to it, by how much its logit is divided or multiplied before) of one row."""
    s, width = at.sampling, at.sequence.group.width
    counts, bias = at.counts, dict(s.logit_bias)
    seen = {*at.sequence.group.request.prompts[0], *counts} if s.repetition_penalty != 1.0 else set[int]()
    counted = counts if s.presence_penalty or s.frequency_penalty else {}
    found = []
    for token in sorted(i for i in {*seen, *counted, *bias} if i < width):
        less = s.presence_penalty + s.frequency_penalty * counted[token] if token in counted else 0.0
        found.append((token, bias.get(token, 0.0) - less, s.repetition_penalty if token in seen else 1.0))
    return found


def _packed(masks: Tensor) -> Tensor:
    """[M, W] bool to [M, ceil(W / 32)] int32, bit v % 32 of word v // 32 for id v."""
    padded = torch.nn.functional.pad(masks, (0, -masks.shape[1] % 32)).view(len(masks), -1, 32)
    powers = torch.ones(32, dtype=torch.int64, device=masks.device) << torch.arange(32, device=masks.device)
    return (padded * powers).sum(2).to(torch.int32)
