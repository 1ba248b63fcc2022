"""LoRA of packed tokens, each with its own adapter or none, for adapters that lie anywhere on the device.

    y_t += (x_t down_a^T) up_a        a the adapter of token t, down_a [r_a, in], up_a [r_a, out]

(Hu et al. 2021, arXiv:2106.09685, equation 3, the scaling already in `up`; batched over adapters as in S-LoRA,
arXiv:2311.03285, section 5.) The kernels are told addresses, not tensors, so that adapters may come and go under a
captured graph and are never copied together. h = x down^T is kept in fp32 and y is rounded once; beyond
`FEW_TOKENS` both products go to the tensor cores, which take h in x's dtype.

Launches: 2, shrink (x to h) and expand (h to y). With few tokens every (token, slice) is a program, and a token costs
what its own adapter costs. With many, a program has a tile of tokens and goes through the adapters that occur in it,
usually one, for a request's tokens lie together. Few programs would leave most of the device idle, so `in` is split
over `splits` programs, whose parts of h are summed by expand.
Bytes: x read once, y read and written once, each adapter's matrices once per token or tile that uses it, h (4 max_rank
splits a token) written once and read once per tile of y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import power_of_two

Tensor = torch.Tensor

FEW_TOKENS = 64  # up to here a program has one token
PROGRAMS = 512  # that shrink is split into where there are few tokens: about four a multiprocessor
ALIGNMENT = 16  # bytes: the matrices' addresses are multiples of it


def lora_reference_(x: Tensor, y: Tensor, owners: Tensor, loras: Sequence[tuple[Tensor, Tensor] | None]) -> None:
    """See `lora_`; `loras` are the adapters' (down [r, in], up [r, out]), None for one that leaves the layer alone."""
    for number, lora in enumerate(loras):
        if lora is not None:
            mine = owners == number
            down, up = lora
            y[mine] = (y[mine].float() + x[mine].float() @ down.float().T @ up.float()).to(y.dtype)


@triton.jit
def _next_adapter(owners, last):
    """The smallest adapter above `last` among `owners`; the largest int32 after the last one."""
    return tl.min(tl.where(owners > last, owners, 2147483647), axis=0)


