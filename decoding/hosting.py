"""What the engine needs of a hosted model: spans of tracks in, rows of logits out, one packed forward a model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from decoding.events import AdapterInfo


@dataclass(slots=True)
class SpanInput:
    """A run of positions of one track as the runner sees it.

    Positions `start .. start + len(token_ids)` of a track whose keys and values lie in `blocks` (block table, long
    enough for every position of the span). `rows`: offsets into the span whose logits are wanted, ascending.
    """

    token_ids: Seq[int]
    start: int
    blocks: Seq[int]
    rows: Seq[int]
    adapter: str | None = None


@dataclass(slots=True)
class Rows:
    """What one packed forward returns, in the order of its spans and their `rows`.

    logits: [R, width]; hidden: [R, hidden] last hidden states before the head, or None if not asked for.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class ModelRunner(Protocol):
    """What the engine needs of a hosted model; `decoding.runner.Runner` is the real one, tests have fakes."""

    id: str
    width: int
    max_model_len: int
    parameters: int
    dtype: torch.dtype
    device: torch.device
    cost: float  # seconds a token, measured; only ratios between models matter

    def kv_bytes_per_block(self, block_size: int) -> int: ...

    def be_batch_invariant(self, on: bool) -> None: ...

    def allocate(self, num_blocks: int, block_size: int) -> None: ...

    def copy_blocks(self, pairs: Seq[tuple[int, int]]) -> None: ...

    def warm_up(self, compile_from: int = 0) -> bool: ...

    def load_adapter(self, id: str, path: str) -> AdapterInfo: ...

    def unload_adapter(self, id: str) -> None: ...

    def forward(self, spans: Seq[SpanInput], want_hidden: bool = False) -> Rows: ...
