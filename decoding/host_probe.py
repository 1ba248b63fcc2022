"""Finds out how a model uses the attention interface: one call per layer, shapes, windows, caps, sinks.

The probe runs the real model on a few tokens with a recording attention function. What the recorder does not know
how to honour is refused: a wrong answer at start-up is a sentence, a wrong answer later is wrong text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from decoding.attention import HostedLayer, LayerSpec, Tensor
from decoding.core import ModelLoadError

HONOURED = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "is_causal"})
# Passed along for other attention functions; they do not change what is attended to.
IGNORED = frozenset(
    {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "return_dict", "logits_to_keep", "position_embeddings", "layer_idx"}
)
PROBE_TOKENS = 5


@dataclass(slots=True)
class Found:
    """What the probe learned: attention calls with their modules in order, logits' width, the head's input size."""

    layers: list[HostedLayer]
    modules: list[torch.nn.Module]
    width: int
    hidden_size: int


@dataclass(slots=True)
class _Recorder:
    """The attention function of the probe: notes each call and attends causally over the probe's own tokens."""

    kind: str
    layer_types: tuple[str, ...]
    chunk: int
    calls: list[LayerSpec] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if any(module is seen for seen in self.modules):
            raise ModelLoadError(f"{self.kind}: a layer calls its attention more than once per forward pass.")
        self._refuse_unknown(attention_mask, kwargs)
        self.calls.append(self._spec(query, key, value, kwargs))
        self.modules.append(module)
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, 1),
            value.repeat_interleave(groups, 1),
            is_causal=True,
            scale=kwargs.get("scaling"),
        )
        return out.transpose(1, 2).contiguous(), None

    def _refuse_unknown(self, mask: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        if mask is not None:
            raise ModelLoadError(f"{self.kind}: the model builds attention masks of its own, which cannot be paged.")
        unknown = sorted(
            k for k, v in kwargs.items() if k not in HONOURED | IGNORED and v is not None and v is not False
        )
        if unknown:
            raise ModelLoadError(f"{self.kind}: its attention takes {', '.join(unknown)}, which is not supported.")
        if kwargs.get("is_causal") is False:
            raise ModelLoadError(f"{self.kind}: its attention is not causal.")

    def _spec(self, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> LayerSpec:
        if query.shape[2] != PROBE_TOKENS or key.shape[2] != PROBE_TOKENS or query.shape[0] != 1:
            raise ModelLoadError(f"{self.kind}: its attention is not over the packed batch's own tokens.")
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
            raise ModelLoadError(f"{self.kind}: query heads are no multiple of the key and value heads.")
        index = len(self.calls)
        chunked = index < len(self.layer_types) and self.layer_types[index] == "chunked_attention"
        scale = kwargs.get("scaling")
        return LayerSpec(
            query_heads=query.shape[1],
            kv_heads=key.shape[1],
            k_dim=key.shape[3],
            v_dim=value.shape[3],
            scale=float(scale) if scale is not None else key.shape[3] ** -0.5,
            window=int(kwargs.get("sliding_window") or 0),
            chunk=self.chunk if chunked else 0,
            softcap=float(kwargs.get("softcap") or 0.0),
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, name: str) -> Found:
    """Switch `model` to attention `name`, run it on a few tokens, and number its attention modules in call order.

    Each attention module gets an attribute `trimtab`, its HostedLayer. Raises ModelLoadError for what cannot be hosted.
    """
    config = model.config
    kind = str(config.model_type)
    types = tuple(getattr(config, "layer_types", None) or ())
    recorder = _Recorder(kind, types, int(getattr(config, "attention_chunk_size", None) or 0))
    AttentionInterface.register(name, recorder)
    try:
        model.set_attn_implementation(name)
        if config._attn_implementation != name:
            raise ModelLoadError(f"{kind}: the model does not use transformers' attention interface.")
        ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
        seen: list[Tensor] = []
        head = model.get_output_embeddings()
        if head is None:
            raise ModelLoadError(f"{kind}: the model has no output head.")
        hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        output = model(input_ids=ids, position_ids=ids, use_cache=False, return_dict=True)
        hook.remove()
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{kind}: a forward pass without transformers' own cache fails: {error}") from error
    finally:
        AttentionInterface._global_mapping.pop(name, None)
    if not recorder.calls:
        raise ModelLoadError(f"{kind}: the model never called the attention interface.")
    if not seen:
        raise ModelLoadError(f"{kind}: the model never called its output head.")
    layers = int(getattr(config, "num_hidden_layers", len(recorder.calls)))
    if len(recorder.calls) != layers:
        reason = f"{layers} layers made {len(recorder.calls)} attention calls"
        raise ModelLoadError(f"{kind}: {reason}; layers without attention keep state that cannot be paged.")
    nothing = torch.empty(0, dtype=model.dtype, device=model.device)
    hosted = [HostedLayer(spec, nothing, nothing) for spec in recorder.calls]
    for module, layer in zip(recorder.modules, hosted):
        module.trimtab = layer  # type: ignore[assignment]
    return Found(hosted, recorder.modules, output.logits.shape[-1], seen[0].shape[-1])
