"""What `cross.py` compiles: each kernel's wrapper on small CPU tensors, in the shapes that make different kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from triton_kernels.cutoffs import Cutoffs, cutoffs
from triton_kernels.distill_loss import KINDS, distill_loss
from triton_kernels.draw import Residual, draw
from triton_kernels.fusion_weights import fusion_weights
from triton_kernels.lora import lora_
from triton_kernels.mix import Edits, Gates, mix
from triton_kernels.paged_attention import paged_attention
from triton_kernels.preference_loss import token_logprobs
from triton_kernels.rms_norm import rms_norm
from triton_kernels.rope import rope
from triton_kernels.row_stats import row_stats
from triton_kernels.sample_verify import verify
from triton_kernels.store_kv import store_kv
from triton_kernels.swiglu import Activation, swiglu
from triton_kernels.top_logprobs import top_logprobs


def _cutoffs() -> None:
    for dtype, rows in ((torch.float32, torch.int32), (torch.bfloat16, torch.int64)):
        limits = (torch.ones(2), torch.ones(2, dtype=torch.int32), torch.ones(2), torch.ones(2))
        x, index = torch.zeros(2, 4096, dtype=dtype), torch.zeros(2, dtype=rows)
        cutoffs(x, index, 4096, *limits, kernel=True)
        cutoffs(x, index, 4096, *limits, index.int(), kernel=True)
        cutoffs(x, index, 4096, *limits, index.int(), torch.ones(2), kernel=True)


def _distill_loss() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = torch.zeros(2, 4, dtype=dtype, requires_grad=True), torch.zeros(152_064, 4, dtype=dtype)
        for kind in KINDS:
            distill_loss(hidden, weight, None, torch.zeros(2, 152_064), kind, per_position=True, kernel=True)
        distill_loss(hidden, weight, None, torch.zeros(2, 152_064, dtype=dtype), "lk", decay=3.0, kernel=True)


def _draw() -> None:
    z, ints, floats = torch.zeros(2, 4096), torch.zeros(2, dtype=torch.int32), torch.zeros(2)
    given = (z, floats, Cutoffs(floats, ints, floats, floats), torch.zeros(2, 2, dtype=torch.int32))
    draw(*given, kernel=True)
    draw(*given, ints[:1], Residual(None, None, ints), kernel=True)
    draw(*given, ints, Residual(z[:, :4000], ints, ints), kernel=True)


def _fusion_weights() -> None:
    for m in (1, 3):
        rows = [torch.zeros(2, 152_064) for _ in range(2 + m)]
        fusion_weights(rows[0], rows[1], rows[2:], 2.0, 0.1, True, kernel=True)


def _lora() -> None:
    table = torch.zeros(4, 3, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, rank in ((8, 16), (8, 64), (100, 8), (2000, 16), (2000, 64)):
            x, y = torch.zeros(tokens, 4096, dtype=dtype), torch.zeros(tokens, 4096, dtype=dtype)
            lora_(x, y, torch.zeros(tokens, dtype=torch.int32), table, rank)


def _mix() -> None:
    wide, narrow = torch.zeros(2, 4096), torch.zeros(2, 4100, dtype=torch.bfloat16)
    index, weights = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 3)
    mix([wide, narrow, narrow], index, 4096, weights, [0, 1, 2], kernel=True)
    ints = torch.zeros(3, dtype=torch.int32)
    gates = Gates([1, 2], [1, 2], torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32))
    edits = Edits(ints, ints, torch.zeros(3), torch.zeros(3), torch.zeros(2, dtype=torch.bool))
    masks = (torch.zeros(1, 128, dtype=torch.int32), ints[:2])
    floor = (0, torch.zeros(2))
    shifts = torch.zeros(3, 2)
    mix(
        [wide, narrow, narrow],
        index,
        4096,
        weights,
        [0, 1, 2],
        shifts,
        [-1, 0, 1],
        gates,
        floor,
        *masks,
        edits,
        kernel=True,
    )

    mix([wide[:, :1]], index[:1, :1], 1, weights[:1, :1], [0], kernel=True)  # 1 is a constant to the compiler


def _paged_attention() -> None:
    """Decode with parts and a long chunk without, of head dims that occur, with nothing and with all to honour."""
    bf16, dims = torch.bfloat16, ((128, 128), (192, 128), (256, 256), (80, 80))
    for dtype, k_dim, v_dim in (*((bf16, *each) for each in dims), (torch.float16, 64, 64), (torch.float32, 128, 128)):
        keys, values = torch.zeros(4, 2, k_dim, 16, dtype=dtype), torch.zeros(4, 2, 16, v_dim, dtype=dtype)
        tables, ends = torch.zeros(1, 64, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        every = {"window": 500, "chunk": 700, "softcap": 30.0, "sinks": torch.zeros(8, dtype=dtype)}
        for tokens, split, honoured in ((1, 512, every), (200, None, {})):
            query, starts = (
                torch.zeros(8, tokens, k_dim, dtype=dtype).transpose(0, 1),
                torch.zeros(2, dtype=torch.int32),
            )
            paged_attention(query, keys, values, starts, ends, tables, scale=0.1, split=split, kernel=True, **honoured)


def _preference_loss() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = torch.zeros(2, 4, dtype=dtype, requires_grad=True), torch.zeros(152_064, 4, dtype=dtype)
        token_logprobs(hidden, weight, None, torch.zeros(2, dtype=torch.int64), kernel=True).sum().backward()


def _rms_norm() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.zeros(3, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
        rms_norm(x, weight, 1e-6, kernel=True)
        rms_norm(x, weight, 1e-6, x, 1.0, kernel=True)


def _rope() -> None:
    """Llama's, Phi-3's part of a head, GPT-OSS's half a cosine, Cohere's and GLM's."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k = torch.zeros(32, 5, 128, dtype=dtype).transpose(0, 1), torch.zeros(5, 8, 128, dtype=dtype)
        cos = torch.zeros(5, 128, dtype=dtype)
        rope(q, k, cos, cos, kernel=True)
        rope(q, k, cos, cos, in_place=True, kernel=True)
        rope(q, k, cos[:, :96], cos[:, :96], kernel=True)
        rope(q, k, cos[:, :64], cos[:, :64], paired=True, rotated=128, kernel=True)
        rope(q, k, cos.float(), cos.float(), interleaved=True, wide=True, kernel=True)
        rope(q, k, cos[:, :64], cos[:, :64], interleaved=True, paired=True, kernel=True)


