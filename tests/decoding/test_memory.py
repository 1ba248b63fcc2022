"""KV memory is divided so that every model holds the same number of positions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from decoding.core import EngineConfig, ModelLoadError
from decoding.memory import divide_kv

CPU = torch.device("cpu")


@dataclass
class Sized:
    bytes_per_token: int
    max_model_len: int = 4096
    device: torch.device = CPU

    def kv_bytes_per_block(self, block_size: int) -> int:
        return self.bytes_per_token * block_size


def divide(sizes: dict[str, Sized], fixed: dict[str, int | None] | None = None, **config: int) -> dict[str, int]:
    settings = EngineConfig(block_size=16, **config)  # type: ignore[arg-type]
    return divide_kv(sizes, fixed or dict.fromkeys(sizes), settings)  # type: ignore[arg-type]


def test_models_hold_the_same_number_of_positions() -> None:
    assert divide({"a": Sized(100), "b": Sized(10)}, kv_memory=110 * 16 * 50) == {"a": 50, "b": 50}


def test_no_pool_is_larger_than_it_can_use_and_the_rest_goes_to_the_others() -> None:
    blocks = divide({"a": Sized(100), "b": Sized(10, 32)}, kv_memory=110 * 16 * 500, max_num_seqs=4)
    assert list(blocks) == ["a", "b"]
    assert blocks["b"] == 4 * 2 + 1
    assert blocks["a"] == (110 * 16 * 500 - 9 * 160) // 1600


def test_an_operator_may_fix_a_models_memory() -> None:
    blocks = divide({"a": Sized(100), "b": Sized(10)}, {"a": 1600 * 7, "b": None}, kv_memory=1600 * 7 + 160 * 11)
    assert blocks == {"a": 7, "b": 11}


def test_too_little_memory_is_a_clear_error() -> None:
    with pytest.raises(ModelLoadError, match="kv-memory"):
        divide({"a": Sized(100)}, kv_memory=1000)


def test_by_default_a_share_of_free_memory_is_taken() -> None:
    assert divide({"a": Sized(10)}, max_num_seqs=4)["a"] == 4 * 256 + 1
