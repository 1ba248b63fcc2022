"""LoRA on a hosted model without merging: y += (x down_i^T) up_i for the tokens of adapter i, all in one forward.

Every adapted layer keeps the matrices of all its adapters stacked along the rank, so that a decode batch with many
adapters is one call (a kernel on a CPU, else two products and a mask), and a few long stretches are two products each
(S-LoRA, arXiv:2311.03285, has the same two cases). PEFT's mixed batches choose an adapter per batch row; a packed
batch is a single row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from decoding.adapters import Adapter, Lora
from decoding.attention import Tensor
from decoding.core import SpanInput

FEW_TOKENS = 64  # up to here every token meets every adapter: more products, but a few calls only


@dataclass(slots=True)
class Chosen:
    """Which adapter each token of one packed batch uses.

    runs: (adapter, first token, end) in order, none for tokens without one. For few tokens there is one of two
    tensors per layout, otherwise the runs are taken: masks [T, K], 1 where the token's adapter owns the column and 0
    elsewhere, or for the CPU kernel ranges [T, 2] int64, first and last + 1 of the columns that it owns.
    """

    tokens: int
    runs: tuple[tuple[str, int, int], ...]
    masks: tuple[Tensor, ...] = ()
    ranges: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class LoraLayer:
    """One linear layer's adapters: down [K, in], up [K, out], each adapter's rows of both, K the sum of their ranks.

    layout: which of the set's masks fits, the same for layers with equally many rows of the same adapters.
    """

    down: Tensor
    up: Tensor
    loras: dict[str, Lora] = field(default_factory=dict)
    layout: int = 0

    def stack(self) -> None:
        """Lay the adapters' matrices behind each other; the adapters then hold views of the stack, not copies."""
        self.down = torch.cat([self.down[:0], *(lora.down for lora in self.loras.values())])
        self.up = torch.cat([self.up[:0], *(lora.up for lora in self.loras.values())])
        end = 0
        for id, lora in self.loras.items():
            start, end = end, end + lora.down.shape[0]
            self.loras[id] = Lora(self.down[start:end], self.up[start:end])

    def add(self, x: Tensor, y: Tensor, chosen: Chosen) -> Tensor:
        """x [.., in], y [.., out] the layer's own output, which is written to -> y with the adapters' share."""
        if chosen.ranges:
            torch.ops.trimtab.lora.default(x, y, self.down, self.up, chosen.ranges[self.layout])
            return y
        inputs, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if inputs.shape[0] != chosen.tokens:
            raise RuntimeError(f"an adapted layer saw {inputs.shape[0]} of {chosen.tokens} tokens")
        if chosen.masks:
            out.addmm_((inputs @ self.down.T).mul_(chosen.masks[self.layout]), self.up)
            return y
        for id, start, end in chosen.runs:
            lora = self.loras.get(id)
            if lora is not None:
                out[start:end].addmm_(inputs[start:end] @ lora.down.T, lora.up)
        return y


