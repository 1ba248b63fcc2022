"""Paged attention as the runner sees it: the batch's metadata, the KV pool of one layer, and the torch specification.

One pool per layer, in blocks of `block_size` positions::

    keys    [blocks, kv_heads, k_dim, block_size]     a block's keys of one head are a [k_dim, positions] tile
    values  [blocks, kv_heads, block_size, v_dim]

Keys are stored transposed so that `q @ tile` needs no horizontal sums; `host_attention.cpp` and the GPU's kernels read
the tiles in place. `attend_reference` below is the specification: it gathers each sequence's tiles and works on any
device. It knows nothing about models, requests or compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from decoding.hosting import SpanInput

Tensor = torch.Tensor


class Group(NamedTuple):
    """Spans with equally many tokens, so that they are one batched product.

    tokens [n, m] positions in the packed batch, tables [n, blocks] block ids padded with 0.
    """

    tokens: Tensor
    tables: Tensor


@dataclass(slots=True)
class Batch:
    """One packed forward's metadata, built once and read by every layer.

    token_ids [1, T], positions [1, T], slots [T] (block * block_size + offset), tracks [T] (row of `tables`), all
    int64; tables [S, blocks] int32 padded with 0; rows [R] packed positions whose logits are wanted, None for all;
    `groups` is what the torch specification works on, empty when a kernel does it. For the GPU's kernels: starts
    [S + 1], where each track's tokens begin, and T; ends [S], its keys with those tokens; both int32. split: keys per
    part of a long context, None to choose by the batch.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tracks: Tensor
    tables: Tensor
    rows: Tensor | None
    groups: tuple[Group, ...] = ()
    starts: Tensor | None = None
    ends: Tensor | None = None
    split: int | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, without waiting for it."""
        if self.slots.device == device:
            return self
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return Batch(**(moved | {"groups": tuple(Group(*(_moved(x, device) for x in group)) for group in self.groups)}))


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the probe found out about one attention call: KV shape, and which keys a query may see.

    window: the last `window` positions, itself included (0: all). chunk: positions of the own chunk (0: all).
    softcap: tanh cap on the scores (0: none).
    """

    query_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0

    @property
    def elements(self) -> int:
        """KV elements of one position."""
        return self.kv_heads * (self.k_dim + self.v_dim)


@dataclass(slots=True)
class HostedLayer:
    """One attention module's place in the runner: what it does, and its share of the pool once allocated.

    Hangs on the module itself as `trimtab`, not in a list: a compiled layer would otherwise depend on its index.
    """

    spec: LayerSpec
    keys: Tensor
    values: Tensor


