"""Storing keys and values: the kernel in the interpreter against the reference, bit for bit, and the layout by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import triton_kernels.store_kv
from tests.triton_kernels.mutate import mutated
from triton_kernels.store_kv import store_kv, store_kv_reference

BLOCKS = 9
SHAPES = [(1, 1, 1, 1, 1), (1, 2, 16, 16, 16), (17, 2, 24, 20, 4), (33, 3, 5, 80, 16)]  # tokens, heads, dims, block
Store = Callable[..., None]


def differs(store: Store, shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> bool:
    """Whether `store` leaves another pool than the reference does; every fourth token is padding."""
    tokens, heads, k_dim, v_dim, size = shape
    noise = torch.Generator().manual_seed(1)
    key = torch.randn(heads, tokens, k_dim, generator=noise).to(dtype).transpose(0, 1)  # as models hand it over
    value = torch.randn(tokens, heads, v_dim + 3, generator=noise).to(dtype)[..., :v_dim]
    slots = torch.randperm(BLOCKS * size, generator=noise)[:tokens]
    slots[1::4] = -1
    keys = torch.randn(BLOCKS, heads, k_dim, size, generator=noise).to(dtype)
    values = torch.randn(BLOCKS, heads, size, v_dim, generator=noise).to(dtype)
    want = keys.clone(), values.clone()
    store_kv_reference(key, value, *want, slots)
    store(key, value, keys, values, slots, kernel=True)
    return not (torch.equal(keys, want[0]) and torch.equal(values, want[1]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_stores_what_the_reference_stores(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    assert not differs(store_kv, shape, dtype)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_token_lands_in_its_slot_and_padding_nowhere(kernel: bool) -> None:
    key, value = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    keys, values = torch.zeros(4, 2, 5, 8), torch.zeros(4, 2, 8, 7)
    store_kv(key, value, keys, values, torch.tensor([2 * 8 + 3, -1, 0]), kernel=kernel)
    assert torch.equal(keys[2, :, :, 3], key[0])
    assert torch.equal(values[2, :, 3], value[0])
    assert torch.equal(keys[0, :, :, 0], key[2])
    assert int((keys != 0).sum()) == 2 * 2 * 5
    assert int((values != 0).sum()) == 2 * 2 * 7


STORED = "stored = slot >= 0\n    slot = tl.where(stored, slot, 0)"
MUTATIONS = [
    (STORED, "stored = token < tokens\n    slot = tl.maximum(slot, 0)"),  # padding goes to the first slot
    (" + offset[None, :]", ""),
    ("key.trans()", "key.reshape(BLOCK_K, BLOCK_T)"),
    ("head * value_head +", "0 * value_head +"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_broken_kernels_are_found(old: str, new: str, tmp_path: Path) -> None:
    store = mutated(triton_kernels.store_kv.__file__, old, new, tmp_path).store_kv
    assert any(differs(store, shape) for shape in SHAPES[1:3])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        store_kv(
            torch.zeros(1, 2, 8),
            torch.zeros(1, 2, 8),
            torch.zeros(1, 2, 8, 4),
            torch.zeros(1, 2, 4, 9),
            torch.zeros(1, dtype=torch.int64),
        )
