"""Cases of the kernels of rows of logits: mixing, sampling, losses. Each function imports its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cases import BF16, FP32, Case, Dims, Inputs, Tensor, drawn, index


def row_stats_bytes(rows: int, vocab: int, chunk: int) -> int:
    """The rows read once, 8 bytes a chunk written and read."""
    return rows * (vocab * BF16 + 2 * 8 * -(-vocab // chunk))


def row_stats(d: Dims) -> list[Case]:
    from triton_kernels import row_stats as k

    def make(rows: int, device: torch.device) -> Inputs:
        return drawn(d, device, rows, d.vocab), index(device, 1, rows)[0], d.vocab

    return [
        Case(
            "row_stats",
            f"{rows} rows",
            partial(make, rows),
            partial(k.row_stats, kernel=True),
            k.row_stats_reference,
            row_stats_bytes(rows, d.vocab, k.CHUNK),
        )
        for rows in d.rows
    ]


def mix_bytes(rows: int, vocab: int, tracks: int, floor: bool = False) -> int:
    """Each track's rows read, z written in fp32; a floor reads the reference row and z again, and writes z again."""
    return rows * vocab * (tracks * BF16 + FP32 + (BF16 + 2 * FP32 if floor else 0))


def mix(d: Dims) -> list[Case]:
    from triton_kernels import mix as k

    def make(rows: int, weights: Sequence[float], floor: bool, device: torch.device) -> Inputs:
        tracks = [drawn(d, device, rows, d.vocab) for _ in weights]
        given = torch.tensor(weights, device=device).repeat(rows, 1)
        least = (0, torch.full((rows,), -2.3, device=device)) if floor else None
        return tracks, index(device, len(weights), rows), d.vocab, given, range(len(weights)), None, None, None, least

    kinds = {
        "one model": ((1.0,), False),
        "proxy-tuning": ((1.0, 1.0, -1.0), False),
        "contrastive": ((1.5, -0.5), True),
    }
    return [
        Case(
            "mix",
            f"{title}, {rows} rows",
            partial(make, rows, weights, floor),
            partial(k.mix, kernel=True),
            k.mix_reference,
            mix_bytes(rows, d.vocab, len(weights), floor),
        )
        for title, (weights, floor) in kinds.items()
        for rows in d.rows
    ]


def _sampling(device: torch.device, rows: int, top_k: int, top_p: float, min_p: float) -> Inputs:
    def full(value: float) -> Tensor:
        return torch.full((rows,), value, device=device)

    return full(0.8), full(top_k).int(), full(top_p), full(min_p)


def cutoffs_bytes(rows: int, vocab: int, reads: int) -> int:
    """The rows read so many times."""
    return rows * vocab * FP32 * reads


def cutoffs(d: Dims) -> list[Case]:
    from triton_kernels import cutoffs as k

    def make(rows: int, top_k: int, top_p: float, min_p: float, device: torch.device) -> Inputs:
        z = 3 * drawn(d, device, rows, d.vocab, dtype=torch.float32)
        return z, index(device, 1, rows)[0], d.vocab, *_sampling(device, rows, top_k, top_p, min_p)

    def run(cut: Callable[..., Any], *inputs: Any) -> tuple[Tensor, Tensor]:
        """Without the cuts themselves: with min-p they may lie anywhere between two tokens."""
        found = cut(*inputs)
        return found.best, found.total

    kinds = {
        "no truncation": (0, 1.0, 0.0, 1),
        "top-k 50": (50, 1.0, 0.0, 3),
        "top-p 0.9": (0, 0.9, 0.0, 3),
        "min-p 0.1": (0, 1.0, 0.1, 2),
    }
    return [
        Case(
            "cutoffs",
            f"{title}, {rows} rows",
            partial(make, rows, top_k, top_p, min_p),
            partial(run, partial(k.cutoffs, kernel=True)),
            partial(run, k.cutoffs_reference),
            cutoffs_bytes(rows, d.vocab, reads),
        )
        for title, (top_k, top_p, min_p, reads) in kinds.items()
        for rows in d.rows
    ]