class Loras:
    """The adapters that are loaded on one model. `chosen` is what the forward in progress uses; None costs nothing."""

    def __init__(self, model: nn.Module, head: nn.Module, kernel: bool = False) -> None:
        """With `kernel`, few tokens go through `trimtab::lora`, which `load_kernels()` has made."""
        self._kernel = kernel
        self.linears = dict(_linears(model, head))
        self.adapters: dict[str, Adapter] = {}
        self.chosen: Chosen | None = None
        self._layers: dict[str, LoraLayer] = {}
        self._hooks: dict[str, Any] = {}
        self._layouts: list[tuple[tuple[str, int], ...]] = []

    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of every layer that may be adapted."""
        return {name: _size(module) for name, module in self.linears.items()}

    def add(self, id: str, adapter: Adapter) -> None:
        """Load an adapter, in place of an earlier one with this id."""
        if id in self.adapters:
            self.remove(id)
        for name, lora in adapter.modules.items():
            if name not in self._layers:
                layer = self._layers[name] = LoraLayer(lora.down[:0], lora.up[:0])
                self._hooks[name] = self.linears[name].register_forward_hook(partial(_hook, self, layer))
            self._layers[name].loras[id] = lora
            self._layers[name].stack()
        # The layers hold the only copy: the record keeps what describes it.
        self.adapters[id] = Adapter({}, adapter.generation)
        self._number_layouts()

    def remove(self, id: str) -> None:
        """Unload an adapter; layers without one are as they were before."""
        del self.adapters[id]
        for name, layer in list(self._layers.items()):
            if layer.loras.pop(id, None) is None:
                continue
            layer.stack()
            if not layer.loras:
                del self._layers[name]
                self._hooks.pop(name).remove()
        self._number_layouts()

    def bytes(self) -> int:
        """Memory of all stacks."""
        return sum(part.nbytes for layer in self._layers.values() for part in (layer.down, layer.up))

    def choose(self, spans: Sequence[SpanInput], like: Tensor) -> Chosen | None:
        """What a forward of `spans` uses; None if no span names an adapter. Raises KeyError for one not loaded."""
        if all(span.adapter is None for span in spans):
            return None
        runs: list[tuple[str, int, int]] = []
        end = 0
        for span in spans:
            start, end = end, end + len(span.token_ids)
            if span.adapter is None:
                continue
            if span.adapter not in self.adapters:
                raise KeyError(f"no adapter '{span.adapter}' is loaded")
            if runs and runs[-1][0] == span.adapter and runs[-1][2] == start:
                start = runs.pop()[1]
            runs.append((span.adapter, start, end))
        if end > FEW_TOKENS:
            return Chosen(end, tuple(runs))
        if self._kernel:
            return Chosen(end, tuple(runs), ranges=self._ranges(runs, end))
        # A mask has every loaded adapter multiplied once, runs have theirs once each.
        masked = len(self.adapters) <= 2 * len(runs)
        return Chosen(end, tuple(runs), self._masks(runs, end, like) if masked else ())

    def _masks(self, runs: Sequence[tuple[str, int, int]], tokens: int, like: Tensor) -> tuple[Tensor, ...]:
        numbers = {id: i + 1 for i, id in enumerate(self.adapters)}
        owners = [0] * tokens
        for id, start, end in runs:
            owners[start:end] = [numbers[id]] * (end - start)
        token = torch.tensor(owners, device=like.device)
        masks = []
        for layout in self._layouts:
            columns = torch.tensor([numbers[id] for id, rank in layout for _ in range(rank)], device=like.device)
            masks.append((token[:, None] == columns).to(like.dtype))  # [T, K]
        return tuple(masks)

    def _ranges(self, runs: Sequence[tuple[str, int, int]], tokens: int) -> tuple[Tensor, ...]:
        found = []
        for layout in self._layouts:
            columns, first = {}, 0
            for id, rank in layout:
                columns[id], first = [first, first + rank], first + rank
            rows = [[0, 0]] * tokens
            for id, start, end in runs:
                rows[start:end] = [columns.get(id, [0, 0])] * (end - start)
            found.append(torch.tensor(rows))  # [T, 2]
        return tuple(found)

    def _number_layouts(self) -> None:
        self._layouts = []
        for layer in self._layers.values():
            layout = tuple((id, lora.down.shape[0]) for id, lora in layer.loras.items())
            if layout not in self._layouts:
                self._layouts.append(layout)
            layer.layout = self._layouts.index(layout)


def _hook(loras: Loras, layer: LoraLayer, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output if loras.chosen is None else layer.add(inputs[0], output, loras.chosen)


def _linears(model: nn.Module, head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that see every token of a packed batch once, in order: not the head, not experts that tokens go to."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".experts." not in name:
            yield name, module


def _size(module: nn.Module) -> tuple[int, int]:
    """(in, out); Conv1D keeps its weight the other way round."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
