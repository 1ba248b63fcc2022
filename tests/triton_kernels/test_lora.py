"""LoRA of packed tokens: the kernels in the interpreter against the reference, few tokens and many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.triton_kernels.mutate import mutated
from triton_kernels import lora
from triton_kernels.lora import FEW_TOKENS, lora_, lora_reference_

Tensor = torch.Tensor
Lora = tuple[Tensor, Tensor] | None


def make(ranks: list[int], width: int, out: int, dtype: torch.dtype) -> list[Lora]:
    """Adapters of these ranks, None for 0; products of about one."""
    loras: list[Lora] = []
    for rank in ranks:
        down, up = torch.randn(rank, width) * width**-0.5, torch.randn(rank, out) * max(1, rank) ** -0.5
        loras.append((down.to(dtype), up.to(dtype)) if rank else None)
    return loras


def table_of(loras: list[Lora]) -> Tensor:
    rows = [(0, 0, 0) if each is None else (each[0].data_ptr(), each[1].data_ptr(), len(each[0])) for each in loras]
    return torch.tensor(rows, dtype=torch.int64)


def worst(
    owners: list[int], ranks: list[int], width: int, out: int, dtype: torch.dtype,
    run: Callable[..., None] = lora_, strided: bool = False,
) -> float:  # fmt: skip
    """Largest error of `run`, as a multiple of what the dtype and the lengths of the sums allow."""
    torch.manual_seed(len(owners))
    tokens = len(owners)
    x, y = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype)
    if strided:
        x = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :width]
        y = torch.cat([y, torch.full_like(y, float("nan"))], 1)[:, :out]
    loras, who = make(ranks, width, out, dtype), torch.tensor(owners, dtype=torch.int32)
    want = y.clone()
    lora_reference_(x, want, who, loras)
    before = y.clone()
    run(x, y, who, table_of(loras), max(ranks))
    bare = torch.tensor([owner < 0 or ranks[owner] == 0 for owner in owners])
    if not torch.equal(y[bare], before[bare]):
        return float("inf")  # tokens without an adapter are not touched
    # fp32: sums of `width` and of rank products in another order. bf16: y cut off where torch rounds, an ulp of y; and
    # with many tokens h is cut off to bf16, an ulp of h each: at most an ulp of the sum of |h up|.
    eps = torch.finfo(dtype).eps
    allowed = (4 if dtype == torch.float32 else 1) * eps * want.float().abs() + 4 * 2**-23 * width**0.5
    if dtype == torch.bfloat16 and tokens > FEW_TOKENS:
        for number, each in enumerate(loras):
            if each is not None:
                mine = who == number
                allowed[mine] += eps * (x[mine].float() @ each[0].float().T).abs() @ each[1].float().abs()
    return float(((y.float() - want.float()).abs() / allowed).max())


FEW = [
    ([0], [1], 1, 1),
    ([-1], [4], 8, 8),
    ([0, -1, 1, 1, 0], [3, 17], 70, 130),
    ([2, 0, 1, -1, 2], [8, 0, 65], 300, 17),
    ([0, 1], [16, 16], 1111, 257),
]
MANY = [
    ([0] * 65, [1], 1, 1),
    ([-1] * 40 + [1] * 30 + [0] * 20 + [-1] * 7 + [2] * 3, [5, 70, 16], 90, 150),
    ([i % 4 - 1 for i in range(70)], [16, 0, 3], 200, 33),
    ([1] * 33 + [0] * 40, [2, 8], 333, 40),
]


@pytest.mark.parametrize(("owners", "ranks", "width", "out"), FEW + MANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_does_what_the_reference_does(
    owners: list[int], ranks: list[int], width: int, out: int, dtype: torch.dtype
) -> None:
    assert worst(owners, ranks, width, out, dtype) <= 1
    assert worst(owners, ranks, width, out, dtype, strided=True) <= 1


def test_more_than_a_thousand_tokens() -> None:
    assert worst([0] * 500 + [-1] * 30 + [1] * 500, [4, 2], 70, 20, torch.float32) <= 1


def test_the_reference_is_the_formula_in_double() -> None:
    x, y = torch.randn(3, 40), torch.randn(3, 9)
    (first, second) = make([4, 7], 40, 9, torch.float32)
    assert first is not None
    got = y.clone()
    lora_reference_(x, got, torch.tensor([0, -1, 0]), [first, second])
    want = y.double()
    want[[0, 2]] += x[[0, 2]].double() @ first[0].double().T @ first[1].double()
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


def test_nothing_to_do() -> None:
    owners, table = torch.empty(0, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64)
    lora_(torch.zeros(0, 4), torch.zeros(0, 5), owners, table, 8)
    y = torch.ones(2, 5)
    lora_(torch.zeros(2, 4), y, torch.zeros(2, dtype=torch.int32), table, 0)
    assert torch.equal(y, torch.ones(2, 5))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, y, owners = torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int32)
    table = torch.zeros(1, 3, dtype=torch.int64)
    for wrong in (
        (x[:1], y, owners, table), (x, y, owners[:1], table), (x, y.bfloat16(), owners, table),
        (x, y, owners.long(), table), (x, y, owners, table.int()), (x, y, owners, table[:, :2]),
        (x, torch.zeros(5, 2).T, owners, table),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="lora_: "):
            lora_(*wrong, 4)


MUTATIONS = [
    ("x[None, :] * down", "x[None, :] * down * 1.0001", "few"),
    ("(split * tokens + token) * h_width", "token * h_width", "few"),
    ("mine = owners == adapter", "mine = owners >= adapter", "many"),
    ("total += tl.sum(h[:, None] * up, axis=0)", "total = tl.sum(h[:, None] * up, axis=0)", "few"),
    ("adapter = _next_adapter(owners, adapter)", "adapter = 2147483647", "many"),
    ("mask=(r[None, :] < rank)", "mask=(r[None, :] < rank - 1)", "many"),
    ("for split in range(splits)", "for split in range(1)", "many"),
    ("(parts < splits)", "(parts < splits - 1)", "few"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "where"), MUTATIONS)
def test_broken_kernels_fail(old: str, new: str, where: str, tmp_path: Path) -> None:
    broken = mutated(lora.__file__, old, new, tmp_path).lora_
    for name, cases in (("few", FEW), ("many", MANY)):
        if where == name:
            assert max(worst(*case, torch.float32, run=broken) for case in cases) > 1
