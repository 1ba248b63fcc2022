"""Judge heads are read whole or refused with a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from decoding.core import ModelLoadError
from decoding.judge import read_judge, weights_hash

CARD: dict[str, Any] = {"role": "judge", "target_hash": "ab" * 32, "hidden_size": 3}


def head(path: Path, card: object = CARD, **tensors: torch.Tensor) -> Path:
    stored = {"weight": torch.tensor([1.0, -2.0, 0.5]), "bias": torch.tensor([0.25])} | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor.numel()}, path / "judge.safetensors")
    (path / "trimtab.json").write_text(card if isinstance(card, str) else json.dumps(card))
    return path


def test_it_is_read(tmp_path: Path) -> None:
    read = read_judge(head(tmp_path))
    assert torch.equal(read.weight, torch.tensor([1.0, -2.0, 0.5]))
    assert read.weight.dtype == torch.float32
    assert read.bias == 0.25
    assert read.target_hash == "ab" * 32
    torch.testing.assert_close(read.score(torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])), torch.tensor([0.25, 0.25]))
    half = read_judge(head(tmp_path, weight=torch.tensor([1.0, -2.0, 0.5]).bfloat16()))
    assert torch.equal(half.weight, read.weight)
    assert half.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda p: (p / "judge.safetensors").unlink(), "has no judge.safetensors"),
        (lambda p: (p / "trimtab.json").unlink(), "has no trimtab.json"),
        (lambda p: (p / "judge.safetensors").write_bytes(b"nonsense"), "cannot be read as safetensors"),
        (lambda p: head(p, bias=torch.zeros(0)), "lacks the tensor bias"),
        (lambda p: head(p, weight=torch.ones(1, 3)), r"weight \[1, 3\] and bias \[1\]"),
        (lambda p: head(p, bias=torch.ones(3)), r"weight \[3\] and bias \[3\]"),
        (lambda p: head(p, weight=torch.ones(3, dtype=torch.int64)), "floating point"),
        (lambda p: head(p, weight=torch.tensor([1.0, float("nan"), 0.0])), "not finite"),
        (lambda p: head(p, bias=torch.tensor([float("inf")])), "not finite"),
        (lambda p: head(p, weight=torch.ones(4)), "hidden_size 3"),
        (lambda p: head(p, card="{"), "not valid JSON"),
        (lambda p: head(p, card=[]), "needs"),
        (lambda p: head(p, card=CARD | {"role": "drafter"}), "needs"),
        (lambda p: head(p, card={"role": "judge"}), "target_hash"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, break_it: Callable[[Path], object], says: str) -> None:
    head(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ModelLoadError, match=says):
        read_judge(tmp_path)


def test_the_hash_is_of_all_bytes_in_the_order_of_names(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no safetensors"):
        weights_hash(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "a.safetensors").write_bytes(b"first ")
    (tmp_path / "config.json").write_bytes(b"not counted")
    # sha256 of "first second"
    assert weights_hash(tmp_path) == "92088ec140fc553e4b1ede202edccb65a807bbf8a38d765a3ad38013c0f13688"
