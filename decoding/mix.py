"""The policy: each row's models, weighted and summed in fp32.

z = sum_j w_j z_j over the tokens that every term has. A term of weight 0 never gets here. A token whose logit is not
finite in any term is -inf in the mix, and infinities are never subtracted from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from decoding.core import Rows, Sample


def mix(samples: Sequence[Sample], rows: Mapping[str, Rows]) -> torch.Tensor:
    """The mixed logits of all samples' rows, in order: [S, W] fp32, W the widest mix, narrower ones padded with -inf.

    Samples that mix the same models over the same width are computed together, whatever their weights and
    strategies. Source of the form: proxy-tuning (Liu et al. 2024, eq. 1) and every other linear policy.
    """
    total = sum(sample.count for sample in samples)
    widest = max(sample.sequence.group.width for sample in samples)
    groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, Sample]]] = {}
    start = 0
    for sample in samples:
        tracks = sample.sequence.tracks
        key = (sample.sequence.group.width, tuple(track.model for track in tracks))
        groups.setdefault(key, []).append((start, sample))
        start += sample.count
    if len(groups) == 1:
        (width, models), members = next(iter(groups.items()))
        return _mix_group(width, models, [sample for _, sample in members], rows)
    device = next(iter(rows.values())).logits.device
    mixed = torch.full((total, widest), -torch.inf, device=device)  # [S, W]
    for (width, models), members in groups.items():
        index = [at + i for at, sample in members for i in range(sample.count)]
        mixed[torch.tensor(index, device=device), :width] = _mix_group(width, models, [s for _, s in members], rows)
    return mixed


def _mix_group(
    width: int, models: tuple[str, ...], samples: Sequence[Sample], rows: Mapping[str, Rows]
) -> torch.Tensor:  # [n, width] fp32
    mixed: torch.Tensor | None = None
    for j, model in enumerate(models):
        logits = rows[model].logits  # [R, V]
        index = [sample.offsets[j] + i for sample in samples for i in range(sample.count)]
        if index != list(range(logits.shape[0])):
            logits = logits[torch.tensor(index, device=logits.device)]
        term = logits[:, :width].float()  # [n, width]
        weights = [sample.sequence.group.weights[j] for sample in samples for _ in range(sample.count)]
        if mixed is None and all(weight == 1.0 for weight in weights):
            # The sampler edits rows in place; `float` copied them unless the model's own rows are fp32 already.
            mixed = term.clone() if term.data_ptr() == rows[model].logits.data_ptr() else term
            continue
        column = torch.tensor(weights, device=term.device)[:, None]  # [n, 1]
        mixed = term * column if mixed is None else mixed.addcmul_(term, column)
    assert mixed is not None
    # inf - inf and 0 * inf are nan, and +inf can only come from a broken or a subtracted row: all of them are masked.
    return mixed.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
