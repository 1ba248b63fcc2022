"""Compiles a runner's forward for few tokens: one graph for a single token, one for any other number up to a limit.

Attention and linear layers are opaque operators inside, so the compiled code holds no weights and no pool: what is
gained is the overhead of some forty small operations a layer. torch keeps the result on disk, so that a later start
is quicker.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from decoding.attention import Batch, HostedLayer, Tensor

Packed = Callable[[Batch], tuple[Tensor, Tensor]]


def _forward(packed: Packed, ids: Tensor, positions: Tensor, slots: Tensor, tracks: Tensor, tables: Tensor) -> Any:
    return packed(Batch(ids, positions, slots, tracks, tables, None, ()))


def _compile() -> Any:
    """torch.compile files its results by code object: every graph gets a copy of its own, with one entry."""
    own = FunctionType(_forward.__code__.replace(), _forward.__globals__, _forward.__name__)
    return torch.compile(own, fullgraph=True)


class CompiledForward:
    """`packed` (a batch to logits [T, width] and hidden [T, hidden]), compiled on first use of each graph.

    After that first use the guards of torch.compile are skipped, all but those that cost nothing: checking a
    thousand tensors that never change takes as long as a layer. What does change is kept within what the graphs
    were made for: the number of tokens by `max_tokens`, the block tables by `_padded`.
    """

    def __init__(self, packed: Packed, layers: list[HostedLayer], max_tokens: int) -> None:
        self.packed, self.max_tokens = packed, max_tokens
        self._one, self._some = _compile(), _compile()
        self._made: set[bool] = set()
        for layer in layers:  # the pool's size must not be part of the compiled code
            for pool in (layer.keys, layer.values):
                torch._dynamo.mark_dynamic(pool, 0)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """logits [T, width], hidden [T, hidden] of all tokens of the batch."""
        single = batch.slots.shape[0] == 1
        tables = _padded(batch.tables)
        arguments = (self.packed, batch.token_ids, batch.positions, batch.slots, batch.tracks, tables)
        graph = self._one if single else self._some
        if single not in self._made:
            _mark(batch, tables, single)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's compiler deprecates parts of itself
                out: tuple[Tensor, Tensor] = graph(*arguments)
            self._made.add(single)
            return out
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            again: tuple[Tensor, Tensor] = graph(*arguments)
            return again


def _padded(tables: Tensor) -> Tensor:
    """At least two rows and columns: sizes of one would be compiled in."""
    rows, columns = tables.shape
    if rows > 1 and columns > 1:
        return tables
    return torch.nn.functional.pad(tables, (0, max(0, 2 - columns), 0, max(0, 2 - rows)))


def _mark(batch: Batch, tables: Tensor, single: bool) -> None:
    for dimension in (0, 1):
        torch._dynamo.mark_dynamic(tables, dimension)
    if single:
        return
    for tensor, dimension in ((batch.token_ids, 1), (batch.positions, 1), (batch.slots, 0), (batch.tracks, 0)):
        torch._dynamo.mark_dynamic(tensor, dimension)
