"""LoRA on a hosted model without merging: y += (x down_i^T) up_i for the tokens of adapter i, all in one forward.

A decode batch with many adapters is one call a layer of a kernel that is told where each adapter's matrices lie, on a
CPU and on a GPU; without one it is two products over the matrices of all adapters, stacked along the rank, and a mask.
A few long stretches are two products each (S-LoRA, arXiv:2311.03285, has the same two cases), but the GPU's kernel
takes them too. PEFT's mixed batches choose an adapter per batch row; a packed batch is a single row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from decoding.adapters import Adapter, Lora
from decoding.attention import Tensor
from decoding.hosting import SpanInput
from decoding.upload import upload

FEW_TOKENS = 64  # up to here every token meets every adapter: more products, but a few calls only
PROBE = "\0probe"  # no id of a model's
LEAST_RANK = 16  # Triton's launches are the same for all ranks up to here

CaptureKey = tuple[int, int, int, frozenset[str]]  # the table's address and places, the rank, the layers with hooks
Kernel = Literal["cpu", "triton"]  # `trimtab::lora`, which `load_kernels()` has made; `triton_kernels.lora`


@dataclass(slots=True)
class Chosen:
    """Which adapter each token of one packed batch uses.

    runs: (adapter, first token, end) in order, none for tokens without one. What there is a kernel for has `owners`
    [T], the place of the token's adapter in `table` or -1: int64 for the CPU's, which takes few tokens; int32, with
    `max_rank`, for Triton's, which takes any number and has them on the device. Without a kernel few tokens have
    `masks` [T, K], one per layout, 1 where the token's adapter owns the column and 0 elsewhere. key: what a graph of
    the forward would hold, None where none can be captured.
    """

    tokens: int
    runs: tuple[tuple[str, int, int], ...]
    masks: tuple[Tensor, ...] = ()
    owners: Tensor | None = None
    table: Tensor | None = None
    max_rank: int = 0
    key: CaptureKey | None = None

    def to(self, device: torch.device) -> Chosen:
        """The same with `owners` on `device`, without waiting for it; everything else is there from the start."""
        return self if self.owners is None else replace(self, owners=upload(self.owners, device))

    def over(self, owners: Tensor) -> Chosen:
        """What a captured forward uses: `owners` [T] int32 on the device, which are written before each replay."""
        assert self.key is not None
        return Chosen(owners.shape[0], (), (), owners, self.table, self.max_rank, self.key)


@dataclass(slots=True)
class LoraLayer:
    """The adapters of linear layer `number`; where there is no kernel, also stacked: down [K, in], up [K, out].

    K is the sum of their ranks. layout: which of the set's masks fits, the same for layers with equally many rows of
    the same adapters.
    """

    number: int
    down: Tensor | None = None
    up: Tensor | None = None
    loras: dict[str, Lora] = field(default_factory=dict)
    layout: int = 0

    def stack(self) -> None:
        """Lay the adapters' matrices behind each other; the adapters then hold views of the stack, not copies."""
        self.down = self.up = None
        if not self.loras:
            return
        self.down = torch.cat([lora.down for lora in self.loras.values()])
        self.up = torch.cat([lora.up for lora in self.loras.values()])
        end = 0
        for id, lora in self.loras.items():
            start, end = end, end + lora.down.shape[0]
            self.loras[id] = Lora(self.down[start:end], self.up[start:end])

    def add(self, x: Tensor, y: Tensor, chosen: Chosen) -> Tensor:
        """x [.., in], y [.., out] the layer's own output, which is written to -> y with the adapters' share."""
        if chosen.owners is not None and not chosen.max_rank:
            torch.ops.trimtab.lora.default(x, y, chosen.table, self.number, chosen.owners)
            return y
        inputs, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if inputs.shape[0] != chosen.tokens:
            raise RuntimeError(f"an adapted layer saw {inputs.shape[0]} of {chosen.tokens} tokens")
        if chosen.owners is not None:
            from triton_kernels.lora import lora_

            assert chosen.table is not None
            lora_(inputs, out, chosen.owners, chosen.table[self.number], chosen.max_rank)
            return y
        if chosen.masks:
            assert self.down is not None
            assert self.up is not None
            out.addmm_((inputs @ self.down.T).mul_(chosen.masks[self.layout]), self.up)
            return y
        for id, start, end in chosen.runs:
            lora = self.loras.get(id)
            if lora is not None:
                out[start:end].addmm_(inputs[start:end] @ lora.down.T, lora.up)
        return y


