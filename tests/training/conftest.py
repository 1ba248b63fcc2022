"""Two small trained models, for the tests of what is made for a target."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.fakes import byte_tokenizer
from tests.training.small import invoke, lines, texts


def read(directory: Path, entries: list[str]) -> Path:
    """A small model that has read `entries`, in `directory`."""
    blank, made = directory / "blank", directory / "made"
    byte_tokenizer().save_pretrained(blank)
    LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=256, pad_token_id=256, architectures=["LlamaForCausalLM"],
    ).save_pretrained(blank)  # fmt: skip
    data = lines(blank / "text.jsonl", [{"text": text} for text in entries])
    invoke("pretrain", "--data", data, "--model", blank, "--output", made, "--steps", 200, "--batch", 8,
           "--length", 48, "--learning-rate", 1e-2)  # fmt: skip
    return made


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It counts up, and likes the letter a."""
    return read(tmp_path_factory.mktemp("target"), texts(0, 200))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It counts down, and likes the letter b: as a drafter for `target` it errs everywhere, but only digits matter."""
    return read(tmp_path_factory.mktemp("other"), texts(0, 200, letters="abbb", step=-1))
