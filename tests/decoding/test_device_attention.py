"""Models hosted on the GPU's kernels, which triton's interpreter runs here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import decoding.device_attention
from decoding.core import ModelLoadError
from decoding.runner import Runner
from decoding.selfcheck import check_twin
from tests.decoding.test_attention import Case, make
from tests.decoding.test_hosting import decode_packed, prompts
from tests.tiny import tiny_model

TWO: dict[str, dict[str, Any]] = {  # two layers of each, one of either kind where there are two
    "llama": {},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},  # window and cap
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},  # sinks
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mimo_v2_flash": {},  # values unlike keys
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Runner, "_measure_cost", lambda _: 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def two_layers(arch: str) -> PreTrainedModel:
    return tiny_model(arch, num_hidden_layers=2, **TWO[arch])


@pytest.mark.parametrize("arch", ["llama4_text", "mimo_v2_flash"])
def test_rows_equal_the_torch_specification(arch: str) -> None:
    """Prompts in chunks beside decoding tracks; both are fp32, so rounding alone differs."""
    rows = []
    for kernels in (False, "triton"):
        runner = Runner(two_layers(arch), "m", compile=False, kernels=kernels)
        texts, logits = decode_packed(runner, prompts()[:2], 3)
        runner.close()
        rows.append((texts, torch.cat(logits)))
    assert rows[0][0] == rows[1][0]
    torch.testing.assert_close(rows[1][1], rows[0][1], rtol=0, atol=1e-4 * max(1.0, float(rows[0][1].abs().max())))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_the_self_check_passes_with_forks_and_roll_backs(arch: str) -> None:
    model = two_layers(arch)
    check_twin(type(model), model.config, "triton")


@pytest.mark.parametrize("forgotten", ["sinks", "softcap"])
def test_the_self_check_finds_what_is_forgotten(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    honest = decoding.device_attention.paged_attention

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        return honest(*args, **(kwargs | {forgotten: None if forgotten == "sinks" else 0.0}))

    monkeypatch.setattr(decoding.device_attention, "paged_attention", attend)
    model = two_layers("gpt_oss" if forgotten == "sinks" else "gemma2")
    with pytest.raises(ModelLoadError, match="served wrongly"):
        check_twin(type(model), model.config, "triton")


def test_a_batch_says_where_tracks_begin_and_end() -> None:
    batch = make(Case(4, 2, 16, 16, 4, ((0, 7), (3, 1), (30, 5))), torch.float32).batch
    assert batch.starts is not None
    assert batch.ends is not None
    assert batch.starts.tolist() == [0, 7, 8, 13]
    assert batch.ends.tolist() == [7, 4, 35]
    assert batch.starts.dtype == batch.ends.dtype == torch.int32
