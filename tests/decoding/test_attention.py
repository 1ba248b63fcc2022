"""The C++ kernels and the torch specification against a naive reference, over awkward shapes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from decoding.attention import Batch, HostedLayer, LayerSpec, attend_kernel, attend_reference, make_batch, make_pool
from decoding.host_build import load_kernels
from decoding.host_linear import FewRowsLinear, use_few_rows
from decoding.hosting import SpanInput

BLOCKS = 64


@dataclass(frozen=True)
class Case:
    """heads, KV heads, dims of keys and values, block size, spans as (start, tokens), and what to honour."""

    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    block: int
    spans: tuple[tuple[int, int], ...]
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def __str__(self) -> str:
        parts = [f"{self.heads}x{self.kv_heads}", f"{self.k_dim}/{self.v_dim}", f"b{self.block}", str(self.spans)]
        return "-".join(parts + [f"{k}{getattr(self, k)}" for k in ("window", "chunk", "softcap", "sinks")])


CASES = [
    Case(1, 1, 1, 1, 1, ((0, 1),)),  # one row, one key, one of everything
    Case(4, 2, 8, 8, 16, ((0, 1),)),
    Case(4, 4, 16, 16, 16, ((15, 1), (16, 1))),  # the last key of a block, the first of the next
    Case(4, 2, 16, 16, 4, ((0, 7), (3, 1), (30, 5))),  # prefill, decode and verify together
    Case(6, 2, 20, 12, 8, ((0, 9), (40, 2))),  # dims that are no multiple of a vector, keys unlike values
    Case(8, 1, 64, 64, 16, ((100, 1), (0, 33))),  # one KV head for all
    Case(40, 1, 16, 16, 32, ((60, 3),)),  # more query heads than a tile has rows
    Case(4, 2, 16, 16, 16, ((0, 40), (50, 1)), window=8),  # the window is shorter than a block
    Case(4, 2, 16, 16, 4, ((0, 40), (50, 1)), window=1),
    Case(4, 2, 16, 16, 16, ((300, 2),), window=300),  # the window begins inside a block, keys span two rounds
    Case(4, 2, 16, 16, 16, ((0, 40), (47, 2)), chunk=8),
    Case(4, 2, 16, 16, 16, ((0, 20), (33, 1)), softcap=2.0),
    Case(4, 2, 16, 16, 16, ((0, 20), (33, 1)), sinks=True),
    Case(4, 4, 32, 32, 16, ((0, 20), (400, 3)), window=260, softcap=5.0, sinks=True),
    Case(4, 2, 16, 16, 5, ((257, 1), (511 % 200, 1))),
]


@dataclass
class Made:
    query: torch.Tensor  # [1, H, T, dk]
    key: torch.Tensor
    value: torch.Tensor
    layer: HostedLayer
    batch: Batch
    sinks: torch.Tensor | None


def make(case: Case, dtype: torch.dtype, dense: bool = False) -> Made:
    noise = torch.Generator().manual_seed(3)
    spec = LayerSpec(
        case.heads, case.kv_heads, case.k_dim, case.v_dim, 1.3 * case.k_dim**-0.5, case.window, case.chunk, case.softcap
    )
    keys, values = make_pool(spec, BLOCKS * 4, case.block, torch.empty(0, dtype=dtype))
    keys.copy_(torch.randn(keys.shape, generator=noise))
    values.copy_(torch.randn(values.shape, generator=noise))
    order = torch.randperm(BLOCKS * 4, generator=noise).tolist()
    spans = []
    for start, n in case.spans:
        needed = -(-(start + n) // case.block)
        spans.append(SpanInput([0] * n, start, order[:needed], [n - 1]))
        order = order[needed:]
    batch = make_batch(spans, case.block, torch.device("cpu"), grouped=True)
    tokens = batch.slots.numel()

    def draw(heads: int, dim: int) -> torch.Tensor:
        drawn = torch.randn(1, tokens, heads, dim, generator=noise).to(dtype).transpose(1, 2)
        return drawn.contiguous() if dense else drawn  # models hand over transposed views

    parts = draw(case.heads, case.k_dim), draw(case.kv_heads, case.k_dim), draw(case.kv_heads, case.v_dim)
    sinks = torch.randn(case.heads, generator=noise).to(dtype) if case.sinks else None
    return Made(*parts, HostedLayer(spec, keys, values), batch, sinks)


def naive(made: Made) -> torch.Tensor:
    """[T, H, dv] in fp64, one token, head and key at a time; stores nothing."""
    layer, batch, spec = made.layer, made.batch, made.layer.spec
    size = layer.keys.shape[3]
    keys = layer.keys.permute(0, 3, 1, 2).double().clone()  # [blocks, position, KH, dk]
    values = layer.values.permute(0, 2, 1, 3).double().clone()
    for t, slot in enumerate(batch.slots.tolist()):
        keys[slot // size, slot % size] = made.key[0, :, t].double()
        values[slot // size, slot % size] = made.value[0, :, t].double()
    out = torch.zeros(batch.slots.numel(), spec.query_heads, spec.v_dim, dtype=torch.float64)
    for t, position in enumerate(batch.positions[0].tolist()):
        table = batch.tables[int(batch.tracks[t])].tolist()
        seen = [p for p in range(position + 1) if not spec.window or p > position - spec.window]
        seen = [p for p in seen if not spec.chunk or p // spec.chunk == position // spec.chunk]
        for head in range(spec.query_heads):
            kv_head = head // (spec.query_heads // spec.kv_heads)
            k = torch.stack([keys[table[p // size], p % size, kv_head] for p in seen])
            v = torch.stack([values[table[p // size], p % size, kv_head] for p in seen])
            scores = k @ made.query[0, head, t].double() * spec.scale
            if spec.softcap:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if made.sinks is not None:
                scores = torch.cat([scores, made.sinks[head].double()[None]])
            out[t, head] = torch.softmax(scores, 0)[: len(seen)] @ v
    return out


def run(made: Made, kernel: bool) -> torch.Tensor:
    """[T, H, dv] by the kernel or the torch specification; writes the pool."""
    if kernel:
        return attend_kernel(made.query, made.key, made.value, made.layer, made.batch, made.sinks)[0]
    packed = (x[0].transpose(0, 1) for x in (made.query, made.key, made.value))
    return attend_reference(*packed, made.layer, made.batch, made.sinks)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    if not load_kernels():
        pytest.skip("no C++ compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_the_naive_loop(case: Case, dtype: torch.dtype, kernel: bool) -> None:
    """Sums are fp32 in both; a bf16 result may also be half a unit in the last place off (values reach about 4)."""
    made = make(case, dtype)
    expected = naive(made)
    out = run(made, kernel)
    assert out.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES[3:6], ids=str)
def test_both_store_the_same(case: Case, dtype: torch.dtype) -> None:
    first, second = make(case, dtype), make(case, dtype, dense=True)
    run(first, kernel=True)
    run(second, kernel=False)
    assert torch.equal(first.layer.keys, second.layer.keys)
    assert torch.equal(first.layer.values, second.layer.values)
    before = make(case, dtype).layer.keys
    assert not torch.equal(first.layer.keys, before)


def test_what_lies_behind_the_own_position_does_not_matter() -> None:
    """Stale keys and NaN in the rest of a block (a rolled-back draft) are never read into a row."""
    case = CASES[3]
    clean, dirty = make(case, torch.float32), make(case, torch.float32)
    lengths = [start + n for start, n in case.spans]
    used = {slot for row, length in zip(dirty.batch.tables, lengths) for slot in _positions(row, length)}
    for block in range(dirty.layer.keys.shape[0]):
        for offset in range(case.block):
            if (block, offset) not in used:
                dirty.layer.keys[block, :, :, offset] = 1e4
                dirty.layer.values[block, :, offset] = 1e4
    torch.testing.assert_close(run(clean, kernel=True), run(dirty, kernel=True))


def _positions(table: torch.Tensor, length: int) -> list[tuple[int, int]]:
    return [(int(table[p // 4]), p % 4) for p in range(length)]


def test_two_threads_give_the_same_bits() -> None:
    case = Case(16, 4, 64, 64, 16, ((0, 60), *((100 + i, 1) for i in range(12))))
    alone = run(make(case, torch.float32), kernel=True)
    torch.set_num_threads(2)
    try:
        assert torch.equal(run(make(case, torch.float32), kernel=True), alone)
    finally:
        torch.set_num_threads(1)


def test_large_scores_do_not_overflow() -> None:
    made = make(CASES[9], torch.float32)
    made.query.mul_(1e3)
    expected = naive(made)
    torch.testing.assert_close(run(made, kernel=True).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 31, 64])
@pytest.mark.parametrize(("depth", "width"), [(32, 1), (64, 7), (96, 50), (256, 130)])
def test_linear_equals_torch(rows: int, depth: int, width: int) -> None:
    """Exact products, fp32 sums, one rounding to bf16."""
    noise = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=noise).bfloat16()
    layer = torch.nn.Linear(depth, width, bias=rows % 2 == 0).bfloat16()
    expected = F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
    assert use_few_rows(torch.nn.Sequential(layer)) == 1
    assert isinstance(layer, FewRowsLinear)
    with torch.inference_mode():
        out = layer(x[None])[0]
    expected = expected.detach()
    assert out.dtype == torch.bfloat16
    bound = float(expected.abs().max()) * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=bound)


def test_linear_row_does_not_depend_on_the_batch() -> None:
    """Bit for bit: a row alone, in few and in many rows, is summed in the same order."""
    noise = torch.Generator().manual_seed(5)
    x = torch.randn(23, 256, generator=noise).bfloat16()
    weight = torch.randn(70, 256, generator=noise).bfloat16()
    together = torch.ops.trimtab.linear(x, weight, None)
    for first, last in ((0, 1), (4, 7), (9, 17)):
        assert torch.equal(torch.ops.trimtab.linear(x[first:last], weight, None), together[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Bit for bit: each decoding track alone gives what it gives among others."""
    case = Case(8, 2, 16, 16, 16, ((40, 1), (300, 1), (3, 1)))
    together = run(make(case, dtype), kernel=True)
    for i in range(3):
        made = make(case, dtype)
        query, key, value = (x[:, :, i : i + 1] for x in (made.query, made.key, made.value))
        batch = made.batch
        alone = Batch(
            batch.token_ids[:, i : i + 1],
            batch.positions[:, i : i + 1].contiguous(),
            batch.slots[i : i + 1],
            torch.zeros(1, dtype=torch.int64),
            batch.tables[i : i + 1],
            None,
            (),
        )
        assert torch.equal(attend_kernel(query, key, value, made.layer, alone, None)[0], together[i : i + 1])


def test_other_linears_are_left_alone() -> None:
    odd = torch.nn.Linear(33, 8).bfloat16()
    wide = torch.nn.Linear(32, 8)
    assert use_few_rows(torch.nn.Sequential(odd, wide)) == 0
    assert type(odd) is type(wide) is torch.nn.Linear


def test_no_second_openmp_runtime_is_loaded(tmp_path: Path) -> None:
    """The kernels use torch's thread pool; two OpenMP runtimes would fight over the cores."""
    program = (
        "import torch\n"
        "from decoding.host_build import load_kernels\n"
        "assert load_kernels()\n"
        "x = torch.ones(4, 4096, dtype=torch.bfloat16)\n"
        "torch.ops.trimtab.linear(x, torch.ones(512, 4096, dtype=torch.bfloat16), None)\n"
        "print(open('/proc/self/maps').read())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    runtimes = set(re.findall(r"/\S*(?:libgomp|libiomp|libomp)\S*", done.stdout))
    assert len(runtimes) == 1, runtimes
