"""Cases of the kernels of a model's layers. Each function imports its kernel, which need not be in the tree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases import BF16, FP32, Case, Dims, Inputs, Tensor, drawn


def rms_norm_bytes(rows: int, width: int, residual: bool) -> int:
    """x read, y written; the residual read, the sum written."""
    return (4 if residual else 2) * rows * width * BF16


def rms_norm(d: Dims) -> list[Case]:
    from triton_kernels import rms_norm as k

    def make(rows: int, residual: bool, device: torch.device) -> Inputs:
        x, weight = drawn(d, device, rows, d.hidden), drawn(d, device, d.hidden)
        return x, weight, 1e-6, drawn(d, device, rows, d.hidden) if residual else None

    return [
        Case(
            "rms_norm",
            f"{rows} rows{', residual' if residual else ''}",
            partial(make, rows, residual),
            partial(k.rms_norm, kernel=True),
            k.rms_norm_reference,
            rms_norm_bytes(rows, d.hidden, residual),
        )
        for rows in (*d.rows, d.prefill)
        for residual in ((False, True) if rows == d.prefill else (True,))
    ]


def rope_bytes(rows: int, d: Dims, heads_a_program: int) -> int:
    """q and k read and written, cos and sin once for each program's heads."""
    programs = -(-d.heads // heads_a_program) + -(-d.kv_heads // heads_a_program)
    return rows * d.head_dim * BF16 * (2 * (d.heads + d.kv_heads) + 2 * programs)


def rope(d: Dims) -> list[Case]:
    from triton_kernels import rope as k

    def make(rows: int, device: torch.device) -> Inputs:
        q, key = (drawn(d, device, rows, heads, d.head_dim) for heads in (d.heads, d.kv_heads))
        angle = torch.rand(rows, d.head_dim // 2, device=device).repeat(1, 2)
        return q, key, angle.cos().to(d.dtype), angle.sin().to(d.dtype)

    return [
        Case(
            "rope",
            f"{rows} tokens",
            partial(make, rows),
            partial(k.rope, kernel=True),
            k.rope_reference,
            rope_bytes(rows, d, k.HEADS),
        )
        for rows in (*d.rows, d.prefill)
    ]


def swiglu(d: Dims) -> list[Case]:
    from triton_kernels import swiglu as k

    def make(rows: int, device: torch.device) -> Inputs:
        return drawn(d, device, rows, d.mlp), drawn(d, device, rows, d.mlp)

    call = partial(k.swiglu, kernel=True)
    return [
        Case("swiglu", f"{rows} rows", partial(make, rows), call, k.swiglu_reference, 3 * rows * d.mlp * BF16)
        for rows in (*d.rows, d.prefill)
    ]


def lora_bytes(tokens: int, uses: int, rank: int, width: int) -> int:
    """x read, y read and written; matrices once per use; h written and read, the splits of `in` left out."""
    return (3 * tokens * width + uses * 2 * rank * width) * BF16 + 2 * FP32 * rank * tokens


def lora(d: Dims) -> list[Case]:
    from triton_kernels import lora as k

    adapters, rank = 8, 16

    def make(tokens: int, device: torch.device) -> Inputs:
        loras = [(drawn(d, device, rank, d.hidden), drawn(d, device, rank, d.hidden)) for _ in range(adapters)]
        rows = [(down.data_ptr(), up.data_ptr(), rank) for down, up in loras]
        owners = torch.arange(tokens, dtype=torch.int32, device=device) * adapters // tokens
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        return drawn(d, device, tokens, d.hidden) * 0.02, drawn(d, device, tokens, d.hidden), owners, table, loras

    def call(x: Tensor, y: Tensor, owners: Tensor, table: Tensor, loras: Any) -> Tensor:
        k.lora_(x, y, owners, table, rank)
        return y

    def reference(x: Tensor, y: Tensor, owners: Tensor, table: Tensor, loras: Any) -> Tensor:
        k.lora_reference_(x, y, owners, loras)
        return y

    def uses(tokens: int) -> int:
        """A token's own, or its tile's of 32 tokens."""
        return tokens if tokens <= k.FEW_TOKENS else max(adapters, -(-tokens // 32))

    return [
        Case(
            "lora",
            f"{tokens} tokens, {adapters} adapters of rank {rank}",
            partial(make, tokens),
            call,
            reference,
            lora_bytes(tokens, uses(tokens), rank, d.hidden),
        )
        for tokens in (*d.rows, d.prefill)
    ]


def store_kv_bytes(tokens: int, kv_heads: int, head_dim: int) -> int:
    """Key and value read and written, 8 a token for its slot."""
    return tokens * (2 * 2 * kv_heads * head_dim * BF16 + 8)


def store_kv(d: Dims) -> list[Case]:
    from triton_kernels import store_kv as k

    def make(tokens: int, device: torch.device) -> Inputs:
        blocks = -(-tokens // 16) + 1
        pool = torch.zeros(2, blocks * d.kv_heads * d.head_dim * 16, dtype=d.dtype, device=device)
        keys = pool[0].view(blocks, d.kv_heads, d.head_dim, 16)
        values = pool[1].view(blocks, d.kv_heads, 16, d.head_dim)
        slots = torch.arange(tokens, device=device)
        return *drawn(d, device, 2, tokens, d.kv_heads, d.head_dim), keys, values, slots

    def stored(store: Callable[..., None], *inputs: Any) -> tuple[Tensor, Tensor]:
        store(*inputs)
        return inputs[2], inputs[3]

    return [
        Case(
            "store_kv",
            f"{tokens} tokens",
            partial(make, tokens),
            partial(stored, partial(k.store_kv, kernel=True)),
            partial(stored, k.store_kv_reference),
            store_kv_bytes(tokens, d.kv_heads, d.head_dim),
        )
        for tokens in (*d.rows, d.prefill)
    ]


def paged_attention_bytes(tracks: int, tokens: int, context: int, d: Dims, tiles: int = 1) -> int:
    """A track's keys and values once per tile, queries and outputs; parts of split contexts are left out."""
    kv = tracks * tiles * context * 2 * d.kv_heads * d.head_dim
    return (kv + 2 * tracks * tokens * d.heads * d.head_dim) * BF16


def paged_attention(d: Dims) -> list[Case]:
    from triton_kernels import paged_attention as k

    def make(tracks: int, tokens: int, context: int, device: torch.device) -> Inputs:
        width = -(-context // 16)
        blocks = tracks * width
        keys = drawn(d, device, blocks, d.kv_heads, d.head_dim, 16)
        values = drawn(d, device, blocks, d.kv_heads, 16, d.head_dim)
        tables = torch.randperm(blocks, device=device).int().view(tracks, width)
        starts = torch.arange(tracks + 1, dtype=torch.int32, device=device) * tokens
        ends = torch.full((tracks,), context, dtype=torch.int32, device=device)
        return drawn(d, device, tracks * tokens, d.heads, d.head_dim), keys, values, starts, ends, tables

    shapes = [(n, 1, context) for n in d.rows for context in (d.context, 8 * d.context)]
    shapes += [(n, 5, d.context) for n in d.rows]  # verification of four drafts
    scale = d.head_dim**-0.5
    made = [
        Case(
            "paged_attention",
            f"{tracks} tracks of {context}, {tokens} tokens each",
            partial(make, tracks, tokens, context),
            partial(k.paged_attention, scale=scale, kernel=True),
            partial(k.paged_attention_reference, scale=scale),
            paged_attention_bytes(tracks, tokens, context, d),
        )
        for tracks, tokens, context in shapes
    ]
    prefill = Case(
        "paged_attention",
        f"prefill of {d.prefill}",
        partial(make, 1, d.prefill, d.prefill),
        partial(k.paged_attention, scale=scale, kernel=True),
        partial(k.paged_attention_reference, scale=scale),
        None,  # bound by its products
    )
    return [*made, prefill]


LAYERS: dict[str, Callable[[Dims], list[Case]]] = {
    "rms_norm": rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "lora": lora,
    "store_kv": store_kv,
    "paged_attention": paged_attention,
}
