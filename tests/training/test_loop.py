"""The loop: it learns, and a killed run ends with the weights of one that was not killed."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from training.data import Rows
from training.loop import Outcome, Recipe, train


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip


@pytest.fixture
def counting() -> Rows:
    """Rows that count upwards modulo 16: predictable from one token."""
    ids = (np.arange(12)[None, :] + np.arange(40)[:, None]) % 16
    return Rows(ids.astype(np.uint16), np.ones_like(ids, dtype=np.bool_))


RECIPE = Recipe(steps=220, batch=4, learning_rate=1e-2, warmup=10, save_seconds=0.0)


def run(model: LlamaForCausalLM, rows: Rows, checkpoint: Path | None = None, stop_after: int | None = None) -> Outcome:
    quiet = Console(file=io.StringIO())
    return train(model, rows, RECIPE, checkpoint=checkpoint, held_out=rows, console=quiet, stop_after=stop_after)


def test_it_learns(counting: Rows) -> None:
    outcome = run(tiny(), counting)
    assert outcome.held_out_nats is not None
    assert outcome.held_out_nats < 0.1 < outcome.losses[0]
    assert outcome.tokens == 220 * 4 * 12


@pytest.mark.parametrize("killed", [1, pytest.param(100, marks=pytest.mark.slow), 173])
def test_a_resumed_run_equals_an_uninterrupted_one(counting: Rows, tmp_path: Path, killed: int) -> None:
    whole, first, second = tiny(), tiny(), tiny()
    expected = run(whole, counting)
    path = tmp_path / "run.pt"
    run(first, counting, path, stop_after=killed)
    with torch.no_grad():  # what the second process starts with must not matter
        for parameter in second.parameters():
            parameter.zero_()
    outcome = run(second, counting, path)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert outcome.steps == expected.steps
    assert outcome.losses == expected.losses
    assert outcome.held_out_nats == expected.held_out_nats
    assert outcome.tokens == expected.tokens


def test_a_checkpoint_of_another_recipe_is_refused(counting: Rows, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(tiny(), counting, path, stop_after=2)
    with pytest.raises(ValueError, match="another recipe"):
        train(tiny(), counting, replace(RECIPE, batch=5), checkpoint=path, console=Console(file=io.StringIO()))


def test_the_rate_warms_up_and_decays() -> None:
    rates = [RECIPE.rate(step) for step in range(RECIPE.steps)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-4
