"""Block efficiency against closed forms and against every text of a small world; agreements against a plain loop."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.measure import (
    Agreement,
    Response,
    agreements,
    block_efficiency,
    estimated_efficiency,
    mbsu,
    passes,
    report,
)


@pytest.mark.parametrize("gamma", [1, 3, 4])
def test_all_or_nothing(gamma: int) -> None:
    assert passes([1.0] * 20, gamma) == math.ceil(20 / (gamma + 1))
    assert passes([0.0] * 20, gamma) == 20
    assert passes([], gamma) == 0


def test_a_pass_ends_with_a_correction() -> None:
    # The first pass keeps one draft and corrects the second token; the next one keeps two and adds one.
    assert passes([1.0, 0.0, 1.0, 1.0, 1.0], gamma=2) == 2
    assert passes([0.5], gamma=2) == 1
    assert passes([0.5, 0.5], gamma=1) == pytest.approx(1.5)


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_the_mean_over_all_texts_is_that_of_the_algorithm(gamma: int) -> None:
    """Texts drawn from p, given each the exact expectation, average to the passes of drafts kept with chance 1 - TV."""
    p, q, length = (0.6, 0.3, 0.1), (0.3, 0.3, 0.4), 5
    alpha = sum(map(min, p, q))
    mean = 0.0
    for text in itertools.product(range(3), repeat=length):
        mean += math.prod(p[t] for t in text) * passes([min(1.0, q[t] / p[t]) for t in text], gamma)
    assert mean == pytest.approx(passes([alpha] * length, gamma), abs=1e-12)


def test_long_texts_reach_the_estimate() -> None:
    alpha, gamma = 0.7, 4
    same = Agreement(torch.full((4000,), alpha), torch.full((4000,), alpha))
    # An error of one pass at the end of 4000 / 2.8 passes.
    assert block_efficiency([same], gamma) == pytest.approx(estimated_efficiency(alpha, gamma), rel=2e-3)
    assert estimated_efficiency(alpha, gamma) == pytest.approx((1 - alpha**5) / (1 - alpha))
    assert mbsu(2.0, 5, 0.1) == pytest.approx(2.0 / 1.5)


def tiny(seed: int, vocabulary: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.5, bos_token_id=None, eos_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_agreements_row_by_row(temperature: float) -> None:
    target, drafter = tiny(0), tiny(1, vocabulary=20)  # a padded head: the extra ids are no tokens
    responses = [Response((3, 4), (5, 6, 0), temperature), Response((7,), (8,), temperature)]
    found = agreements(target, drafter, responses, batch=2)
    for response, agreement in zip(responses, found, strict=True):
        for i, token in enumerate(response.ids):
            context = torch.tensor([[*response.prompt, *response.ids[:i]]])
            z, y = (model(input_ids=context).logits[0, -1, :16].detach() for model in (target, drafter))
            if temperature == 0:
                accepted, kept = float(z.argmax() == y.argmax()), float(y.argmax() == token)
            else:
                p, q = (z / temperature).softmax(-1), (y / temperature).softmax(-1)
                accepted, kept = float(torch.minimum(p, q).sum()), min(1.0, float(q[token] / p[token]))
            assert float(agreement.accepted[i]) == pytest.approx(accepted, abs=1e-5)
            assert float(agreement.kept[i]) == pytest.approx(kept, abs=1e-4)


def test_a_model_drafts_perfectly_for_itself() -> None:
    model = tiny(0)
    responses = [Response((3, 4), (5, 6, 7, 8, 9), 1.0), Response((3,), (2, 2, 2, 2, 2), 0.7)]
    table = report(agreements(model, model, responses, 2), responses, (1, 4), size_ratio=0.5)
    assert list(table) == ["0.7", "1"]
    for found in table.values():
        assert found["acceptance"] == pytest.approx(1, abs=1e-4)
        assert found["draft_length"]["4"]["tau"] == pytest.approx(5, abs=0.01)
        assert found["draft_length"]["4"]["mbsu"] == pytest.approx(5 / 3, abs=0.01)