def sample_verify_bytes(rows: int, vocab: int, reads: int, steps: int) -> int:
    """z as often as the cuts read it, and once more the row that ends each of the steps."""
    return vocab * FP32 * (rows * reads + steps)


def sample_verify(d: Dims) -> list[Case]:
    from triton_kernels import sample_verify as k

    def make(steps: int, drafts: int, device: torch.device) -> Inputs:
        rows = steps * (drafts + 1)
        z = 3 * drawn(d, device, rows, d.vocab, dtype=torch.float32)
        drafted = torch.randint(d.vocab, (rows,), dtype=torch.int32, device=device)
        drafted[drafts :: drafts + 1] = -1
        keys = torch.arange(2 * rows, dtype=torch.int32, device=device).view(rows, 2)
        starts = torch.arange(steps + 1, dtype=torch.int32, device=device) * (drafts + 1)
        bonus = torch.ones(steps, dtype=torch.bool, device=device)
        return z, *_sampling(device, rows, 0, 0.9, 0.0), keys, starts, bonus, drafted

    def run(kernel: bool, *inputs: Any) -> Any:
        return k.sample_verify(*inputs, accept=lambda p: p > 1e-6, kernel=kernel)[0]

    return [
        Case(
            "sample_verify",
            f"top-p 0.9, {steps} sequences, {drafts} drafts each",
            partial(make, steps, drafts),
            partial(run, True),
            partial(run, False),
            sample_verify_bytes(steps * (drafts + 1), d.vocab, 3, steps),
        )
        for drafts in (0, 4)
        for steps in d.rows
    ]


def mix_and_verify_bytes(rows: int, vocab: int, tracks: int) -> int:
    """One read of the inputs, one write and three reads of the mixed row."""
    return rows * vocab * (tracks * BF16 + (1 + 3) * FP32)


def mix_and_verify(d: Dims) -> list[Case]:
    """`mix` and `sample_verify` together, at temperature 0.8 and top-p 0.9 without drafts."""
    from triton_kernels import mix as k
    from triton_kernels import sample_verify as v

    weights = (1.0, 1.0, -1.0)

    def make(rows: int, device: torch.device) -> Inputs:
        tracks = [3 * drawn(d, device, rows, d.vocab) for _ in weights]
        given = torch.tensor(weights, device=device).repeat(rows, 1)
        keys = torch.arange(2 * rows, dtype=torch.int32, device=device).view(rows, 2)
        steps = torch.arange(rows + 1, dtype=torch.int32, device=device)
        bonus = torch.ones(rows, dtype=torch.bool, device=device)
        mixed = (tracks, index(device, len(weights), rows), d.vocab, given, range(len(weights)))
        return mixed, _sampling(device, rows, 0, 0.9, 0.0), keys, steps, bonus, torch.full_like(keys[:, 0], -1)

    def run(kernel: bool, mixed: Inputs, sampling: Inputs, *more: Tensor) -> Any:
        z, best, _ = k.mix(*mixed, kernel=kernel)
        return v.sample_verify(z, *sampling, *more, accept=lambda p: p > 0, best=best, kernel=kernel)[0]

    return [
        Case(
            "mix + sample_verify",
            f"proxy-tuning, top-p 0.9, {rows} rows",
            partial(make, rows),
            partial(run, True),
            partial(run, False),
            mix_and_verify_bytes(rows, d.vocab, len(weights)),
        )
        for rows in d.rows
    ]


