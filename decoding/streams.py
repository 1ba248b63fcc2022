"""Where the forwards of a tick run, and how long they take: on CUDA beside each other, timed without waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from decoding.hosting import Rows


def use_device(device: torch.device) -> None:
    """What this thread launches goes to `device`: a kernel's launch asks for the current device, not its tensors'."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Streams:
    """A CUDA stream for each of several models, so that small models compute in the shadow of a large one."""

    def __init__(self, devices: Mapping[str, torch.device], beside: bool) -> None:
        """devices: of each model. Without `beside`, on CPUs and with a single model, everything runs in order."""
        cuda = [model for model, device in devices.items() if device.type == "cuda"]
        use = beside and len(cuda) > 1
        make: Any = torch.cuda.Stream
        self._streams = {model: make(devices[model]) for model in cuda} if use else {}

    @contextmanager
    def of(self, model: str) -> Iterator[None]:
        """Device work inside runs on the model's stream, behind all that was begun before."""
        stream = self._streams.get(model)
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            yield

    def join(self, model: str, rows: Rows) -> None:
        """What comes next may read the model's rows. Once all models of a tick have begun."""
        stream = self._streams.get(model)
        if stream is None:
            return
        here = torch.cuda.current_stream(stream.device)
        here.wait_stream(stream)
        for tensor in (rows.logits, rows.hidden):
            if tensor is not None:
                tensor.record_stream(here)  # the allocator must not give it away before `here` has read it


class Timer:
    """Seconds of device work. On CUDA they are told by `settle`, when the tick's tokens have come back."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, Any, Callable[[float], None]]] = []

    def begin(self, device: torch.device) -> Any:
        """A mark before the work."""
        return self._event() if device.type == "cuda" else time.perf_counter()

    def end(self, began: Any, tell: Callable[[float], None]) -> None:
        """The work has been done, or begun: `tell` is called with its seconds, now or by `settle`."""
        if isinstance(began, float):
            tell(time.perf_counter() - began)
        else:
            self._open.append((began, self._event(), tell))

    def settle(self) -> None:
        """Tell what is over."""
        done, self._open = self._open, []
        for began, ended, tell in done:
            if ended.query():
                tell(began.elapsed_time(ended) / 1e3)
            else:
                self._open.append((began, ended, tell))

    def _event(self) -> Any:
        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record()
        return event
