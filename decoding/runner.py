"""One hosted model: packed forwards over a paged KV pool, through transformers' attention interface.

The runner owns KV and attention; the model's own code does everything else. It knows nothing about requests,
strategies or scheduling: it computes the spans it is given.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from decoding.adapters import read_adapter
from decoding.attention import Batch, HostedLayer, Tensor, attend_kernel, attend_reference, make_batch, make_pool
from decoding.core import AdapterInfo, ModelLoadError, Rows, SpanInput
from decoding.host_build import load_kernels
from decoding.host_compile import CompiledForward
from decoding.host_linear import FEW_ROWS, use_few_rows
from decoding.host_probe import probe
from decoding.lora import Loras

log = logging.getLogger(__name__)
COMPILED_CHUNK = 16  # longest chunk that is compiled although not all of its rows are wanted
COMPILE_FROM = 10_000_000  # parameters: below, a start of ten seconds would save less than a millisecond a tick
UNBOUNDED_LENGTH = 4096  # for models that state no context length


class Runner:
    """A model that computes packed spans. Not thread-safe: one engine thread calls it.

    `cost` is measured seconds per token of a prefill-like forward; only ratios between models matter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        id: str,
        max_model_len: int | None = None,
        *,
        compile: bool = True,
        kernels: bool = True,
    ) -> None:
        """Takes ownership of `model`: its attention implementation becomes this runner's.

        `compile` False makes `warm_up` do nothing, `kernels` False keeps to plain torch. Raises ModelLoadError when
        the model's attention cannot be hosted.
        """
        self.id = id
        self.model = model.eval().requires_grad_(False)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.parameters = sum(p.numel() for p in model.parameters())
        self.block_size = 16
        self.max_model_len = _length(model, max_model_len)
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._batch: Batch | None = None
        self._kept: Tensor | None = None
        self._may_compile = compile
        self._compiled: CompiledForward | None = None
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._name = _free_name()
        found = probe(model, self._name)
        self.layers: list[HostedLayer] = found.layers
        self.width, self.hidden_size = found.width, found.hidden_size
        suits = self.device.type == "cpu" and self.dtype in (torch.bfloat16, torch.float32)
        self._kernels = kernels and suits and load_kernels()
        if self._kernels:
            use_few_rows(model)
        self.loras = Loras(model, model.get_output_embeddings(), self._kernels)
        AttentionInterface.register(self._name, self._attend)
        self._head_hook = model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        self.cost = self._measure_cost()

    def close(self) -> None:
        """Give the registered name and the pool back; the runner cannot be used afterwards."""
        AttentionInterface._global_mapping.pop(self._name, None)
        self._head_hook.remove()
        self.release()

    # -- KV pool ------------------------------------------------------------------------------------------------

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block of `block_size` positions over all layers."""
        return sum(layer.spec.elements for layer in self.layers) * block_size * self.dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the pool of `num_blocks` blocks, numbered from 0; drops an earlier one."""
        self.block_size = block_size
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        for layer in self.layers:
            layer.keys, layer.values = make_pool(layer.spec, num_blocks, block_size, like)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer; sources are read before destinations are written."""
        if not pairs:
            return
        source, destination = torch.tensor(pairs, device=self.device).T
        with torch.inference_mode():
            for layer in self.layers:
                layer.keys[destination] = layer.keys[source]
                layer.values[destination] = layer.values[source]

    def release(self) -> None:
        """Drop the pool."""
        for layer in self.layers:
            layer.keys = layer.values = layer.keys.new_empty(0)

    # -- adapters -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load_adapter(self, id: str, path: str) -> AdapterInfo:
        """Load the PEFT LoRA directory `path` as `id`, in place of an earlier one; spans may then name it.

        Forwards without an adapter are not touched. Raises ModelLoadError, and then nothing has changed.
        """
        try:
            adapter = read_adapter(path, self.loras.sizes(), self._like)
        except ModelLoadError as error:
            raise ModelLoadError(f"Adapter '{id}' of '{self.id}': {error}") from error
        self.loras.add(id, adapter)
        return AdapterInfo(self.id, adapter.generation, adapter.parameters)

    def unload_adapter(self, id: str) -> None:
        """Forget an adapter; no span may name it any more. Raises KeyError if it is not loaded."""
        self.loras.remove(id)

    # -- forward ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, spans: Sequence[SpanInput], want_hidden: bool = False) -> Rows:
        """One packed forward: writes the spans' keys and values, and returns the wanted rows in the model's dtype.

        Spans of one forward must not write the same block. Logits [R, width], hidden [R, hidden_size].
        """
        assert self.layers[0].keys.numel(), "allocate() comes first"
        batch = make_batch(spans, self.block_size, self.device, grouped=not self._kernels)
        self.loras.chosen = self.loras.choose(spans, self._like)
        try:
            logits, hidden = self._compute(batch)
        finally:
            self.loras.chosen = None
        return Rows(logits, hidden if want_hidden else None)

    def warm_up(self) -> bool:
        """Compile the forward of few tokens, before traffic; False if the model stays eager.

        Takes seconds to a minute, less when torch's on-disk cache has seen the model. Call it after `allocate`,
        while no block is in use: it writes to blocks 0 and 1.
        """
        if self.parameters < COMPILE_FROM:
            return False
        room = self.layers[0].keys.shape[0] >= 2
        if not (self._may_compile and self._kernels and room) or self._compiled is not None:
            return self._compiled is not None
        several = [SpanInput([1], 0, [0], [0]), SpanInput([1, 2], 0, [1], [0, 1])]
        cases = [several[:1], several]
        expected = [self.forward(case).logits for case in cases]
        bound = 4 * torch.finfo(self.dtype).eps * len(self.layers) ** 0.5 + 1e-4
        try:
            self._compiled = CompiledForward(self._packed, self.layers, FEW_ROWS)
            for case, want in zip(cases * 2, expected * 2):  # twice: the second time without guards
                got = self.forward(case).logits
                if not (got - want).float().norm() <= bound * want.float().norm():
                    raise RuntimeError("the compiled forward differs from the eager one")
        except Exception as error:
            log.warning("Model '%s' stays eager, compiling it failed: %s", self.id, str(error)[:300])
            self._compiled = self._batch = self._kept = None
        return self._compiled is not None

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """logits [R, width], hidden [R, hidden_size] of the batch's rows, by the compiled forward where it pays.

        The compiled forward applies the head to every token, so long chunks with few rows go without it.
        """
        compiled = self._compiled if self.loras.chosen is None else None
        tokens = batch.slots.shape[0]
        if compiled is None or tokens > (compiled.max_tokens if batch.rows is None else COMPILED_CHUNK):
            return self._packed(batch)
        logits, hidden = compiled(batch)
        return (logits, hidden) if batch.rows is None else (logits[batch.rows], hidden[batch.rows])

    def _packed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """logits [R, width], hidden [R, hidden_size]: the model's own forward, with our attention."""
        self._batch, rows = batch, batch.rows
        keep = {"logits_to_keep": rows} if self._takes_rows and rows is not None else {}
        output = self.model(
            input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, return_dict=True, **keep
        )
        logits, hidden = output.logits[0], self._kept
        assert hidden is not None
        hidden = hidden.view(-1, hidden.shape[-1])
        self._batch = self._kept = None
        if rows is not None and not keep:
            return logits[rows], hidden[rows]
        return logits, hidden

    def _keep_hidden(self, _module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._kept = inputs[0]

    def _attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The hook: query [1, H, T, dk], key [1, KH, T, dk], value [1, KH, T, dv] -> [1, T, H, dv]."""
        batch = self._batch
        assert batch is not None
        layer: HostedLayer = module.trimtab  # type: ignore[assignment]
        sinks = kwargs.get("s_aux")
        if self._kernels:
            return attend_kernel(query, key, value, layer, batch, sinks), None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, dim]
        return attend_reference(q, k, v, layer, batch, sinks)[None], None

    def _measure_cost(self) -> float:
        """Seconds per token: the best of three forwards of one span over a throw-away pool."""
        n = min(64, self.max_model_len)
        span = SpanInput([0] * n, 0, range(-(-n // self.block_size)), [n - 1])
        self.allocate(len(span.blocks), self.block_size)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            self.forward([span])
            best = min(best, time.perf_counter() - start)
        self.release()
        return best / n


def _free_name() -> str:
    """A name that no attention function is registered under."""
    n = 0
    while f"trimtab_{n}" in AttentionInterface._global_mapping:
        n += 1
    return f"trimtab_{n}"


def _length(model: PreTrainedModel, wanted: int | None) -> int:
    """The model's own context length, or less if the operator wants less."""
    config = model.config
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if wanted is None:
        return int(own or UNBOUNDED_LENGTH)
    if own is not None and wanted > own:
        raise ModelLoadError(f"max_model_len {wanted} exceeds the {own} positions that the model was made for.")
    return wanted