class Loras:
    """The adapters that are loaded on one model. `chosen` is what the forward in progress uses; None costs nothing."""

    def __init__(self, model: nn.Module, head: nn.Module, kernel: Kernel | None = None) -> None:
        """`kernel` computes what it can; None keeps to plain torch."""
        self._kernel = kernel
        self._device = next(model.parameters()).device
        self._max_rank = LEAST_RANK
        self.linears = dict(_linears(model, head))
        self.adapters: dict[str, Adapter] = {}
        self.chosen: Chosen | None = None
        # Layers and hooks stay, whichever are in use: a compiled forward may have seen them.
        self._layers = {name: LoraLayer(number) for number, name in enumerate(self.linears)}
        self._hooks = {name: partial(_hook, self, layer) for name, layer in self._layers.items()}
        self._hooked: dict[str, Any] = {}
        self._layouts: list[tuple[tuple[str, int], ...]] = []
        self._table = self._addresses(8 if kernel == "triton" else 2)

    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of every layer that may be adapted."""
        return {name: _size(module) for name, module in self.linears.items()}

    def add(self, id: str, adapter: Adapter) -> None:
        """Load an adapter, in place of an earlier one with this id."""
        if id in self.adapters:
            self.remove(id)
        for name, lora in adapter.modules.items():
            if name not in self._hooked:
                self._hooked[name] = self.linears[name].register_forward_hook(self._hooks[name])
            self._layers[name].loras[id] = _aligned(lora) if self._kernel == "triton" else lora
        # The layers hold the only copy: the record keeps what describes it.
        self.adapters[id] = Adapter({}, adapter.generation)
        self._arrange(adapter.modules)

    def remove(self, id: str) -> None:
        """Unload an adapter; layers without one are as they were before."""
        del self.adapters[id]
        changed = [name for name, layer in self._layers.items() if layer.loras.pop(id, None) is not None]
        for name in changed:
            if not self._layers[name].loras:
                self._hooked.pop(name).remove()
        self._arrange(changed)

    @contextmanager
    def probe(self, like: Tensor) -> Iterator[str]:
        """The id of an adapter of rank 1 on every layer, for as long as the context is open."""
        noise, modules = torch.Generator().manual_seed(0), {}
        for name, (size, width) in self.sizes().items():
            down = torch.randn(1, size, generator=noise) * size**-0.5
            up = torch.randn(1, width, generator=noise) * 0.1
            modules[name] = Lora(down.to(like), up.to(like))
        self.add(PROBE, Adapter(modules, ""))
        try:
            yield PROBE
        finally:
            self.remove(PROBE)

    def bytes(self) -> int:
        """Memory of all adapters."""
        held = [lora for layer in self._layers.values() for lora in layer.loras.values()]
        return sum(lora.down.nbytes + lora.up.nbytes for lora in held)

    def choose(self, spans: Sequence[SpanInput], like: Tensor) -> Chosen | None:
        """What a forward of `spans` uses, its owners still on the host; None if no span names an adapter.

        Raises KeyError for an adapter that is not loaded.
        """
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
        if self._kernel == "triton":
            owners = torch.tensor(self._owners(runs, end), dtype=torch.int32)
            return Chosen(end, tuple(runs), (), owners, self._table, self._max_rank, self.capture_key())
        if end > FEW_TOKENS:
            return Chosen(end, tuple(runs))
        if self._kernel:
            return Chosen(end, tuple(runs), owners=torch.tensor(self._owners(runs, end)), table=self._table)
        # A mask has every loaded adapter multiplied once, runs have theirs once each.
        masked = len(self.adapters) <= 2 * len(runs)
        return Chosen(end, tuple(runs), self._masks(runs, end, like) if masked else ())

    def _owners(self, runs: Sequence[tuple[str, int, int]], tokens: int) -> list[int]:
        """Place of each token's adapter among those loaded, -1 for none."""
        places = {id: i for i, id in enumerate(self.adapters)}
        owners = [-1] * tokens
        for id, start, end in runs:
            owners[start:end] = [places[id]] * (end - start)
        return owners

    def _masks(self, runs: Sequence[tuple[str, int, int]], tokens: int, like: Tensor) -> tuple[Tensor, ...]:
        places = {id: i for i, id in enumerate(self.adapters)}
        token = torch.tensor(self._owners(runs, tokens), device=like.device)
        masks = []
        for layout in self._layouts:
            columns = torch.tensor([places[id] for id, rank in layout for _ in range(rank)], device=like.device)
            masks.append((token[:, None] == columns).to(like.dtype))  # [T, K]
        return tuple(masks)

    def _arrange(self, changed: Iterable[str]) -> None:
        """What the forwards read, after the adapters of the layers `changed` have changed."""
        if self._kernel == "triton":
            self._renew()
            return
        if self._kernel:
            self._table = self._addresses()
            return
        for name in changed:
            self._layers[name].stack()
        self._layouts = []
        for layer in filter(lambda layer: layer.loras, self._layers.values()):
            layout = tuple((id, lora.down.shape[0]) for id, lora in layer.loras.items())
            if layout not in self._layouts:
                self._layouts.append(layout)
            layer.layout = self._layouts.index(layout)

    def capture_key(self) -> CaptureKey:
        """What a captured graph with adapters has in it; one that was captured under another key must not run.

        A table may lie where an earlier, smaller one has been, so its address alone does not tell them apart.
        """
        return self._table.data_ptr(), self._table.shape[1], self._max_rank, frozenset(self._hooked)

    @torch.inference_mode()
    def _renew(self) -> None:
        """Write the table anew, where it was while it has the room, and grow the rank that launches are made for."""
        ranks = [lora.down.shape[0] for layer in self._layers.values() for lora in layer.loras.values()]
        self._max_rank = max(self._max_rank, 1 << (max(ranks, default=1) - 1).bit_length())
        table = self._addresses(self._table.shape[1])
        if table.shape == self._table.shape:
            self._table.copy_(table)
        else:
            self._table = self._addresses(2 * self._table.shape[1])

    @torch.inference_mode()  # always: a compiled forward tells such tensors from others
    def _addresses(self, least: int = 2) -> Tensor:
        """[linears, places, 3] int64: where each adapter's down and up lie on each layer, and its rank, 0 for none.

        At least `least` places, which is at least two: sizes of 0 and 1 would be compiled in. On the model's device.
        """
        places = max(least, len(self.adapters))
        nothing = (0, 0, 0)
        rows = []
        for layer in self._layers.values():
            loras = [layer.loras.get(id) for id in self.adapters]
            row = [(a.down.data_ptr(), a.up.data_ptr(), a.down.shape[0]) if a is not None else nothing for a in loras]
            rows.append(row + [nothing] * (places - len(row)))
        device = self._device if self._kernel == "triton" else "cpu"
        return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), places, 3)


def _aligned(lora: Lora) -> Lora:
    """The same matrices at addresses that the kernel can load whole vectors from."""
    down, up = (each.clone() if each.data_ptr() % 16 else each for each in (lora.down, lora.up))
    return Lora(down, up)


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
