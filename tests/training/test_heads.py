"""Which models are a body and a head and nothing more, and that taking them apart changes no loss."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
)

from training.heads import head_of, hidden_states, is_plain, logits_by_row, reading
from training.loop import language_modelling

SMALL: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GPT2 = GPT2Config(vocab_size=41, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=0)
OPT = OPTConfig(
    vocab_size=41, hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32, bos_token_id=None, eos_token_id=0,
)  # fmt: skip
PLAIN = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "gpt2": GPT2,
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "phi, biased head": PhiConfig(**SMALL),
    "opt, projected embeddings": OPT,
    "gemma2 without its cap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=None),
}
OTHERS = {
    "gemma2": Gemma2Config(**SMALL, head_dim=8, initializer_range=1e-4),
    "cohere": CohereConfig(**SMALL, logit_scale=0.0625),
    "granite": GraniteConfig(**SMALL, logits_scaling=8.0),
}


def model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN.keys())
def test_plain_models(config: Any) -> None:
    made = model(config).eval()
    assert is_plain(made)
    ids = torch.randint(41, (2, 7))
    with torch.no_grad():
        want = made(input_ids=ids).logits
        torch.testing.assert_close(torch.nn.functional.linear(hidden_states(made, ids), *head_of(made)), want)
        torch.testing.assert_close(logits_by_row(made, ids, plain=True)(1, slice(2, 5)), want[1, 2:5])


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_models_that_do_more(config: Any) -> None:
    """Also where the logits are so small that a cap hardly shows."""
    made = model(config).eval()
    assert not is_plain(made)
    ids = torch.randint(41, (2, 7))
    with torch.no_grad():
        assert torch.equal(logits_by_row(made, ids, plain=False)(1, slice(2, 5)), made(input_ids=ids).logits[1, 2:5])


def test_what_is_no_head_or_lies_between_is_seen() -> None:
    assert not is_plain(torch.nn.Linear(3, 4))
    wrapped = model(PLAIN["llama"])
    wrapped.lm_head = torch.nn.Sequential(wrapped.lm_head)
    assert not is_plain(wrapped)
    between = model(PLAIN["llama"])
    between.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.01,))
    assert not is_plain(between)


def test_asking_leaves_no_trace() -> None:
    made = model(GPT2).train()  # with dropout
    state = torch.random.get_rng_state()
    assert is_plain(made)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert made.training
    assert made.transformer.drop.training
    assert not made.lm_head._forward_hooks


@pytest.mark.parametrize("name", ["llama, tied", "phi, biased head"])
def test_reading_in_chunks(name: str) -> None:
    made = model(PLAIN[name]).double().eval()
    ids, targets = torch.randint(41, (3, 9)), torch.arange(27).view(3, 9) % 3 > 0
    found = []
    for objective in (reading(made), language_modelling):
        made.zero_grad()
        loss = objective(made, ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(each.grad for each in made.parameters())])
    assert reading(made) is not language_modelling
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6, check_dtype=False)  # `shift` rounds to fp32
    assert reading(model(OTHERS["gemma2"])) is language_modelling
