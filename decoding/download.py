"""From a device to the host once: what is wanted is gathered, and comes in one copy, which waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
Later = Callable[[], Tensor]  # on the host, once it has been fetched


class Download:
    """Tensors of one device, of any shapes and dtypes. Those of the host are left as they are, without a copy."""

    def __init__(self) -> None:
        self._wanted: list[Tensor] = []
        self._found: list[Tensor] = []

    def want(self, x: Tensor) -> Later:
        """What gives `x`, which must not change before it has been fetched."""
        place = len(self._wanted)
        self._wanted.append(x)
        return lambda: self._found[place]

    def fetch(self) -> None:
        """Bring everything that is wanted. Waits once, if there is anything to wait for."""
        self._found = list(self._wanted)
        # The widest first: each part then begins at a multiple of its own size.
        order = sorted(range(len(self._wanted)), key=lambda i: -self._wanted[i].element_size())
        order = [i for i in order if self._wanted[i].device.type != "cpu"]
        if not order:
            return
        parts = [self._wanted[i].contiguous().flatten().view(torch.uint8) for i in order]
        whole, at = torch.cat(parts).cpu(), 0
        for i, part in zip(order, parts, strict=True):
            x = self._wanted[i]
            self._found[i] = whole[at : at + part.numel()].view(x.dtype).view(x.shape)
            at += part.numel()
