"""Forwards of few tokens through buffers of fixed size, padded to a bucket; on a GPU each bucket is a CUDA graph, or
two: one without adapters, and one that reads each token's adapter from a buffer.

Padding belongs to one more track without keys. Its slots are negative, so that nothing of it is stored, and attention
gives it zeros on a GPU; what its rows hold is dropped. The plain packed forward stays the specification.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from decoding.attention import Batch, HostedLayer, Tensor
from decoding.hosting import SpanInput
from decoding.lora import CaptureKey, Chosen

log = logging.getLogger(__name__)
MOST_TOKENS = 256
INVARIANT_TOKENS = 64  # of every forward whose rows must not depend on the batch
Output = tuple[Tensor, Tensor]  # logits [T, width], hidden [T, hidden]
Forward = Callable[[], Output]


def buckets(most: int = MOST_TOKENS) -> tuple[int, ...]:
    """Sizes of batches that get a graph: powers of two up to 16, then multiples of 16."""
    return tuple(n for n in (1, 2, 4, 8, *range(16, most + 1, 16)) if n <= most)


class StaticForward:
    """Batches of up to `sizes[-1]` tokens, each padded to the next of `sizes`, through the same buffers.

    `packed` is the forward of one batch. `capture` makes a function over the buffers into a quicker one that does the
    same, at the first batch of each size; where it fails once, `quick` becomes False and batches run as they are, or
    `quick_adapted` does and batches with adapters do. What is made of adapters holds for one key, see
    `Loras.capture_key`: under another it is dropped. `width`: the most blocks of a track; `splits`: keys per part of a
    long context, by size.
    """

    def __init__(
        self,
        packed: Callable[[Batch, Chosen | None], Output],
        sizes: Sequence[int],
        width: int,
        device: torch.device,
        splits: Callable[[int], int],
        capture: Callable[[Forward, int], Forward] | None = None,
    ) -> None:
        most = sizes[-1]
        self._packed, self._sizes, self._splits, self._capture = packed, sizes, splits, capture
        self._longs = torch.zeros(4 * most, dtype=torch.int64, device=device)
        self._bounds = torch.zeros(2 * most + 3, dtype=torch.int32, device=device)
        self._tables = torch.zeros(most + 1, width, dtype=torch.int32, device=device)
        self._owners = torch.full((most,), -1, dtype=torch.int32, device=device)
        self._key: CaptureKey | None = None
        self.made: dict[int, Forward] = {}
        self.adapted: dict[int, Forward] = {}
        self.quick = self.quick_adapted = capture is not None

    def takes(self, batch: Batch, chosen: Chosen | None = None) -> bool:
        """Whether the batch is quicker this way: the buffers hold it, and what it needs can be captured."""
        adapters = chosen is None or (self.quick_adapted and chosen.key is not None)
        return self.quick and adapters and self._fits(batch)

    def size(self, tokens: int) -> int:
        """Tokens that a batch of `tokens` is padded to."""
        return next(size for size in self._sizes if size >= tokens)

    @torch.inference_mode()
    def prepare(self, tokens: int, chosen: Chosen | None = None) -> None:
        """Capture what batches of up to `tokens` with adapters such as `chosen` need; the pool is not touched."""
        for size in self._sizes:
            if size <= tokens:
                self._forward(size, chosen)

    def __call__(self, batch: Batch, chosen: Chosen | None = None) -> Output:
        """logits [T, width], hidden [T, hidden] of all tokens of a batch, which may be in the host's memory.

        Without a key `chosen` is for as many tokens as the batch is padded to, and keeps it from what was captured.
        """
        assert self._fits(batch), "a batch fits its buffers"
        tokens = batch.slots.shape[0]
        size = self.size(tokens)
        if chosen is not None and chosen.key is None:
            self._fill(size, batch)
            logits, hidden = self._packed(self._view(size), chosen)
            return logits[:tokens], hidden[:tokens]
        forward = self._forward(size, chosen)
        self._fill(size, batch)
        if chosen is not None:
            self._fill_owners(size, chosen.owners)
        logits, hidden = forward()
        return logits[:tokens].clone(), hidden[:tokens].clone()

    def _fits(self, batch: Batch) -> bool:
        return batch.slots.shape[0] <= self._sizes[-1] and batch.tables.shape[1] <= self._tables.shape[1]

    def _view(self, size: int) -> Batch:
        """The buffers as a batch of `size` tokens and one more track than that."""
        longs = self._longs[: 4 * size].view(4, size)
        starts, ends = self._bounds[: size + 2], self._bounds[size + 2 : 2 * size + 3]
        places = (longs[0:1], longs[1:2], longs[2], longs[3], self._tables[: size + 1])
        return Batch(*places, None, (), starts, ends, self._splits(size))

    def _forward(self, size: int, chosen: Chosen | None) -> Forward:
        """What was made for `size`, or is now; what was made of adapters under another key than `chosen`'s goes."""
        if chosen is not None and chosen.key != self._key:
            self.adapted.clear()
            self._key = chosen.key
        made = self.made if chosen is None else self.adapted
        if size not in made:
            made[size] = self._make(size, chosen)
        return made[size]

    def _make(self, size: int, chosen: Chosen | None) -> Forward:
        """Over padding alone: whatever is tried out first stores nothing."""
        adapters = None if chosen is None else chosen.over(self._owners[:size])
        forward: Forward = partial(self._packed, self._view(size), adapters)
        if self._capture is None or not (self.quick if chosen is None else self.quick and self.quick_adapted):
            return forward
        self._fill(size, None)
        self._fill_owners(size, None)
        try:
            return self._capture(forward, size)
        except Exception as error:
            what = "Forwards" if chosen is None else "Forwards with adapters"
            log.warning("%s stay without CUDA graphs, capturing one failed: %s", what, str(error)[:300])
        self.quick, self.quick_adapted = self.quick and chosen is not None, False
        return forward

    def _fill_owners(self, size: int, owners: Tensor | None) -> None:
        """Copy `owners`, int32 on the host, into their buffer, and -1 behind them."""
        padded = torch.full((size,), -1, dtype=torch.int32)
        if owners is not None:
            padded[: owners.shape[0]] = owners
        send(padded, self._owners[:size])

    def _fill(self, size: int, batch: Batch | None) -> None:
        """Copy `batch` into the buffers of `size` tokens, padding behind it."""
        longs = torch.zeros(4, size, dtype=torch.int64)
        longs[2], longs[3] = -1, size
        bounds = torch.zeros(2 * size + 3, dtype=torch.int32)
        if batch is not None:
            assert batch.starts is not None
            assert batch.ends is not None
            tokens, (tracks, width) = batch.slots.shape[0], batch.tables.shape
            for row, part in zip(longs, (batch.token_ids[0], batch.positions[0], batch.slots, batch.tracks)):
                row[:tokens] = part
            bounds[: size + 1] = tokens
            bounds[: tracks + 1] = batch.starts
            bounds[size + 2 : size + 2 + tracks] = batch.ends
            send(batch.tables, self._tables[:tracks, :width])
        bounds[size + 1] = size
        send(longs, self._longs[: 4 * size].view(4, size))
        send(bounds, self._bounds[: 2 * size + 3])