def make_pool(spec: LayerSpec, blocks: int, block_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (keys, values) of one layer, zeroed so that padding is never NaN."""
    keys = like.new_zeros(blocks, spec.kv_heads, spec.k_dim, block_size)
    values = like.new_zeros(blocks, spec.kv_heads, block_size, spec.v_dim)
    return keys, values


def make_batch(spans: Sequence[SpanInput], block_size: int, device: torch.device, grouped: bool) -> Batch:
    """Pack spans in order. Block tables must cover every position of their span."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tracks: list[int] = []
    rows: list[int] = []
    tables: list[list[int]] = []
    starts, ends = [0], []
    for track, span in enumerate(spans):
        first, n = len(tokens), len(span.token_ids)
        end = span.start + n
        needed = -(-end // block_size)
        blocks = span.blocks
        assert n > 0, "a span has tokens"
        assert len(blocks) >= needed, "a block table covers every position of its span"
        tokens.extend(span.token_ids)
        positions.extend(range(span.start, end))
        slots.extend([blocks[p // block_size] * block_size + p % block_size for p in range(span.start, end)])
        tracks.extend([track] * n)
        rows.extend([first + offset for offset in span.rows])
        tables.append(list(blocks[:needed]))
        starts.append(first + n)
        ends.append(end)
    width = max(len(table) for table in tables)
    for table in tables:
        table.extend([0] * (width - len(table)))
    packed = torch.tensor([tokens, positions, slots, tracks], dtype=torch.int64)
    table_tensor = torch.tensor(tables, dtype=torch.int32)
    bounds = torch.tensor(starts + ends, dtype=torch.int32)
    groups = _group(spans, table_tensor) if grouped else ()
    kept = None if len(rows) == len(tokens) else torch.tensor(rows, dtype=torch.int64)
    places = (packed[0:1], packed[1:2], packed[2], packed[3], table_tensor)
    return Batch(*places, kept, groups, bounds[: len(starts)], bounds[len(starts) :]).to(device)


def _moved(x: Any, device: torch.device) -> Any:
    """Tensors go through pinned memory, which is not used anew before the device has read it."""
    if not isinstance(x, Tensor):
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _group(spans: Sequence[SpanInput], tables: Tensor) -> tuple[Group, ...]:
    """Group spans by their number of tokens (decode: 1, verify: k + 1, prefill chunks: mostly alone)."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    first = 0
    for track, span in enumerate(spans):
        by_length.setdefault(len(span.token_ids), []).append((track, first))
        first += len(span.token_ids)
    groups = []
    for n, members in by_length.items():
        tracks = torch.tensor([track for track, _ in members], device=tables.device)
        starts = torch.tensor([start for _, start in members], device=tables.device)
        offsets = torch.arange(n, device=tables.device)
        groups.append(Group(starts[:, None] + offsets, tables[tracks].long()))
    return tuple(groups)


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: HostedLayer,
    batch: Batch,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store the packed keys and values, then attend over positions 0..own of each token's track.

    query [T, H, k_dim], key [T, KH, k_dim], value [T, KH, v_dim], sinks [H] or None -> [T, H, v_dim].
    Scores, softmax and sums are fp32 for bf16 inputs too.
    """
    keys, values, spec = layer.keys, layer.values, layer.spec
    size = keys.shape[3]
    block, offset = batch.slots // size, batch.slots % size
    keys[block, :, :, offset] = key
    values[block, :, offset] = value
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    for group in batch.groups:
        n, m = group.tokens.shape
        q = query[group.tokens].float()  # [n, m, H, dk]
        k = keys[group.tables].permute(0, 2, 3, 1, 4).flatten(3).float()  # [n, KH, dk, L]
        v = values[group.tables].transpose(1, 2).flatten(2, 3).float()  # [n, KH, L, dv]
        # All query heads of one KV head, for all tokens of the span, are rows of one product.
        q = q.view(n, m, spec.kv_heads, -1, spec.k_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [n, KH, m * G, dk]
        scores = (q @ k) * spec.scale  # [n, KH, m * G, L]
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        seen = _visible(batch.positions[0][group.tokens], k.shape[3], spec)  # [n, m, L]
        scores = scores.view(n, spec.kv_heads, m, -1, k.shape[3]).masked_fill(
            ~seen[:, None, :, None], float("-inf")
        )  # [n, KH, m, G, L]
        weights = _softmax(scores, sinks)
        mixed = weights.flatten(2, 3) @ v  # [n, KH, m * G, dv]
        mixed = mixed.view(n, spec.kv_heads, m, -1, spec.v_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [n, m, H, dv]
        out[group.tokens] = mixed.to(out.dtype)
    return out


def attend_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: HostedLayer,
    batch: Batch,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend_reference` as one opaque CPU operator that reads the pool in place; `load_kernels()` comes first.

    query [1, H, T, k_dim], key [1, KH, T, k_dim], value [1, KH, T, v_dim] -> [1, T, H, v_dim].
    """
    spec = layer.spec
    where = (batch.slots, batch.tracks, batch.positions, batch.tables)
    how = (spec.scale, spec.window, spec.chunk, spec.softcap)
    out: Tensor = torch.ops.trimtab.attend(query, key, value, layer.keys, layer.values, *where, *how, sinks)
    return out


def _visible(positions: Tensor, length: int, spec: LayerSpec) -> Tensor:
    """positions [n, m] of the queries -> bool [n, m, length]: which keys each may see."""
    own = positions[..., None]
    keys = torch.arange(length, device=positions.device)
    seen = keys <= own
    if spec.window:
        seen &= keys > own - spec.window
    if spec.chunk:
        seen &= keys >= own - own % spec.chunk
    return seen


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of [n, KH, m, G, L]; a sink is one more score per head that has no value."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.float().view(1, scores.shape[1], 1, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
