"""`attend_reference` on a GPU: two Triton kernels, which read the pool in place. Only this module needs triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.attention import Batch, HostedLayer, Tensor
from triton_kernels.paged_attention import choose_split, paged_attention
from triton_kernels.store_kv import store_kv


def attend_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: HostedLayer,
    batch: Batch,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `attend_reference`. On a CPU it takes triton's interpreter; the pool's blocks are a power of two long.

    query [T, H, k_dim], key [T, KH, k_dim], value [T, KH, v_dim], sinks [H] or None -> [T, H, v_dim].
    """
    spec = layer.spec
    assert batch.starts is not None
    assert batch.ends is not None
    store_kv(key, value, layer.keys, layer.values, batch.slots, kernel=True)
    return paged_attention(
        query,
        layer.keys,
        layer.values,
        batch.starts,
        batch.ends,
        batch.tables,
        scale=spec.scale,
        window=spec.window,
        chunk=spec.chunk,
        softcap=spec.softcap,
        sinks=sinks,
        split=batch.split,
        kernel=True,
    )


def fixed_split(layers: Sequence[HostedLayer], tokens: int, reach: int, device: torch.device) -> int:
    """Keys per part for batches of about `tokens` decoding tokens with contexts of any length up to `reach`."""
    return choose_split(tokens * min(layer.spec.kv_heads for layer in layers), reach, device)
