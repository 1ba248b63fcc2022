"""Paged attention: kernels in the interpreter against the reference, and the reference against dense softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import triton_kernels.paged_attention
from tests.triton_kernels.mutate import mutated
from triton_kernels.paged_attention import choose_split, paged_attention, paged_attention_reference

MIXED = ((0, 19), (20, 1), (0, 0), (33, 3), (0, 1), (130, 2))  # prefill, decode, nothing, verify, one key, two steps
ALL = {"window": 40, "chunk": 48, "softcap": 3.0}
Attend = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """heads, KV heads, dims of keys and values, block size, tracks as (keys before, tokens), and what to honour."""

    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    size: int
    spans: tuple[tuple[int, int], ...] = MIXED
    honoured: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False

    def __str__(self) -> str:
        shape = f"{self.heads}x{self.kv_heads}-{self.k_dim}-{self.v_dim}-b{self.size}-{len(self.spans)}"
        return "-".join([shape, *self.honoured, *["sinks"] * self.sinks])


CASES = [
    Case(1, 1, 1, 1, 1, ((0, 1),)),  # one row, one key, one of everything
    Case(2, 2, 24, 16, 16, ((15, 1), (16, 1))),  # the last key of a block, the first of the next
    Case(4, 1, 16, 16, 16),
    Case(7, 1, 80, 24, 4),
    Case(4, 4, 16, 80, 16),
    Case(40, 1, 16, 16, 32, ((60, 3),)),  # more query heads than a tile has rows
    Case(4, 2, 16, 16, 16, honoured={"window": 8}),  # shorter than a block
    Case(4, 2, 16, 16, 4, honoured={"window": 1}),
    Case(4, 2, 16, 16, 16, ((300, 2), (0, 9)), honoured={"window": 100}),
    Case(4, 2, 16, 16, 16, honoured={"chunk": 8}),
    Case(4, 2, 16, 16, 16, honoured={"softcap": 2.0}),
    Case(4, 2, 16, 16, 16, sinks=True),
    Case(8, 2, 16, 24, 8, ((0, 90), (97, 5), (70, 1)), ALL, True),  # a span long enough for tall tiles
]
# Window and chunk both end inside key blocks, and rows see two blocks of one part and two parts.
HARD = Case(4, 2, 16, 16, 16, ((0, 19), (137, 9), (90, 3)), ALL, True)


@dataclass
class Made:
    batch: tuple[torch.Tensor, ...]  # query, keys, values, starts, ends, tables
    honoured: dict[str, Any]


def make(case: Case, dtype: torch.dtype = torch.float32) -> Made:
    """A pool in random order, where blocks that no track owns and keys behind a track's end are large."""
    noise = torch.Generator().manual_seed(3)
    needed = [-(-(before + n) // case.size) for before, n in case.spans]
    blocks, tokens = sum(needed) + 2, sum(n for _, n in case.spans)
    keys = torch.randn(blocks, case.kv_heads, case.k_dim, case.size, generator=noise)
    values = torch.randn(blocks, case.kv_heads, case.size, case.v_dim, generator=noise)
    order = torch.randperm(blocks, generator=noise).int()
    tables = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)
    at = 0
    for row, n, (before, own) in zip(tables, needed, case.spans, strict=True):
        row[:n] = order[at : at + n]
        at += n
        behind = (before + own) % case.size
        if behind and n:
            keys[row[n - 1], :, :, behind:] = values[row[n - 1], :, behind:] = 1e3
    keys[order[at:].long()] = values[order[at:].long()] = 1e3
    query = torch.randn(case.heads, tokens, case.k_dim, generator=noise).transpose(0, 1)
    starts = torch.tensor([0, *(n for _, n in case.spans)]).cumsum(0).int()
    ends = torch.tensor([before + n for before, n in case.spans]).int()
    honoured = case.honoured | {"scale": 1.3 * case.k_dim**-0.5}
    if case.sinks:
        honoured["sinks"] = torch.randn(case.heads, generator=noise).to(dtype)
    return Made((query.to(dtype), keys.to(dtype), values.to(dtype), starts, ends, tables), honoured)


def dense(made: Made) -> torch.Tensor:
    """[T, H, dv] in fp64: scores of a row with all keys of its track, masked, softmax, times all values."""
    query, keys, values, starts, ends, tables = made.batch
    heads, size, honoured = query.shape[1], keys.shape[3], made.honoured
    group = heads // keys.shape[1]
    out = []
    for t in range(query.shape[0]):
        track = int((starts <= t).sum()) - 1
        length = int(ends[track])
        own = length - int(starts[track + 1]) + t
        place = torch.arange(length)
        block, offset = tables[track].long()[place // size], place % size
        k = keys[block, :, :, offset].double().repeat_interleave(group, 1)  # [L, H, dk]
        v = values[block, :, offset].double().repeat_interleave(group, 1)  # [L, H, dv]
        scores = torch.einsum("hd,lhd->hl", query[t].double(), k) * honoured["scale"]
        if cap := honoured.get("softcap"):
            scores = cap * (scores / cap).tanh()
        hidden = place > own
        if window := honoured.get("window"):
            hidden |= own - place >= window
        if chunk := honoured.get("chunk"):
            hidden |= place // chunk != own // chunk
        mass = scores.masked_fill(hidden, float("-inf")).exp()  # [H, L]
        sum = mass.sum(-1, keepdim=True)
        if "sinks" in honoured:
            sum = sum + honoured["sinks"].double().exp()[:, None]
        out.append(torch.einsum("hl,lhd->hd", mass / sum, v))
    return torch.stack(out)


def bound(made: Made, dtype: torch.dtype) -> torch.Tensor:
    """How far a row may be off. It is a mean of values: errors are relative to the mean of their magnitudes.

    bf16: the interpreter cuts the weights off and then the row, a unit in the last place each; the reference rounds it.
    fp32: scores, exponentials and sums are off by a few units each.
    """
    query, keys, values, *rest = made.batch
    mean = paged_attention_reference(query.float(), keys.float(), values.float().abs(), *rest, **made.honoured)
    units = 2.5 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    return (units + 64 * torch.finfo(torch.float32).eps) * mean


def agrees(attend: Attend, case: Case, dtype: torch.dtype = torch.float32, split: int | None = None) -> bool:
    made = make(case, dtype)
    got = attend(*made.batch, **made.honoured, split=split, kernel=True)
    assert got.dtype == dtype
    want = paged_attention_reference(*made.batch, **made.honoured)
    return bool(((got.float() - want.float()).abs() <= bound(made, dtype)).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_dense_attention(case: Case) -> None:
    made = make(case)
    got = paged_attention_reference(*made.batch, **made.honoured)
    assert bool(((got - dense(made)).abs() <= bound(made, torch.float32)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_does_what_the_reference_does(case: Case, dtype: torch.dtype) -> None:
    assert agrees(paged_attention, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("split", [0, 64, 128])
def test_parts_are_joined_to_the_same_answer(split: int, dtype: torch.dtype) -> None:
    assert agrees(paged_attention, HARD, dtype, split)
    assert agrees(paged_attention, Case(4, 2, 16, 24, 16, ((200, 1), (3, 1), (0, 0))), dtype, split)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_token_without_keys_gets_zeros_and_reads_nothing(sinks: bool) -> None:
    """What fills up a batch of a fixed size: a track that has tokens and no keys."""
    made = make(Case(4, 2, 16, 16, 16, ((30, 1), (0, 3)), sinks=sinks))
    query, keys, values, starts, ends, tables = made.batch
    ends[1] = 0
    tables[1] = keys.shape[0] - 1
    keys[-1] = values[-1] = float("nan")
    for split in (0, 64):
        for kernel in (True, False):
            got = paged_attention(
                query, keys, values, starts, ends, tables, **made.honoured, split=split, kernel=kernel
            )
            assert torch.equal(got[1:], torch.zeros(3, 4, 16))
            assert bool(got[0].isfinite().all())


def alone(made: Made, tracks: Sequence[int]) -> Made:
    """Only these tracks, each with its last token alone, and the block tables just as wide as they need."""
    query, keys, values, starts, ends, tables = made.batch
    rows = [int(starts[track + 1]) - 1 for track in tracks]
    width = max(-(-int(ends[track]) // keys.shape[3]) for track in tracks)
    few = torch.arange(len(tracks) + 1).int(), ends[list(tracks)], tables[list(tracks), :width].contiguous()
    return Made((query[rows], keys, values, *few), made.honoured)


@pytest.mark.parametrize("split", [0, 64])
@pytest.mark.parametrize("case", [CASES[3], HARD], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(case: Case, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products sum a row by its place in the tile, a GPU's do not: here they are rounded doubles."""

    def dot(_self: Any, a: Any, b: Any, d: Any, *_how: Any) -> TensorHandle:
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    made = make(case)
    together = paged_attention(*made.batch, **made.honoured, split=split, kernel=True)
    for track, (_, n) in enumerate(case.spans):
        if n:
            one = alone(made, [track])
            row = paged_attention(*one.batch, **one.honoured, split=split, kernel=True)
            assert torch.equal(row[0], together[int(made.batch[3][track + 1]) - 1])


MUTATIONS = [
    ("n[None, :] <= own", "n[None, :] < own"),
    ("own[:, None] - WINDOW", "own[:, None] - WINDOW - 1"),
    ("own % CHUNK)[:", "own % CHUNK + 1)[:"),
    ("own = end - length + local", "own = end - length + row // GROUP"),  # right in a span's first tile
    ("low // BLOCK_N * BLOCK_N", "(low + BLOCK_N - 1) // BLOCK_N * BLOCK_N"),
    ("total * shrink + tl.sum", "total + tl.sum"),
    ("softcap * (1.0 - small)", "(1.0 - small)"),
    ("tl.exp2(sink - top)", "0.0"),
    ("part * grown[:, None]", "part"),
    ("low = tl.minimum(low, tl.min", "low = 1 + tl.minimum(low, tl.min"),
    ("at += rows", "at += 0 * rows"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_broken_kernels_are_found(old: str, new: str, tmp_path: Path) -> None:
    broken = mutated(triton_kernels.paged_attention.__file__, old, new, tmp_path).paged_attention
    assert not agrees(broken, HARD, split=128)


def test_contexts_are_split_where_processors_would_idle() -> None:
    cpu = torch.device("cpu")  # taken for 132 processors
    assert choose_split(8, 256, cpu) == 0  # short
    assert choose_split(264, 1 << 17, cpu) == 0  # programs enough
    assert choose_split(8, 1 << 15, cpu) == 256
    assert choose_split(64, 1 << 17, cpu) == 2048  # 64 parts: no more than 4096 programs


def test_shapes_that_do_not_fit_are_refused() -> None:
    made = make(CASES[2])
    query, keys, values, starts, ends, tables = made.batch
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(query, keys, values, starts, ends[1:], tables, scale=1.0)
    with pytest.raises(ValueError, match="multiples of 64"):
        paged_attention(*made.batch, scale=1.0, split=100)
