"""Compiles a runner's forward for few tokens: a graph for a single token, one for any other number up to a limit, and
one for any number with adapters, which is made when there is something to make it for.

Attention, linear layers and adapters are opaque operators inside, so the compiled code holds no weights, no adapter and
no pool: what is gained is the overhead of some forty small operations a layer. torch keeps the result on disk, so that
a later start is quicker.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from decoding.attention import Batch, HostedLayer, Tensor
from decoding.lora import Chosen

Packed = Callable[[Batch, Chosen | None], tuple[Tensor, Tensor]]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # ids, positions, slots, tracks, tables


def _bare(packed: Packed, inputs: Inputs) -> Any:
    return packed(Batch(*inputs, None, ()), None)


def _adapted(packed: Packed, inputs: Inputs, owners: Tensor, table: Tensor) -> Any:
    return packed(Batch(*inputs, None, ()), Chosen(0, (), (), owners, table))


def _compile(function: Any) -> Any:
    """torch.compile files its results by code object: every graph gets a copy of its own, with one entry."""
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, options={"guard_filter_fn": _lasting})


def _lasting(guards: Sequence[Any]) -> list[bool]:
    """All guards but those on hooks: the graph with adapters is made while every layer has one, and outlives them."""
    return ["_forward_hooks" not in guard.name for guard in guards]


class CompiledForward:
    """`packed` (a batch to logits [T, width] and hidden [T, hidden]), compiled on first use of each graph.

    After that first use the guards of torch.compile are skipped, all but those that cost nothing: checking a
    thousand tensors that never change takes as long as a layer. What does change is kept within what the graphs
    were made for: the number of tokens by `max_tokens`, the block tables by `_padded`, adapters by `Loras`.
    """

    def __init__(self, packed: Packed, max_tokens: int) -> None:
        self.packed, self.max_tokens = packed, max_tokens
        self._graphs = {"one": _compile(_bare), "some": _compile(_bare), "adapted": _compile(_adapted)}
        self.made: set[str] = set()

    def takes(self, tokens: int, chosen: Chosen | None) -> bool:
        """Whether a batch of so many tokens can be computed without compiling anything more."""
        fits = tokens <= self.max_tokens
        return fits and (chosen is None or (chosen.owners is not None and "adapted" in self.made))

    def __call__(self, batch: Batch, chosen: Chosen | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, width], hidden [T, hidden] of all tokens of the batch."""
        tokens = batch.slots.shape[0]
        inputs = (batch.token_ids, batch.positions, batch.slots, batch.tracks, _padded(batch.tables))
        if chosen is None:
            return self._run("one" if tokens == 1 else "some", inputs)
        assert chosen.owners is not None
        assert chosen.table is not None
        if tokens > 1:
            return self._run("adapted", inputs, (chosen.owners, chosen.table))
        # A graph of its own would take as long to make; twice the same token writes the same keys to the same place.
        packed = torch.stack([x.view(1) for x in inputs[:4]]).repeat_interleave(2, 1)  # [4, 2], as `make_batch` lays it
        twice = (packed[0:1], packed[1:2], packed[2], packed[3], inputs[4])
        logits, hidden = self._run("adapted", twice, (chosen.owners.repeat(2), chosen.table))
        return logits[:1], hidden[:1]

    def _run(self, name: str, inputs: Inputs, adapters: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
        graph, arguments = self._graphs[name], (self.packed, inputs, *adapters)
        if name not in self.made:
            _mark(inputs, adapters, name == "one")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's compiler deprecates parts of itself
                out: tuple[Tensor, Tensor] = graph(*arguments)
            self.made.add(name)
            return out
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            again: tuple[Tensor, Tensor] = graph(*arguments)
            return again


def mark_pools(layers: list[HostedLayer]) -> None:
    """The pools' sizes must not be part of the compiled code: call it with the pools that a graph is made over."""
    for layer in layers:
        for pool in (layer.keys, layer.values):
            torch._dynamo.mark_dynamic(pool, 0)


def _padded(tables: Tensor) -> Tensor:
    """At least two rows and columns: sizes of one would be compiled in."""
    rows, columns = tables.shape
    if rows > 1 and columns > 1:
        return tables
    return torch.nn.functional.pad(tables, (0, max(0, 2 - columns), 0, max(0, 2 - rows)))


def _mark(inputs: Inputs, adapters: tuple[Tensor, ...], single: bool) -> None:
    """The sizes that change from call to call."""
    *packed, tables = inputs
    for dimension in (0, 1):
        torch._dynamo.mark_dynamic(tables, dimension)
    for tensor in () if single else packed:
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 1)
    if adapters:
        owners, table = adapters
        torch._dynamo.mark_dynamic(owners, 0)
        torch._dynamo.mark_dynamic(table, 1)
