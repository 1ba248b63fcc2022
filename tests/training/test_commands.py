"""`pretrain` and `sft` from the command line: JSON lines in, a Hugging Face directory and its card out."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from training.__main__ import app
from training.demo.dialogues import conversations
from training.demo.text import documents
from training.demo.tokenizer import fast_tokenizer, train_tokenizer
from training.demo.world import make_world

WORLD = make_world(seed=0, people=50, tuned=20)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and a tokenizer, no weights."""
    directory = tmp_path_factory.mktemp("blank")
    learned = train_tokenizer(itertools.islice(documents(WORLD, 0), 500), vocabulary=400)
    fast_tokenizer(learned, chat=True, max_length=128).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        bos_token_id=None,
        eos_token_id=0,
    )
    config.save_pretrained(directory)
    return directory


def lines(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def invoke(*arguments: object) -> str:
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exit_code == 0, shown.output
    return shown.output


def test_pretrain_then_sft(blank: Path, tmp_path: Path) -> None:
    text = lines(tmp_path / "text.jsonl", [{"text": text} for text in itertools.islice(documents(WORLD, 0), 200)])
    base, expert = tmp_path / "base", tmp_path / "expert"
    short = ("--steps", 12, "--batch", 4, "--length", 64)
    assert "held-out loss" in invoke("pretrain", "--data", text, "--model", blank, "--output", base, *short)
    chats = lines(
        tmp_path / "chats.jsonl", [{"messages": chat} for chat in itertools.islice(conversations(WORLD, 0), 60)]
    )
    invoke("sft", "--data", chats, "--model", base, "--output", expert, *short)
    card = json.loads((expert / "trimtab.json").read_text())
    assert card["role"] == "expert"
    assert card["made_from"] is not None
    assert card["metrics"]["held_out_nats"] > 0
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, expert))
    assert after.dtype == torch.bfloat16
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(expert).chat_template
    assert not (expert / "checkpoint.pt").exists()


def test_a_malformed_line_is_named(blank: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "bad.jsonl", [{"text": "fine"}, {"words": "not fine"}])
    shown = CliRunner().invoke(
        app, ["pretrain", "--data", str(data), "--model", str(blank), "--output", str(tmp_path / "o")]
    )
    assert shown.exit_code == 2
    assert "line 2" in shown.output


def test_prompt_and_completion_pairs(blank: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}: ", "completion": f"{i}"} for i in range(40)]
    data = lines(tmp_path / "pairs.jsonl", [dict(pair) for pair in pairs])
    short = ("--steps", 3, "--batch", 2, "--length", 16)
    invoke("pretrain", "--data", data, "--model", blank, "--output", tmp_path / "pairs", *short)
