"""The GPU's benchmarks: bytes and bounds against numbers worked out by hand, and that their commands start."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.gpu
from benchmarks import bounds, kernels
from benchmarks.cases import FULL, QUICK
from benchmarks.models import SIZES, build, make_rule, spoiled, text_of

ROOT = Path(__file__).parent.parent


def bytes_of(kernel: str, shape: str) -> int | None:
    """Of the full-size case with this shape; skips where the kernel is not in the tree."""
    if not kernels.available(kernel):
        pytest.skip(f"no {kernel} in this tree")
    (found,) = [case for case in kernels.KERNELS[kernel](FULL) if case.shape == shape]
    return found.bytes


@pytest.mark.parametrize(
    ("kernel", "shape", "expected"),
    [
        # rows x 4096 x 2 bytes, read and written, with a residual twice
        ("rms_norm", "1024 rows", 2 * 8_388_608),
        ("rms_norm", "16 rows, residual", 4 * 131_072),
        # 14336 x 2 bytes, two read and one written
        ("swiglu", "16 rows", 3 * 458_752),
        # of a token 8 heads x 128 x 2 bytes for key and value, read and written, and its slot
        ("store_kv", "64 tokens", 64 * (4 * 2_048 + 8)),
        # 16 x 2048 positions of 4096 bytes; 16 x 32 x 128 x 2 bytes of queries, and of outputs
        ("paged_attention", "16 tracks of 2048, 1 tokens each", 134_217_728 + 2 * 131_072),
        # three rows of 128256 x 2 bytes read, one of 128256 x 4 written
        ("mix", "proxy-tuning, 1 rows", 3 * 256_512 + 513_024),
        # the same, and three reads of the mixed row
        ("mix + sample_verify", "proxy-tuning, top-p 0.9, 1 rows", 3 * 256_512 + 4 * 513_024),
        # three passes over the rows of the base, the small model and two experts
        ("fusion_weights", "2 experts, 1 rows", 3 * 4 * 256_512),
    ],
)
def test_bytes_are_what_the_docstrings_say(kernel: str, shape: str, expected: int) -> None:
    assert bytes_of(kernel, shape) == expected


def test_every_kernel_that_is_there_has_cases() -> None:
    helpers = {"__init__", "dispatch", "floats", "noise", "chunked_linear", "distill_sweep"}
    measured = {part for name in kernels.KERNELS for part in name.split(" + ")}
    measured |= {"draw"}  # as a part of sample_verify
    assert {path.stem for path in (ROOT / "triton_kernels").glob("*.py")} <= measured | helpers


def test_quick_tries_a_kernel_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(
        sys, "argv", ["kernels", "--quick", "--kernel", "rms_norm", "--out", str(tmp_path / "out.json")]
    )
    kernels.main()
    shown = capsys.readouterr().out
    assert "nothing measured" in shown
    assert not list(tmp_path.iterdir())
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert kernels.try_out(kernels.KERNELS["rms_norm"](QUICK)[1])["difference"] < 1e-6


def test_differences_are_seen() -> None:
    one = (torch.tensor([3.0, -torch.inf, 4.0]), torch.tensor([1, 2, 3, 4]))
    assert kernels.difference(one, one) == 0
    assert kernels.difference((torch.tensor([3.0, -torch.inf, 4.5]), one[1]), one) == pytest.approx(0.1)
    assert kernels.difference((one[0], torch.tensor([1, 2, 3, 5])), one) == pytest.approx(0.25)
    for odd in (0.0, torch.inf, torch.nan):
        assert kernels.difference((torch.tensor([3.0, odd, 4.0]), one[1]), one) == torch.inf


def test_what_a_step_reads() -> None:
    # Llama-3.1-8B without its embedding: 32 (2 4096^2 + 2 4096 1024 + 3 4096 14336 + 2 4096) + 4096 + 128256 4096
    assert bounds.weight_bytes(SIZES["8B"]) == 2 * 7_504_924_672
    assert bounds.kv_bytes(SIZES["8B"]) == 131_072  # 32 layers, keys and values, 8 heads of 128, 2 bytes
    tiny = build(SIZES["tiny"], 0, torch.device("cpu"))
    read = sum(p.numel() for name, p in tiny.named_parameters() if "embed_tokens" not in name)
    assert bounds.weight_bytes(SIZES["tiny"]) == 2 * read
    assert bounds.step_bytes(SIZES["8B"], 16, 512.5) == 15_009_849_344 + 16 * 512.5 * 131_072
    assert bounds.bound_ms([SIZES["8B"]], 16, 512.5, 4e12) == pytest.approx(16.084639744 / 4)
    assert kernels.bandwidth_of(1 << 30, 0.5e-3) == pytest.approx(4.295e12, rel=1e-3)
    assert kernels.bound_us(1_000_000, 4e12) == pytest.approx(0.25)


def test_shares() -> None:
    assert bounds.hidden_share(beside=10.0, after=12.0, sides=2.5) == pytest.approx(0.8)
    assert bounds.flip_rate([[1, 2], [3]], [[1, 2], [4]]) == 0.5
    assert bounds.wrong_share([1, 2, 0], [0, 1], [[1, 2, 1], [2, 0]]) == pytest.approx(0.2)
    settings = {"default": {"1": {"plain": {"step_ms": 4.0}, "three forwards": {"step_ms": 5.0}}}}
    settings["default"]["1"] |= {"proxy-tuning": {"step_ms": 5.5}, "generate": {"step_ms": 10.0}}
    found = benchmarks.gpu.ratios({"settings": settings, "bound_ms": {"1": {"plain": 3.4, "proxy-tuning": 3.5}}}, "1")
    assert found["plain: share of the bandwidth bound"] == pytest.approx(0.85)
    assert found["proxy-tuning: time over its three forwards"] == pytest.approx(1.1)
    assert found["plain over generate"] == 2.5
    assert "plain: batch-invariant over default" not in found


def test_a_taught_model_writes_its_rule_and_a_spoiled_one_is_wrong_as_often_as_asked() -> None:
    rule = make_rule(SIZES["tiny"].vocab, 0)
    assert sorted(text_of(rule, 0, 512)) == list(range(512))
    assert (spoiled(rule, 0.25, 1) != rule).sum() == 128
    assert sorted(spoiled(rule, 0.25, 1).tolist()) == list(range(512))
    model = build(SIZES["tiny"], 0, torch.device("cpu"), rule)
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(ids).logits.argmax(-1), rule[ids])


def test_predictions_are_right_at_their_share() -> None:
    rule = make_rule(512, 0)
    (made,) = benchmarks.gpu.predictions("prediction, 0.7 right", rule, [[3, 9]], 400)
    right = sum(a == b for a, b in zip(made, text_of(rule, 9, 400), strict=True))
    assert 0.6 < right / 400 < 0.8
    assert benchmarks.gpu.predictions("plain", rule, [[3, 9]], 400) == [()]


@pytest.mark.parametrize("module", [kernels, benchmarks.gpu])
def test_without_a_gpu_nothing_is_measured(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit):
        module.main()
    assert "CUDA device" in capsys.readouterr().err
