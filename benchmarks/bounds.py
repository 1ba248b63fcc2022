"""What a decode step must read, how long that takes at best, and shares made of measured times: arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.models import Size

BF16 = 2


def weight_bytes(size: Size) -> int:
    """Bytes of weights that a step reads: all layers, the last norm and the head; of the embedding only a few rows."""
    head_dim = size.hidden // size.heads
    attention = 2 * size.hidden * size.hidden + 2 * size.hidden * size.kv_heads * head_dim
    layer = attention + 3 * size.hidden * size.mlp + 2 * size.hidden
    return BF16 * (size.layers * layer + size.hidden + size.vocab * size.hidden)


def kv_bytes(size: Size) -> int:
    """Bytes of keys and values of one position."""
    return BF16 * size.layers * 2 * size.kv_heads * (size.hidden // size.heads)


def step_bytes(size: Size, batch: int, context: float) -> float:
    """Bytes that a decode step of `batch` streams reads, each with a context of so many positions."""
    return weight_bytes(size) + batch * context * kv_bytes(size)


def bound_ms(sizes: Sequence[Size], batch: int, context: float, bandwidth: float) -> float:
    """Milliseconds that memory of `bandwidth` bytes a second needs for a step of all these models."""
    return 1e3 * sum(step_bytes(size, batch, context) for size in sizes) / bandwidth


def hidden_share(beside: float, after: float, sides: float) -> float:
    """How much of the side models' own time is hidden: steps with models beside and after each other, and that time."""
    return (after - beside) / sides


def flip_rate(alone: Sequence[Sequence[int]], batched: Sequence[Sequence[int]]) -> float:
    """Share of texts that are not the same in both."""
    return sum(list(a) != list(b) for a, b in zip(alone, batched, strict=True)) / len(alone)


def wrong_share(rule: Sequence[int], last: Sequence[int], texts: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are not what `rule` says follows the token before; `last` ends each text's prompt."""
    pairs = [
        (before, token) for first, text in zip(last, texts, strict=True) for before, token in zip([first, *text], text)
    ]
    return sum(rule[before] != token for before, token in pairs) / max(1, len(pairs))
