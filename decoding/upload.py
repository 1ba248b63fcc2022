"""From the host to a device without waiting: a plain copy to CUDA waits for all that its stream has been given."""

from __future__ import annotations

from typing import Any

import torch


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`, by pinned memory, which is not used anew before the device has read it."""
    if device.type == "cpu" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def uploaded(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)` without waiting."""
    return upload(torch.tensor(values, dtype=dtype), device)
