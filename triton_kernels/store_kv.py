"""Keys and values of a packed batch go to their places in the paged pool.

    keys[slot // B, :, :, slot % B] = key[t]    values[slot // B, :, slot % B, :] = value[t]    slot = slots[t] >= 0

Blocks of B positions (Kwon et al. 2023, arXiv:2309.06180); keys lie transposed, so that a block's keys of one head are
a [k_dim, B] tile that attention multiplies as it is. Tokens with a negative slot are not stored: they fill up a batch
whose size is fixed.

A program moves `TOKENS` tokens of one head. It reads along the dimensions and writes keys along the positions:
neighbouring tokens mostly lie next to each other in a block.

Launches: 1. Bytes: key and value read and written once, 8 a token for the slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_kernels.dispatch import on_kernel, power_of_two

Tensor = torch.Tensor
TOKENS = 16  # one sector of 32 bytes in bf16, a block at the usual block size


def store_kv_reference(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `store_kv`."""
    stored = slots >= 0
    block, offset = slots[stored] // keys.shape[3], slots[stored] % keys.shape[3]
    keys[block, :, :, offset] = key[stored]
    values[block, :, offset] = value[stored]


@triton.jit(do_not_specialize=["tokens"])
def _store_kv_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, slots_ptr, tokens,
    key_token, key_head, value_token, value_head, keys_block, keys_head, values_block, values_head,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token, mask=token < tokens, other=-1)
    stored = slot >= 0
    slot = tl.where(stored, slot, 0)
    block, offset = slot // SIZE, slot % SIZE

    dim = tl.arange(0, BLOCK_K)
    moved = stored[:, None] & (dim < K_DIM)[None, :]
    key = tl.load(key_ptr + token[:, None] * key_token + head * key_head + dim[None, :], mask=moved)  # [BLOCK_T, dk]
    to = block[None, :] * keys_block + head * keys_head + dim[:, None] * SIZE + offset[None, :]
    tl.store(keys_ptr + to, key.trans(), mask=moved.trans())

    dim = tl.arange(0, BLOCK_V)
    moved = stored[:, None] & (dim < V_DIM)[None, :]
    value = tl.load(value_ptr + token[:, None] * value_token + head * value_head + dim[None, :], mask=moved)
    to = block[:, None] * values_block + head * values_head + offset[:, None] * V_DIM + dim[None, :]
    tl.store(values_ptr + to, value, mask=moved)


def store_kv(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *, kernel: bool | None = None
) -> None:
    """Store key [T, KH, k_dim], value [T, KH, v_dim] in keys [blocks, KH, k_dim, B], values [blocks, KH, B, v_dim].

    slots [T] int64: block * B + offset, no two the same, negative for what is not stored. All of one dtype; key and
    value may have any strides over tokens and heads. Raises ValueError if the shapes do not fit.
    """
    tokens, heads, k_dim = key.shape
    v_dim, size = value.shape[-1], keys.shape[3]
    shapes = (value.shape[:2], slots.shape, keys.shape[1:], values.shape[1:], values.shape[0])
    if shapes != ((tokens, heads), (tokens,), (heads, k_dim, size), (heads, size, v_dim), keys.shape[0]):
        raise ValueError(
            f"store_kv: key {tuple(key.shape)}, value {tuple(value.shape)}, slots {tuple(slots.shape)} do not fit "
            f"a pool of keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        )
    if not on_kernel(key, kernel):
        store_kv_reference(key, value, keys, values, slots)
        return
    assert keys.is_contiguous()
    assert values.is_contiguous()
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    if tokens:
        _store_kv_kernel[(triton.cdiv(tokens, TOKENS), heads)](
            key, value, keys, values, slots, tokens, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            k_dim, v_dim, size, power_of_two(k_dim), power_of_two(v_dim), TOKENS,
        )  # fmt: skip