def _row_stats() -> None:
    row_stats(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1, kernel=True)
    row_stats(torch.zeros(2, 4096, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32), 4096, kernel=True)


def _sample_verify() -> None:
    flags = torch.zeros(2, dtype=torch.bool)
    verify(flags, torch.zeros(3, dtype=torch.int32), flags, kernel=True)


def _store_kv() -> None:
    for dtype, dim in ((torch.bfloat16, 128), (torch.float32, 256), (torch.bfloat16, 80)):
        keys, values = torch.zeros(4, 2, dim, 16, dtype=dtype), torch.zeros(4, 2, 16, 64, dtype=dtype)
        key, value = torch.zeros(2, 9, dim, dtype=dtype).transpose(0, 1), torch.zeros(9, 2, 64, dtype=dtype)
        store_kv(key, value, keys, values, torch.zeros(9, dtype=torch.int64), kernel=True)


def _swiglu() -> None:
    activations: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
    for dtype in (torch.bfloat16, torch.float32):
        for activation in activations:
            swiglu(torch.zeros(3, 2 * 14336, dtype=dtype), None, activation, kernel=True)
        swiglu(torch.zeros(3, 1000, dtype=dtype), torch.zeros(3, 1000, dtype=dtype), kernel=True)


def _top_logprobs() -> None:
    x, index = torch.zeros(2, 262144, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    top_logprobs(x, index, 262144, torch.zeros(2), index, 32, kernel=True)
    top_logprobs(x.float(), index, 1000, torch.zeros(2), index, 1, kernel=True)


CASES: dict[str, Callable[[], None]] = {
    "cutoffs": _cutoffs,
    "distill_loss": _distill_loss,
    "draw": _draw,
    "fusion_weights": _fusion_weights,
    "lora": _lora,
    "mix": _mix,
    "paged_attention": _paged_attention,
    "preference_loss": _preference_loss,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "row_stats": _row_stats,
    "sample_verify": _sample_verify,
    "store_kv": _store_kv,
    "swiglu": _swiglu,
    "top_logprobs": _top_logprobs,
}