def static_forward(
    packed: Callable[[Batch, Chosen | None], Output],
    layers: Sequence[HostedLayer],
    positions: int,
    *,
    triton: bool,
    graphs: bool,
    invariant: bool,
) -> StaticForward | None:
    """What a model whose pools are `layers` and whose tracks have up to `positions` needs, if anything.

    `graphs`: CUDA graphs for few tokens. `invariant`: batches of one size, and a split that suits some of its rows.
    """
    if not (graphs or invariant):
        return None
    sizes = (INVARIANT_TOKENS,) if invariant else buckets()
    device, block_size = layers[0].keys.device, layers[0].keys.shape[3]
    width = -(-positions // block_size)

    def splits(size: int) -> int:
        if not triton:
            return 0
        from decoding.device_attention import fixed_split

        return fixed_split(layers, INVARIANT_TOKENS // 4 if invariant else size, width * block_size, device)

    return StaticForward(packed, sizes, width, device, splits, CudaGraphs(sizes[-1]) if graphs else None)


def send(host: Tensor, buffer: Tensor) -> None:
    """Copy into a buffer without waiting for the device: pinned memory is not used anew before it has been read."""
    buffer.copy_(host.pin_memory() if buffer.is_cuda and not host.is_cuda else host, non_blocking=True)


class CudaGraphs:
    """Captures forwards over static buffers; all share a memory pool, and a pair of buffers for what they return."""

    def __init__(self, most: int) -> None:
        self._most, self._pool = most, torch.cuda.graph_pool_handle()
        self._outputs: tuple[Tensor, ...] = ()
        self._first: torch.cuda.CUDAGraph | None = None  # nothing can be captured into a pool that has lost all graphs

    def __call__(self, forward: Forward, size: int) -> Forward:
        """A replay of `forward` [size, ..]; its result holds until the next replay of any."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and workspaces made before the capture
            for _ in range(2):
                found = forward()
        torch.cuda.current_stream().wait_stream(aside)
        if not self._outputs:
            self._outputs = tuple(x.new_empty(self._most, x.shape[1]) for x in found)
        logits, hidden = (buffer[:size] for buffer in self._outputs)
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails does not give its stream back
        with here, torch.cuda.graph(graph, pool=self._pool):
            for to, result in zip((logits, hidden), forward(), strict=True):
                to.copy_(result)
        self._first = self._first or graph

        def replay() -> Output:
            graph.replay()
            return logits, hidden

        return replay


def divide(spans: Sequence[SpanInput], most: int) -> Iterator[list[SpanInput]]:
    """The spans in order, cut so that each forward has up to `most` tokens; rows stay in their order."""
    part: list[SpanInput] = []
    room = most
    for span in spans:
        first, count = 0, len(span.token_ids)
        while first < count:
            n = min(room, count - first)
            rows = [row - first for row in span.rows if first <= row < first + n]
            part.append(replace(span, token_ids=span.token_ids[first : first + n], start=span.start + first, rows=rows))
            first, room = first + n, room - n
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part
