"""Reported log-probs: the kernels in the interpreter against sorting, and sorting against the engine's report."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from decoding.sampling import token_logprobs
from tests.triton_kernels.mutate import mutated
from triton_kernels import top_logprobs as subject
from triton_kernels.top_logprobs import top_logprobs, top_logprobs_reference

Tensor = torch.Tensor


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """[5, 150] in wider storage, with ties within and across chunks."""
    torch.manual_seed(0)
    x = (torch.randn(5, 160) * 3)[:, 2:152]
    x[1] = x[1].round()
    x[2] = 1.5
    x[3, 5:] = -torch.inf
    x[4] = x[4].abs().neg()
    x[4, 100], x[4, 7] = 0.0, -0.0
    return x.to(dtype)


def check(x: Tensor, index: Tensor, width: int, k: int, module: ModuleType = subject) -> None:
    lse = torch.logsumexp(x[index.long(), :width].float(), 1)
    chosen = torch.arange(len(index)) % width
    found = module.top_logprobs(x, index, width, lse, chosen, k, kernel=True)
    for got, want in zip(found, top_logprobs_reference(x, index, width, lse, chosen, min(k, width))):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "k"), [(1, 3), (33, 0), (33, 1), (150, 4)])
def test_the_kernels_do_what_the_reference_does(
    dtype: torch.dtype, width: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "CHUNK", 32)
    check(rows(dtype), torch.tensor([4, 0, 1, 2, 3, 0], dtype=torch.int32), width, k)


def test_most_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CHUNK", 64)
    check(rows(), torch.tensor([0, 1]), 150, 32)


def test_the_reference_is_the_engines_report() -> None:
    x, chosen = rows(), torch.tensor([3, 9, 0, 1, 149])
    lse = torch.logsumexp(x, 1)
    want = token_logprobs(x - lse[:, None], chosen.tolist(), 5)
    found = top_logprobs_reference(x, torch.arange(5), 150, lse, chosen, 5)
    assert [each.logprob for each in want] == found.chosen.tolist()
    assert [each.top for each in want] == [
        tuple(zip(i, v, strict=True)) for i, v in zip(found.ids.tolist(), found.values.tolist())
    ]


def test_what_does_not_fit_is_refused() -> None:
    x, index = torch.zeros(2, 50), torch.arange(2)
    with pytest.raises(ValueError, match="at most 32"):
        top_logprobs(x, index, 50, torch.zeros(2), index, 33)
    with pytest.raises(ValueError, match="do not fit"):
        top_logprobs(x, index, 51, torch.zeros(2), index, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(2147483647 - at)", "(0 + at)"),
        ("& 0x7FFFFFFF", "& 0x7FFFFF7F"),
        ("value_of(best >> 32) - lse", "value_of(best >> 32)"),
        ("at = chunk * BLOCK + ", "at = "),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    module.CHUNK = 32  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        check(rows(), torch.arange(5), 150, 7, module)
