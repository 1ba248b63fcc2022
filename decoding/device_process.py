"""`sampling.process` of many rows at once: masks, penalties and bias as masks and edits of `triton_kernels.mix`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.device_mix import packed
from decoding.sampling import Position, hard_mask
from decoding.upload import uploaded
from triton_kernels.mix import Edits, mix

Tensor = torch.Tensor


def process_on_device(z: Tensor, rows: Sequence[int], places: Sequence[Position], kernel: bool | None = None) -> None:
    """Hard masks, penalties and bias on the given rows of z [n, W], in place; one place for each of them."""
    device, width = z.device, z.shape[1]
    masks = [hard_mask(at, at.sequence.group.width, device) for at in places]
    known = [torch.nn.functional.pad(mask, (0, width - len(mask))) for mask in masks if mask is not None]
    bits = mask_of = None
    if known:
        numbers = iter(range(len(known)))
        bits = packed(torch.stack(known))
        mask_of = uploaded([-1 if mask is None else next(numbers) for mask in masks], device, torch.int32)
    index = uploaded([list(rows)], device, torch.int64)
    ones = torch.ones(len(rows), 1, device=device)
    found = mix([z], index, width, ones, (0,), bits=bits, mask_of=mask_of, edits=_edits(places, device), kernel=kernel)
    z[index[0]] = found.z


def _edits(places: Sequence[Position], device: torch.device) -> Edits | None:
    """What penalties and bias do to single tokens; None if nothing."""
    start, ids, add, times = [0], list[int](), list[float](), list[float]()
    for at in places:
        s, width = at.sampling, at.sequence.group.width
        counts, bias = at.counts, dict(s.logit_bias)
        seen = {*at.sequence.group.request.prompts[0], *counts} if s.repetition_penalty != 1.0 else set[int]()
        counted = counts if s.presence_penalty or s.frequency_penalty else {}
        for token in sorted(i for i in {*seen, *counted, *bias} if i < width):
            ids.append(token)
            times.append(s.repetition_penalty if token in seen else 1.0)
            less = s.presence_penalty + s.frequency_penalty * counted[token] if token in counted else 0.0
            add.append(bias.get(token, 0.0) - less)
        start.append(len(ids))
    if not ids:
        return None
    whole = uploaded([*start, *ids], device, torch.int32)
    real = uploaded([add, times], device, torch.float32)
    # A mix has no natural zero: its penalties act on log-probs.
    relative = uploaded([len(at.sequence.group.policy.terms) > 1 for at in places], device)
    return Edits(whole[: len(start)], whole[len(start) :], real[0], real[1], relative)
