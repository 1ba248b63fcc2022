"""Rotary position embedding of queries and keys together.

    a' = a cos_a - b sin_a        b' = b cos_b + a sin_b        for each pair (a, b) of a head's first `rotated` numbers

(Su et al. 2021, arXiv:2104.09864, equation 34.) A pair is (x_i, x_{i + rotated / 2}) as in Llama, or (x_{2i}, x_{2i+1})
as in GPT-J and Cohere (`interleaved`). cos and sin have a number for each of the rotated, laid out like them, or, with
`paired`, one for each pair in their first rotated / 2 columns. The rest of a head is passed on. Llama multiplies in the
model's dtype, so both products are rounded before the sum; `wide` keeps fp32 to the end, as Cohere does.

Launches: 1. Bytes: q and k read and written once (in place only what is rotated), cos and sin once for each 8 heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two

Tensor = torch.Tensor

HEADS = 8  # of one program


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotated: int, wide: bool) -> Tensor:
    turned, rest = x[..., :rotated], x[..., rotated:]  # [T, H, rotated], [T, H, d - rotated]
    if wide:
        turned = turned.float()
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    return torch.cat(((turned * cos + other * sin).to(x.dtype), rest), -1)


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    paired: bool = False,
    wide: bool = False,
    rotated: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `rope`."""
    rotated = rotated or cos.shape[-1]
    if paired:
        halves = (each[:, : rotated // 2] for each in (cos, sin))
        cos, sin = (h.repeat_interleave(2, -1) if interleaved else torch.cat((h, h), -1) for h in halves)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, rotated]
    first, second = (_rotate_reference(x, cos, sin, interleaved, rotated, wide) for x in (q, k))
    return first, second


@triton.jit
def _rotate(
    x_ptr, y_ptr, x_strides, y_strides, cos_ptr, sin_ptr, token, head, heads, rest,
    ROTATED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Eight heads of one token; cos_ptr and sin_ptr are at the token's rows, the heads' numbers have stride 1."""
    HALF: tl.constexpr = ROTATED // 2
    h = head + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    x_ptr += token * x_strides[0] + h * x_strides[1]
    y_ptr += token * y_strides[0] + h * y_strides[1]
    inside = (h < heads) & (pair < HALF)
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        whole = tl.load(x_ptr + both, mask=(h < heads) & (both < ROTATED), other=0.0)
        a, b = tl.split(tl.reshape(whole, (HEADS, PAIRS, 2)))
    else:
        a = tl.load(x_ptr + pair, mask=inside, other=0.0)
        b = tl.load(x_ptr + HALF + pair, mask=inside, other=0.0)
    if PAIRED:
        at_a, at_b = pair, pair
    elif INTERLEAVED:
        at_a, at_b = 2 * pair, 2 * pair + 1
    else:
        at_a, at_b = pair, pair + HALF
    cos_a = tl.load(cos_ptr + at_a, mask=pair < HALF, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + at_b, mask=pair < HALF, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + at_a, mask=pair < HALF, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + at_b, mask=pair < HALF, other=0.0).to(tl.float32)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    a_cos, b_sin, b_cos, a_sin = a * cos_a, b * sin_a, b * cos_b, a * sin_b
    if not WIDE:
        a_cos, b_sin = a_cos.to(dtype).to(tl.float32), b_sin.to(dtype).to(tl.float32)
        b_cos, a_sin = b_cos.to(dtype).to(tl.float32), a_sin.to(dtype).to(tl.float32)
    first, second = (a_cos - b_sin).to(dtype), (b_cos + a_sin).to(dtype)
    if INTERLEAVED:
        turned = tl.reshape(tl.join(first, second), (HEADS, 2 * PAIRS))
        tl.store(y_ptr + both, turned, mask=(h < heads) & (both < ROTATED))
    else:
        tl.store(y_ptr + pair, first, mask=inside)
        tl.store(y_ptr + HALF + pair, second, mask=inside)
    if REST:
        at = tl.arange(0, REST)[None, :]
        passed = tl.load(x_ptr + ROTATED + at, mask=(h < heads) & (at < rest))
        tl.store(y_ptr + ROTATED + at, passed, mask=(h < heads) & (at < rest))


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, cos_stride, sin_stride,
    q_strides, k_strides, q_out_strides, k_out_strides, q_heads, k_heads, rest,
    ROTATED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    if group < q_groups:
        _rotate(
            q_ptr, q_out_ptr, q_strides, q_out_strides, cos_ptr, sin_ptr, token, group * HEADS, q_heads, rest,
            ROTATED, PAIRS, REST, INTERLEAVED, PAIRED, WIDE, HEADS,
        )  # fmt: skip
    else:
        _rotate(
            k_ptr, k_out_ptr, k_strides, k_out_strides, cos_ptr, sin_ptr, token, (group - q_groups) * HEADS, k_heads,
            rest, ROTATED, PAIRS, REST, INTERLEAVED, PAIRED, WIDE, HEADS,
        )  # fmt: skip


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    paired: bool = False,
    wide: bool = False,
    rotated: int | None = None,
    in_place: bool = False,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The rotated q and k, new tensors with the strides of q and k where those are dense, or q and k themselves.

    q [T, H, d], k [T, KH, d] of one dtype, fp32, bf16 or fp16, and any strides; cos and sin [T, w] of that dtype, with
    `wide` of any. `rotated`, even and at most d, is w unless it is given: paired with 2 w = rotated there is nothing
    beyond the pairs' own. Raises ValueError if shapes or dtypes do not fit.
    """
    tokens, width = cos.shape
    size = q.shape[-1]
    turned = rotated or width
    fits = q.shape[0] == k.shape[0] == tokens and k.shape[2] == size and sin.shape == cos.shape and q.dtype == k.dtype
    if not fits or turned % 2 or turned > size or (width < turned // 2 if paired else width != turned):
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and {turned} rotated do not fit"
        )
    if not wide and (cos.dtype != q.dtype or sin.dtype != q.dtype):
        raise ValueError(f"rope: cos of {cos.dtype} for q of {q.dtype} needs wide=True")
    if not on_kernel(q, kernel):
        out = rope_reference(q, k, cos, sin, interleaved=interleaved, paired=paired, wide=wide, rotated=turned)
        return (q.copy_(out[0]), k.copy_(out[1])) if in_place else out
    if in_place and (q.stride(2) != 1 or k.stride(2) != 1):
        raise ValueError("rope: in place needs heads of stride 1")
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (cos, sin))
    q_out, k_out = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
    rest = 0 if in_place else size - turned
    groups = triton.cdiv(q.shape[1], HEADS) + triton.cdiv(k.shape[1], HEADS)
    if tokens:
        _rope_kernel[(tokens, groups)](
            q, k, q_out, k_out, cos, sin, cos.stride(0), sin.stride(0),
            q.stride()[:2], k.stride()[:2], q_out.stride()[:2], k_out.stride()[:2], q.shape[1], k.shape[1], rest,
            turned, power_of_two(turned // 2), power_of_two(rest) if rest else 0, interleaved, paired, wide, HEADS,
        )  # fmt: skip
    return q_out, k_out