def top_logprobs_bytes(rows: int, vocab: int, best: int, chunk: int) -> int:
    """The rows read once, 8 bytes for each of the best of each chunk written and read."""
    return rows * (vocab * FP32 + 2 * 8 * best * -(-vocab // chunk))


def top_logprobs(d: Dims) -> list[Case]:
    from triton_kernels import top_logprobs as k

    def make(rows: int, device: torch.device) -> Inputs:
        z = drawn(d, device, rows, d.vocab, dtype=torch.float32)
        chosen = torch.randint(d.vocab, (rows,), device=device)
        return z, index(device, 1, rows)[0], d.vocab, torch.logsumexp(z, 1), chosen, 5

    return [
        Case(
            "top_logprobs",
            f"5 best, {rows} rows",
            partial(make, rows),
            partial(k.top_logprobs, kernel=True),
            k.top_logprobs_reference,
            top_logprobs_bytes(rows, d.vocab, 5, k.CHUNK),
        )
        for rows in d.rows
    ]


def fusion_weights_bytes(rows: int, vocab: int, experts: int, passes: int = 3) -> int:
    """Every row once a pass: the sums, the grid's moments, those of finer points."""
    return passes * (2 + experts) * rows * vocab * BF16


def fusion_weights(d: Dims) -> list[Case]:
    from triton_kernels import fusion_weights as k

    def make(rows: int, experts: int, device: torch.device) -> Inputs:
        base, small = drawn(d, device, rows, d.vocab), drawn(d, device, rows, d.vocab)
        tuned = [small + 0.5 * drawn(d, device, rows, d.vocab) for _ in range(experts)]
        return base, small, tuned, 2.0, 0.1, True

    def reference(base: Tensor, small: Tensor, experts: Sequence[Tensor], *how: Any) -> Any:
        """In fp32, as the kernels compute; the reference otherwise keeps to the rows' dtype."""
        alpha, expert, loss = k.fusion_weights_reference(
            base.float(), small.float(), [row.float() for row in experts], *how
        )
        return alpha.to(base.dtype), expert, loss.to(base.dtype)

    return [
        Case(
            "fusion_weights",
            f"{experts} experts, {rows} rows",
            partial(make, rows, experts),
            partial(k.fusion_weights, kernel=True),
            reference,
            fusion_weights_bytes(rows, d.vocab, experts),
        )
        for experts in (1, 2)
        for rows in d.rows
    ]


def _learned(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients: a training step's share."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(hidden, weight, *inputs)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def distill_loss(d: Dims) -> list[Case]:
    from triton_kernels import distill_loss as k

    width, rows = d.hidden // 4, 2 * d.prefill  # a drafter's

    def make(device: torch.device) -> Inputs:
        hidden, weight = drawn(d, device, rows, width), 0.05 * drawn(d, device, d.vocab, width)
        return hidden, weight, drawn(d, device, rows, d.vocab)

    def loss(kind: str, kernel: bool, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return k.distill_loss(hidden, weight, None, target, kind, kernel=kernel)

    return [
        Case(
            "distill_loss",
            f"{kind}, {rows} rows, forward and backward",
            make,
            partial(_learned, partial(loss, kind, True)),
            partial(_learned, partial(loss, kind, False)),
            None,
        )
        for kind in ("kl", "tvd++")
    ]


def preference_loss(d: Dims) -> list[Case]:
    from triton_kernels import preference_loss as k

    width, rows, pairs = d.hidden // 4, 2 * d.prefill, 4

    def make(device: torch.device) -> Inputs:
        hidden, weight = drawn(d, device, rows, width), 0.05 * drawn(d, device, d.vocab, width)
        segments = torch.arange(rows, device=device) * 2 * pairs // rows
        return hidden, weight, torch.randint(d.vocab, (rows,), device=device), segments

    def loss(kernel: bool, hidden: Tensor, weight: Tensor, targets: Tensor, segments: Tensor) -> Tensor:
        return k.preference_loss(hidden, weight, targets, segments, pairs, 0.1, kernel=kernel)

    return [
        Case(
            "preference_loss",
            f"{pairs} pairs, {rows} rows, forward and backward",
            make,
            partial(_learned, partial(loss, True)),
            partial(_learned, partial(loss, False)),
            None,
        )
    ]


ROWS: dict[str, Callable[[Dims], list[Case]]] = {
    "row_stats": row_stats,
    "mix": mix,
    "cutoffs": cutoffs,
    "sample_verify": sample_verify,
    "mix + sample_verify": mix_and_verify,
    "top_logprobs": top_logprobs,
    "fusion_weights": fusion_weights,
    "distill_loss": distill_loss,
    "preference_loss": preference_loss,
}
