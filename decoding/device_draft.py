"""`choose.choose` on the device: rows processed, cut and drawn by the GPU's kernels, and one copy back a draft step.

The distributions that acceptance rules weigh stay on the device. Requests with a seed draft the host's tokens; those
without draw from keys of their own, out of the engine's generator.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from decoding.choose import Choice, Drafting
from decoding.device_params import DrawParams
from decoding.device_process import process_on_device
from decoding.download import Download
from decoding.noise import Lane
from decoding.sampling import processes
from decoding.state import Sequence
from decoding.upload import uploaded
from triton_kernels.cutoffs import COLDEST, Cutoffs, cutoffs
from triton_kernels.draw import draw
from triton_kernels.row_stats import row_stats

Tensor = torch.Tensor


def choose_on_device(
    z: Tensor, members: Seq[Sequence], generator: torch.Generator, kernel: bool | None = None
) -> Choice:
    """See `choose.choose`. kernel: as the wrappers of `triton_kernels` take it; False runs their references."""
    asked = Drafting.of(members)
    places, rules, width = asked.places, asked.rules, z.shape[1]
    logprobs = asked.unfiltered(z)
    touched = [row for row, at in enumerate(places) if processes(at)]
    if touched:
        process_on_device(z, touched, [places[row] for row in touched], kernel)
    lanes = [Lane.TOKEN if rule.keyed else Lane.DRAFT for rule in rules]
    params = DrawParams.of(places, lanes, generator, z.device)
    every = torch.arange(len(z), dtype=torch.int32, device=z.device)
    cut = cutoffs(z, every, width, *params.limits, kernel=kernel)
    tokens = draw(z, params.temperature, cut, params.keys, kernel=kernel)  # [n] int32, -1 where nothing is allowed
    down = Download()
    fetched = [down.want(tokens)]
    if asked.adaptive:
        _, lse = row_stats(z, every, width, kernel=kernel)
        own = z.gather(1, tokens.clamp_min(0).long()[:, None])[:, 0]
        fetched.append(down.want((own - lse).exp()))
    weighed = [i for i, at in enumerate(places) if at.sampling.temperature > 0 and not rules[i].keyed]
    probs = dict(zip(weighed, _drawn_from(z, weighed, params.temperature, cut), strict=True)) if weighed else {}
    down.fetch()
    chosen, *confidence = (x().tolist() for x in fetched)
    sure = {i: confidence[0][i] for i in asked.adaptive}
    return Choice([None if token < 0 else token for token in chosen], probs, logprobs, sure)


def _drawn_from(z: Tensor, rows: Seq[int], temperature: Tensor, cut: Cutoffs) -> Tensor:
    """What is left of the given rows of z [n, W], as probabilities [m, W]; temperature [n] is above 0 there."""
    least, last, best, total = (x[:, None] for x in cut[:4])
    scale = temperature[:, None]
    if len(rows) < len(z):
        index = uploaded(list(rows), z.device, torch.int64)
        z, least, last, best, total, scale = (x[index] for x in (z, least, last, best, total, scale))
    ids = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
    keep = (z > -torch.inf) & ((z > least) | ((z == least) & (ids <= last)))
    return ((z - best) / scale.clamp_min(COLDEST) - total).exp_().masked_fill_(~keep, 0.0)
