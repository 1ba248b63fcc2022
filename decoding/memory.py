"""How the KV memory is divided between models."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from decoding.core import EngineConfig, ModelLoadError
from decoding.hosting import ModelRunner

_CPU_SHARE, _CPU_MOST = 0.25, 4 << 30  # main memory is everybody's: a quarter of what is free, 4 GiB at most
_CUDA_SHARE = 0.90  # of the device, weights included


def available_memory(device: torch.device) -> int:
    """Bytes that the KV pools may take on `device` when nobody says how many."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1.0 - _CUDA_SHARE) * total))
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(int(free * _CPU_SHARE), _CPU_MOST)


def divide_kv(
    runners: Mapping[str, ModelRunner], fixed: Mapping[str, int | None], config: EngineConfig
) -> dict[str, int]:
    """Blocks per model. `fixed`: bytes that the operator set for a model, or None.

    What is left is divided so that every model holds the same number of positions: each policy has one track per
    role, so a position of a sequence costs a position in each. No pool is larger than `max_num_seqs` whole contexts.
    Raises ModelLoadError when a pool would not hold a single block.
    """
    size = config.block_size
    most = {m: config.max_num_seqs * -(-r.max_model_len // size) + 1 for m, r in runners.items()}
    blocks: dict[str, int] = {}
    total = config.kv_memory
    if total is None:
        total = available_memory(next(iter(runners.values())).device)
    for model, memory in fixed.items():
        if memory is not None:
            blocks[model] = memory // runners[model].kv_bytes_per_block(size)
            total -= memory
    shared = {m: r.kv_bytes_per_block(size) for m, r in runners.items() if m not in blocks}
    while shared:
        even = max(0, total) // sum(shared.values())
        capped = {m for m in shared if most[m] <= even}
        if not capped:
            blocks |= dict.fromkeys(shared, even)
            break
        for m in capped:  # these need less than an even share: the rest is divided among the others
            blocks[m] = most[m]
            total -= most[m] * shared.pop(m)
    for model, count in blocks.items():
        if count < 1:
            need = runners[model].kv_bytes_per_block(size)
            raise ModelLoadError(
                f"No KV memory is left for '{model}': a block of {size} tokens takes {need} bytes. "
                "Raise --kv-memory, or the model's kv_memory."
            )
    return {model: blocks[model] for model in runners}