@triton.jit(do_not_specialize=["tokens"])
def _shrink_rows_kernel(
    x_ptr, owners_ptr, table_ptr, h_ptr, tokens, width, x_stride, h_width, part,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, split, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_R
    owner = tl.load(owners_ptr + token)
    if owner >= 0:
        rank = tl.load(table_ptr + 3 * owner + 2).to(tl.int32)
        if first < rank:
            down_ptr = tl.multiple_of(tl.load(table_ptr + 3 * owner).to(x_ptr.dtype), 16)
            r = first + tl.arange(0, BLOCK_R)
            total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
            for start in range(split * part, tl.minimum(split * part + part, width), BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                x = tl.load(x_ptr + token * x_stride + k, mask=k < width, other=0.0).to(tl.float32)
                down = tl.load(
                    down_ptr + r[:, None].to(tl.int64) * width + k[None, :],
                    mask=(r[:, None] < rank) & (k[None, :] < width), other=0.0,
                ).to(tl.float32)  # fmt: skip
                total += x[None, :] * down
            h = tl.sum(total, axis=1)
            tl.store(h_ptr + (split * tokens + token) * h_width + r, h, mask=r < rank)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _expand_rows_kernel(
    h_ptr, owners_ptr, table_ptr, y_ptr, tokens, width, y_stride, h_width, splits,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners_ptr + token)
    if owner >= 0:
        rank = tl.load(table_ptr + 3 * owner + 2).to(tl.int32)
        if rank > 0:
            up_ptr = tl.multiple_of(tl.load(table_ptr + 3 * owner + 1).to(y_ptr.dtype), 16)
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            parts = tl.arange(0, BLOCK_S)[:, None]
            total = tl.zeros((BLOCK_N,), dtype=tl.float32)
            for first in range(0, rank, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                h = tl.load(
                    h_ptr + (parts * tokens + token) * h_width + r[None, :],
                    mask=(parts < splits) & (r[None, :] < rank), other=0.0,
                )  # fmt: skip
                h = tl.sum(h, axis=0)
                up = tl.load(
                    up_ptr + r[:, None].to(tl.int64) * width + n[None, :],
                    mask=(r[:, None] < rank) & (n[None, :] < width), other=0.0,
                ).to(tl.float32)  # fmt: skip
                total += tl.sum(h[:, None] * up, axis=0)
            at = y_ptr + token * y_stride + n
            y = tl.load(at, mask=n < width, other=0.0).to(tl.float32) + total
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["tokens"])
def _shrink_tiles_kernel(
    x_ptr, owners_ptr, table_ptr, h_ptr, tokens, width, x_stride, h_width, part,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split, first = tl.program_id(1), tl.program_id(2) * BLOCK_R
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    owners = tl.load(owners_ptr + t, mask=t < tokens, other=-1)
    rows = t.to(tl.int64)
    r = first + tl.arange(0, BLOCK_R)
    adapter = _next_adapter(owners, -1)
    while adapter < 2147483647:
        rank = tl.load(table_ptr + 3 * adapter + 2).to(tl.int32)
        if first < rank:
            down_ptr = tl.multiple_of(tl.load(table_ptr + 3 * adapter).to(x_ptr.dtype), 16)
            mine = owners == adapter
            total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
            for start in range(split * part, tl.minimum(split * part + part, width), BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                x = tl.load(
                    x_ptr + rows[:, None] * x_stride + k[None, :],
                    mask=mine[:, None] & (k[None, :] < width), other=0.0,
                )  # fmt: skip
                down = tl.load(
                    down_ptr + r[None, :].to(tl.int64) * width + k[:, None],
                    mask=(r[None, :] < rank) & (k[:, None] < width), other=0.0,
                )  # fmt: skip
                total = tl.dot(x, down, total, input_precision="ieee")
            at = h_ptr + (split * tokens + rows[:, None]) * h_width + r[None, :]
            tl.store(at, total, mask=mine[:, None] & (r[None, :] < rank))
        adapter = _next_adapter(owners, adapter)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _expand_tiles_kernel(
    h_ptr, owners_ptr, table_ptr, y_ptr, tokens, width, y_stride, h_width, splits,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    owners = tl.load(owners_ptr + t, mask=t < tokens, other=-1)
    rows = t.to(tl.int64)
    adapter = _next_adapter(owners, -1)
    if adapter < 2147483647:
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        while adapter < 2147483647:
            rank = tl.load(table_ptr + 3 * adapter + 2).to(tl.int32)
            up_ptr = tl.multiple_of(tl.load(table_ptr + 3 * adapter + 1).to(y_ptr.dtype), 16)
            mine = owners == adapter
            for first in range(0, rank, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
                for split in range(splits):
                    h += tl.load(
                        h_ptr + (split * tokens + rows[:, None]) * h_width + r[None, :],
                        mask=mine[:, None] & (r[None, :] < rank), other=0.0,
                    )  # fmt: skip
                up = tl.load(
                    up_ptr + r[:, None].to(tl.int64) * width + n[None, :],
                    mask=(r[:, None] < rank) & (n[None, :] < width), other=0.0,
                )  # fmt: skip
                total = tl.dot(h.to(up.dtype), up, total, input_precision="ieee")
            adapter = _next_adapter(owners, adapter)
        at = y_ptr + rows[:, None] * y_stride + n[None, :]
        inside = (owners[:, None] >= 0) & (n[None, :] < width)
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32) + total
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


def lora_(x: Tensor, y: Tensor, owners: Tensor, table: Tensor, max_rank: int) -> None:
    """Add each token's adapter to `y` in place: always by the kernel, for only that can follow an address.

    x [T, in] and y [T, out] of one dtype, fp32, bf16 or fp16, rows of any stride; owners [T] int32, the adapter of each
    token or -1; table [adapters, 3] int64: addresses of down [r, in] and up [r, out], both contiguous, in x's dtype, on
    x's device and multiples of 16, and r, 0 for an adapter that leaves this layer alone. No r exceeds max_rank. Raises
    ValueError for shapes and dtypes that do not fit; what the table says is not looked at, the caller vouches for it.
    """
    tokens = x.shape[0]
    if x.dim() != 2 or y.dim() != 2 or y.shape[0] != tokens or owners.shape != (tokens,):
        raise ValueError(f"lora_: x {tuple(x.shape)}, y {tuple(y.shape)} and owners {tuple(owners.shape)} do not fit")
    if x.dtype != y.dtype or owners.dtype != torch.int32 or table.dtype != torch.int64:
        raise ValueError("lora_: x and y of one dtype, owners int32 and table int64")
    if table.dim() != 2 or table.shape[1] != 3 or not table.is_contiguous() or not owners.is_contiguous():
        raise ValueError("lora_: a contiguous table [adapters, 3] and contiguous owners")
    if y.stride(1) != 1:
        raise ValueError("lora_: y, which is written to, has rows of stride 1")
    if not tokens or max_rank < 1:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    width, out = x.shape[1], y.shape[1]
    few = tokens <= FEW_TOKENS
    wide = x.dtype == torch.float32  # exact products of fp32 are not the tensor cores': smaller tiles, or they spill
    block_t = 1 if few else 32 if tokens <= 1024 or wide else 64
    block_r = min(32 if wide else 64, power_of_two(max_rank, 16))  # a product's sizes are at least 16
    block_k = 4096 // block_r if few else 64
    few_r = min(block_r, 32)
    block_n = 4096 // few_r if few else 64 if wide else 128
    tiles, slices = triton.cdiv(tokens, block_t), triton.cdiv(max_rank, block_r)
    wanted = max(1, min(PROGRAMS // (tiles * slices), triton.cdiv(width, 2 * block_k), 16 if few else 8))
    part = triton.cdiv(triton.cdiv(width, wanted), block_k) * block_k
    splits = triton.cdiv(width, part)
    h_width = block_r * slices
    h = torch.empty(splits, tokens, h_width, dtype=torch.float32, device=x.device)
    shrunk = (x, owners, table, h, tokens, width, x.stride(0), h_width, part)
    expanded = (h, owners, table, y, tokens, out, y.stride(0), h_width, splits)
    if few:
        _shrink_rows_kernel[(tiles, splits, slices)](*shrunk, block_r, block_k)
        _expand_rows_kernel[(tiles, triton.cdiv(out, block_n))](*expanded, few_r, block_n, power_of_two(splits))
    else:
        _shrink_tiles_kernel[(tiles, splits, slices)](*shrunk, block_t, block_r, block_k)
        _expand_tiles_kernel[(tiles, triton.cdiv(out, block_n))](*expanded, block_t, block_r, block_n)
