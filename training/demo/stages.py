"""The stages that make the family, each one resumable.

A stage leaves `<name>.stage.json` in the working directory, with the fingerprint of what it was made from: run again,
finished stages are skipped, a killed one continues from its checkpoint, and a changed preset remakes what depends on it
and nothing else.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from training.chats import chat_document
from training.data import Document, Rows, join, pack
from training.demo.dialogues import conversations
from training.demo.presets import Preset, Size
from training.demo.text import documents
from training.demo.tokenizer import END, fast_tokenizer, train_tokenizer
from training.demo.world import World, make_world
from training.loop import Outcome, Recipe, train

BASE, SMALL, EXPERT, BASE_TUNED = "base", "base-small", "expert", "base-tuned"


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where and with what the stages work."""

    preset: Preset
    seed: int
    directory: Path
    console: Console

    @property
    def world(self) -> World:
        """The seeded world."""
        return make_world(self.seed, self.preset.people, self.preset.tuned)

    def member(self, name: str) -> Path:
        """The Hugging Face directory of a member."""
        return self.directory / "members" / name

    @property
    def tokenizer(self) -> Tokenizer:
        """The family's tokenizer, once made."""
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))


Report = dict[str, Any]


def run_stage(shop: Workshop, name: str, depends: object, make: Callable[[], Report]) -> Report:
    """The report of stage `name`: read if it was made from the same `depends`, else made and written."""
    path = shop.directory / f"{name}.stage.json"
    fingerprint = hashlib.sha256(json.dumps([shop.seed, depends], sort_keys=True, default=str).encode()).hexdigest()
    if path.exists():
        stored: Report = json.loads(path.read_text())
        if stored["fingerprint"] == fingerprint:
            shop.console.print(f"{name}: already made")
            return stored
    report = {**make(), "fingerprint": fingerprint}
    path.write_text(json.dumps(report, indent=1))
    return report


def make_tokenizer(shop: Workshop) -> Report:
    """Stage 1: learn the merges on a sample of the pretraining text and of the dialogues' words."""
    preset = shop.preset

    def make() -> Report:
        sample = list(itertools.islice(documents(shop.world, shop.seed, "tokenizer"), 20_000))
        tokenizer = train_tokenizer(sample, preset.vocabulary)
        tokenizer.save(str(shop.directory / "tokenizer.json"))
        return {"vocabulary": tokenizer.get_vocab_size()}

    return run_stage(shop, "tokenizer", [preset.people, preset.tuned, preset.vocabulary], make)


def make_text(shop: Workshop, tokenizer: Report) -> Report:
    """Stage 2: generate, tokenize and pack the pretraining text and the tuning dialogues."""
    preset = shop.preset

    def make() -> Report:
        world, cut = shop.world, shop.tokenizer
        end = _id(cut, END)
        rows = join(
            [
                pack(
                    _tokenized(cut, documents(world, shop.seed, f"phase {number}", phase.mixture)),
                    phase.rows,
                    preset.row,
                    end,
                )
                for number, phase in enumerate(preset.phases)
            ]
        )
        rows.save(shop.directory / "text.npz")
        held_out = pack(_tokenized(cut, documents(world, shop.seed, "held out")), 64, preset.row, end)
        held_out.save(shop.directory / "held-out.npz")
        fast = fast_tokenizer(cut, chat=True, max_length=preset.max_length)
        chats = (chat_document(fast, messages) for messages in conversations(world, shop.seed))
        tuning = pack(chats, preset.tuning_rows, preset.row, end)
        tuning.save(shop.directory / "dialogues.npz")
        return {"tokens": int(rows.ids.size), "tuning_targets": int(tuning.targets.sum())}

    depends = [tokenizer["fingerprint"], preset.row, [asdict(phase) for phase in preset.phases], preset.tuning_rows]
    return run_stage(shop, "text", depends, make)


def _tokenized(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Document]:
    stream = iter(texts)
    while chunk := list(itertools.islice(stream, 2_000)):
        for encoding in tokenizer.encode_batch_fast(chunk):
            yield Document(tuple(encoding.ids))


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, f"{token} is not in the vocabulary"
    return found


def pretrain(shop: Workshop, name: str, size: Size, recipe: Recipe, text: Report) -> Report:
    """Stages 3 and 4: a base model on the pretraining text."""

    def make() -> Report:
        torch.manual_seed(shop.seed)
        return _train_member(shop, name, LlamaForCausalLM(_config(shop, size)), recipe, "text")

    return run_stage(shop, name, [text["fingerprint"], asdict(size), asdict(recipe)], make)


def tune(shop: Workshop, name: str, start: str, recipe: Recipe, base: Report, text: Report) -> Report:
    """Stages 5 and 6: a member tuned on the dialogues, starting from the saved weights of `start`."""

    def make() -> Report:
        model = LlamaForCausalLM.from_pretrained(shop.member(start), dtype=torch.float32)
        return _train_member(shop, name, model, recipe, "dialogues")

    return run_stage(shop, name, [text["fingerprint"], base["fingerprint"], asdict(recipe)], make)


def _config(shop: Workshop, size: Size) -> LlamaConfig:
    end = _id(shop.tokenizer, END)
    return LlamaConfig(
        vocab_size=shop.tokenizer.get_vocab_size(),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.head,
        max_position_embeddings=shop.preset.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )


def _train_member(shop: Workshop, name: str, model: LlamaForCausalLM, recipe: Recipe, data: str) -> Report:
    """Train, save in bf16 with the tokenizer, forget the checkpoint."""
    rows = Rows.load(shop.directory / f"{data}.npz")
    held_out = Rows.load(shop.directory / "held-out.npz") if data == "text" else None
    # A checkpoint belongs to one recipe: the name carries it, so that a changed one does not continue from it.
    tag = hashlib.sha256(repr((recipe, model.config.to_json_string())).encode()).hexdigest()[:8]
    checkpoint = shop.directory / f"{name}-{tag}.pt"
    outcome = train(model, rows, recipe, checkpoint=checkpoint, held_out=held_out, title=name, console=shop.console)
    directory = shop.member(name)
    shutil.rmtree(directory, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer = fast_tokenizer(shop.tokenizer, chat=data == "dialogues", max_length=shop.preset.max_length)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    checkpoint.unlink()
    return _report(model, outcome, directory)


def _report(model: LlamaForCausalLM, outcome: Outcome, directory: Path) -> Report:
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    return {"params": model.num_parameters(), "sha256": digest, **asdict(outcome)}
