"""Noise on the device: the integers are those of the engine's own noise, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from decoding.noise import Lane, key_tensor, noise_key
from decoding.noise import gumbel as engine_gumbel
from decoding.noise import uniform as engine_uniform
from tests.triton_kernels.mutate import mutated
from triton_kernels import noise as subject

gumbel, uniform = subject.gumbel, subject.uniform
IDS = torch.tensor([0, 1, 2, 3, 77, 4095, 151_935, 262_143, 2**31 - 1, 5, 6, 7, 8, 9, 10, 11], dtype=torch.int32)


@triton.jit
def _noise_kernel(keys_ptr, ids_ptr, uniform_ptr, gumbel_ptr, WIDTH: tl.constexpr):
    i, at = tl.program_id(0), tl.arange(0, WIDTH)
    low, high, ids = tl.load(keys_ptr + 2 * i), tl.load(keys_ptr + 2 * i + 1), tl.load(ids_ptr + at)
    tl.store(uniform_ptr + i * WIDTH + at, uniform(low, high, ids))
    tl.store(gumbel_ptr + i * WIDTH + at, gumbel(low, high, ids))


def keys() -> torch.Tensor:
    made = [noise_key(seed, (seed,), 3 * seed, Lane.TOKEN) for seed in range(40)]
    return key_tensor([*made, 0, (1 << 64) - 1, 1 << 31, 1 << 63], torch.device("cpu"))


def on_device() -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.empty(2, len(keys()), len(IDS))
    _noise_kernel[(len(keys()),)](keys(), IDS, found[0], found[1], len(IDS))
    return found[0], found[1]


def test_noise_is_the_engines() -> None:
    u, g = on_device()
    assert torch.equal(u, engine_uniform(keys(), IDS[None]))
    # Two logarithms, each within an ulp; near u = 1 the outer one adds its argument's relative error of 1e-7.
    assert torch.allclose(g, engine_gumbel(keys(), IDS[None]), rtol=3e-7, atol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"), [("h ^= h >> 15", "h ^= h >> 14"), ("h >> 9", "h >> 8"), ("_mix32(_mix32(h)", "_mix32((h)")]
)
def test_broken_noise_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    monkeypatch.setitem(globals(), "uniform", module.uniform)
    assert not torch.equal(on_device()[0], engine_uniform(keys(), IDS[None]))
