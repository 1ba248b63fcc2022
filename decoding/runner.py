"""One hosted model: packed forwards over a paged KV pool, through transformers' attention interface.

The runner owns KV and attention; the model's own code does everything else. It knows nothing about requests,
strategies or scheduling: it computes the spans it is given.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedModel

from decoding.adapters import read_adapter
from decoding.attention import Batch, HostedLayer, Tensor, attend_kernel, attend_reference, make_batch, make_pool
from decoding.core import ModelLoadError
from decoding.events import AdapterInfo
from decoding.graphs import INVARIANT_TOKENS, StaticForward, divide, static_forward
from decoding.heads import Head, HeadModel
from decoding.host_build import load_kernels
from decoding.host_compile import CompiledForward, mark_pools
from decoding.host_linear import FEW_ROWS, use_few_rows
from decoding.host_probe import probe
from decoding.hosting import Rows, SpanInput
from decoding.lora import Chosen, Kernel, Loras
from decoding.upload import uploaded

log = logging.getLogger(__name__)
COMPILED_CHUNK = 16  # longest chunk that is compiled although not all of its rows are wanted
HOST = torch.device("cpu")
UNBOUNDED_LENGTH = 4096  # for models that state no context length


class Runner:
    """A model that computes packed spans. Not thread-safe: one engine thread calls it.

    `cost` is measured seconds per token of a prefill-like forward; only ratios between models matter.
    """

    def __init__(
        self,
        model: PreTrainedModel | HeadModel,
        id: str,
        max_model_len: int | None = None,
        *,
        compile: bool = True,
        kernels: bool | Literal["triton"] = True,
        adapters: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        """Takes ownership of `model`: its attention implementation becomes this runner's.

        `compile` False makes `warm_up` do nothing, `kernels` False keeps to plain torch, "triton" has the GPU's kernels
        interpreted where there is no GPU. `adapters` has `warm_up` prepare for adapters that come later. With
        `batch_invariant` a row has the same bits in every batch: all forwards have `INVARIANT_TOKENS` tokens. Raises
        ModelLoadError when the model's attention cannot be hosted.
        """
        self.id = id
        self.model = model.eval().requires_grad_(False)
        self.head: Head | None = getattr(model, "about", None)  # of a scorer: rows are its outputs, not logits
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.parameters = sum(p.numel() for p in model.parameters())
        self.block_size = 16
        self.max_model_len = _length(model, max_model_len)
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._batch: Batch | None = None
        self._kept: Tensor | None = None
        self._may_compile = compile
        self._expects_adapters = adapters
        self._adapters_tried = False
        self._compiled: CompiledForward | None = None
        self._static: StaticForward | None = None
        self._invariant = False
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._name = _free_name()
        found = probe(model, self._name)
        self.layers: list[HostedLayer] = found.layers
        self.width, self.hidden_size = found.width, found.hidden_size
        suits = self.device.type == "cpu" and self.dtype in (torch.bfloat16, torch.float32)
        self._kernels = kernels is True and suits and load_kernels()
        self._triton = kernels == "triton" or (kernels and self.device.type == "cuda" and has_triton())
        self.be_batch_invariant(batch_invariant)
        if self._kernels:
            use_few_rows(model)
        self._patches = _patch(model) if self._triton and self.device.type == "cuda" else None
        kernel: Kernel | None = "cpu" if self._kernels else "triton" if self._triton else None
        self.loras = Loras(model, model.get_output_embeddings(), kernel)
        AttentionInterface.register(self._name, self._attend)
        self._head_hook = model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        self.cost = self._measure_cost()

    def close(self) -> None:
        """Give the registered name and the pool back; the runner cannot be used afterwards."""
        AttentionInterface._global_mapping.pop(self._name, None)
        self._head_hook.remove()
        if self._patches is not None:
            self._patches.unpatch()
        self.release()

    def be_batch_invariant(self, on: bool) -> None:
        """Whether rows have the same bits in every batch; before `allocate`. Raises ModelLoadError if they cannot."""
        if on and not (self._kernels or self._triton):
            raise ModelLoadError("Rows that do not depend on their batch need kernels: triton, or a C++ compiler.")
        if on and has_experts(self.model):
            raise ModelLoadError(
                f"'{self.id}' is a mixture of experts: how many tokens an expert gets depends on the batch, and "
                "so do the bits of its rows. Serve it without batch_invariant."
            )
        self._invariant = on

    # -- KV pool ------------------------------------------------------------------------------------------------

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block of `block_size` positions over all layers."""
        return sum(layer.spec.elements for layer in self.layers) * block_size * self.dtype.itemsize

    @torch.inference_mode(False)  # always: a compiled forward tells inference tensors from others
    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the pool of `num_blocks` blocks, numbered from 0; drops an earlier one."""
        self.block_size = block_size
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        for layer in self.layers:
            layer.keys, layer.values = make_pool(layer.spec, num_blocks, block_size, like)
        graphs = self._triton and self.device.type == "cuda" and self._may_compile
        self._static = static_forward(
            self._packed,
            self.layers,
            self.max_model_len,
            triton=self._triton,
            graphs=graphs,
            invariant=self._invariant,
        )

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer; sources are read before destinations are written."""
        if not pairs:
            return
        source, destination = uploaded(pairs, self.device).T
        with torch.inference_mode():
            for layer in self.layers:
                layer.keys[destination] = layer.keys[source]
                layer.values[destination] = layer.values[source]

    def release(self) -> None:
        """Drop the pool."""
        for layer in self.layers:
            layer.keys = layer.values = layer.keys.new_empty(0)
        self._static = None

    # -- adapters -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load_adapter(self, id: str, path: str) -> AdapterInfo:
        """Load the PEFT LoRA directory `path` as `id`, in place of an earlier one; spans may then name it.

        Forwards without an adapter are not touched. After `warm_up`, the first adapter of a model that did not expect
        any takes the seconds of compiling a forward for it. Raises ModelLoadError, and then nothing has changed.
        """
        if self.head is not None:
            raise ModelLoadError(
                f"Adapter '{id}' of '{self.id}': adapters on models with a scoring head are not served."
            )
        try:
            adapter = read_adapter(path, self.loras.sizes(), self._like)
        except ModelLoadError as error:
            raise ModelLoadError(f"Adapter '{id}' of '{self.id}': {error}") from error
        self.loras.add(id, adapter)
        if self._compiled is not None:
            self._compile_for_adapters(self._compiled)
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
        parts = divide(spans, INVARIANT_TOKENS) if self._invariant else [spans]
        done = [self._compute(*self._pack(part)) for part in parts]
        logits, hidden = done[0] if len(done) == 1 else (torch.cat(each) for each in zip(*done))
        return Rows(logits, hidden if want_hidden else None)

    def warm_up(self, compile_from: int = 0) -> bool:
        """Compile the forward of few tokens, before traffic; False if the model stays eager.

        Takes seconds to a minute, less when torch's on-disk cache has seen the model. The pool is not touched.
        """
        if not self._may_compile or self.parameters < compile_from:
            return False
        if self._static is not None:
            self._static.prepare(FEW_ROWS)
            if self._static.quick and (self._expects_adapters or self.loras.adapters):
                self._prepare_adapted(self._static)
            return self._static.quick
        if not self._kernels:
            return False
        if self._compiled is None:
            compiled = CompiledForward(self._packed, FEW_ROWS)
            spans = [SpanInput([1], 0, [0], [0]), SpanInput([1, 2], 0, [1], [0, 1])]
            self._compiled = compiled if self._agrees(compiled, [spans[:1], spans]) else None
        if self._compiled is not None and (self._expects_adapters or self.loras.adapters):
            self._compile_for_adapters(self._compiled)
        return self._compiled is not None

    def _prepare_adapted(self, static: StaticForward) -> None:
        """As for the adapters that are loaded; before there are any, as for one of a small rank on every layer."""
        some = nullcontext(next(iter(self.loras.adapters))) if self.loras.adapters else self.loras.probe(self._like)
        with some as adapter:
            static.prepare(FEW_ROWS, self.loras.choose([SpanInput([1], 0, [0], [0], adapter)], self._like))

    def _compile_for_adapters(self, compiled: CompiledForward) -> None:
        """Once: the compiled forward then serves whichever adapters come and go, on whichever layers."""
        if self._adapters_tried:
            return
        self._adapters_tried = True
        with self.loras.probe(self._like) as probe:
            one = SpanInput([1], 0, [0], [0], probe)
            several = [SpanInput([1], 0, [0], [0]), SpanInput([1, 2], 0, [1], [0, 1], probe)]
            if not self._agrees(compiled, [several, [one]]):
                compiled.made.discard("adapted")

    def _agrees(self, compiled: CompiledForward, cases: Sequence[Sequence[SpanInput]]) -> bool:
        """Compile what `cases` need, and compare it with the eager forward; they use the first two blocks of a pool."""
        bound = 4 * torch.finfo(self.dtype).eps * len(self.layers) ** 0.5 + 1e-4
        try:
            with self._scratch_pool(), torch.inference_mode():
                mark_pools(self.layers)
                for case in [*cases, *cases]:  # twice: the second time without guards
                    batch, chosen = self._pack(case)
                    (got, _), (want, _) = compiled(batch, chosen), self._packed(batch, chosen)
                    if not (got - want).float().norm() <= bound * want.float().norm():
                        raise RuntimeError("the compiled forward differs from the eager one")
        except Exception as error:
            log.warning("Model '%s' stays eager, compiling it failed: %s", self.id, str(error)[:300])
            return False
        finally:
            self._batch = self._kept = self.loras.chosen = None
        return True

    @contextmanager
    def _scratch_pool(self) -> Iterator[None]:
        """Two blocks in place of the pool, whose blocks may be in use."""
        pools = [(layer.keys, layer.values) for layer in self.layers]
        self.allocate(2, self.block_size)
        try:
            yield
        finally:
            for layer, (keys, values) in zip(self.layers, pools, strict=True):
                layer.keys, layer.values = keys, values

    def _pack(self, spans: Sequence[SpanInput]) -> tuple[Batch, Chosen | None]:
        batch = make_batch(spans, self.block_size, HOST, grouped=not (self._kernels or self._triton))
        padding = INVARIANT_TOKENS - batch.slots.shape[0] if self._invariant else 0
        if padding:
            spans = [*spans, SpanInput([0] * padding, 0, [], [])]
        return batch, self.loras.choose(spans, self._like)

    def _compute(self, batch: Batch, chosen: Chosen | None) -> tuple[Tensor, Tensor]:
        """logits [R, width], hidden [R, hidden_size] of the batch's rows, by a quicker forward where it pays.

        The quicker ones apply the head to every token, so long chunks with few rows go without them.
        """
        static, compiled, tokens = self._static, self._compiled, batch.slots.shape[0]
        pays = batch.rows is None or tokens <= COMPILED_CHUNK
        quick: StaticForward | CompiledForward
        if static is not None and (self._invariant or (pays and static.takes(batch, chosen))):
            quick = static
        elif compiled is not None and pays and compiled.takes(tokens, chosen):
            quick = compiled
        else:
            return self._packed(batch.to(self.device), None if chosen is None else chosen.to(self.device))
        logits, hidden = quick(batch, chosen)
        if batch.rows is None:
            return logits, hidden
        rows = batch.rows.to(self.device, non_blocking=True)
        return logits[rows], hidden[rows]

    def _packed(self, batch: Batch, chosen: Chosen | None) -> tuple[Tensor, Tensor]:
        """logits [R, width], hidden [R, hidden_size]: the model's own forward, with our attention."""
        self._batch, self.loras.chosen, rows = batch, chosen, batch.rows
        keep = {"logits_to_keep": rows} if self._takes_rows and rows is not None else {}
        output = self.model(
            input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, return_dict=True, **keep
        )
        logits, hidden = output.logits[0], self._kept
        assert hidden is not None
        hidden = hidden.view(-1, hidden.shape[-1])
        self._batch = self._kept = self.loras.chosen = None
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
        if self._triton:
            from decoding.device_attention import attend_triton

            return attend_triton(q, k, v, layer, batch, sinks)[None], None
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
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - start)
        self.release()
        return best / n


def has_triton() -> bool:
    """Whether the GPU's kernels can run: triton is not there on every platform."""
    return importlib.util.find_spec("triton") is not None


def _patch(model: torch.nn.Module) -> Any:
    """Kernels in the model's own modules; what they make of its logits is compared with the rest, at load."""
    from decoding.patches import patch  # imports triton

    return patch(model)


def _free_name() -> str:
    """A name that no attention function is registered under."""
    n = 0
    while f"trimtab_{n}" in AttentionInterface._global_mapping:
        n += 1
    return f"trimtab_{n}"


def has_experts(model: torch.nn.Module) -> bool:
    """Whether tokens go to different experts. Their weights are stacked, or modules of a list."""
    return any(".experts." in name or weight.ndim == 3 for name, weight in model.named_parameters())


def _length(model: PreTrainedModel, wanted: int | None) -> int:
    """The model's own context length, or less if the operator wants less."""
    config = model.config
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if wanted is None:
        return int(own or UNBOUNDED_LENGTH)
    if own is not None and wanted > own:
        raise ModelLoadError(f"max_model_len {wanted} exceeds the {own} positions that the model was made for.")
    return wanted
