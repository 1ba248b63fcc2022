"""What `pretrain` and `sft` share: read JSON lines, train with the one loop, write a model directory and its card."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from training.chats import read_documents
from training.data import Document, pack
from training.loop import Outcome, Recipe, train

_MOST_ROWS = 10_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a command."""

    command: str
    role: str
    data: Path
    model: Path
    output: Path
    length: int
    held_out: float  # share of documents kept for the metric at the end
    recipe: Recipe


def fit(job: Job, *, fresh: bool) -> Outcome:
    """Train and write `job.output`: weights, tokenizer, and trimtab.json.

    `fresh` draws new weights from the model's config instead of going on from its weights.

    Raises:
        typer.BadParameter: the tokenizer is slow or has no end token, or a line of the data is malformed.
    """
    torch.manual_seed(job.recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not isinstance(tokenizer.eos_token_id, int):
        raise typer.BadParameter("the model needs a fast tokenizer (tokenizer.json) with an eos_token")
    model: PreTrainedModel = (
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model), dtype=torch.float32)
        if fresh
        else AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    )
    try:
        documents = list(read_documents(job.data, tokenizer))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    kept = max(1, round(len(documents) * job.held_out))
    held_out = pack(documents[:kept], _rows(documents[:kept], job.length), job.length, tokenizer.eos_token_id)
    rows = pack(documents[kept:], _rows(documents[kept:], job.length), job.length, tokenizer.eos_token_id)
    job.output.mkdir(parents=True, exist_ok=True)
    checkpoint = job.output / "checkpoint.pt"
    outcome = train(
        model, rows, job.recipe, checkpoint=checkpoint, held_out=held_out, title=job.command, console=Console()
    )
    model.to(torch.bfloat16).save_pretrained(job.output)
    tokenizer.save_pretrained(job.output)
    write_card(job, outcome)
    checkpoint.unlink()
    return outcome


def _rows(documents: Iterable[Document], length: int) -> int:
    """Enough rows for all of them: rows begin with documents, so cutting can only save room."""
    return min(_MOST_ROWS, sum(-(-(len(document.ids) + 1) // length) for document in documents))


def write_card(job: Job, outcome: Outcome) -> None:
    """Write trimtab.json beside the weights: role, what it was made from, recipe, metric."""
    card: dict[str, Any] = {
        "role": job.role,
        "command": job.command,
        "made_from": digest(job.model.glob("*.safetensors")),
        "tokenizer": digest([job.output / "tokenizer.json"]),
        "data": digest([job.data]),
        "recipe": asdict(job.recipe),
        "metrics": {
            "held_out_nats": outcome.held_out_nats,
            "tokens": outcome.tokens,
            "cpu_minutes": outcome.cpu_minutes,
        },
    }
    (job.output / "trimtab.json").write_text(json.dumps(card, indent=1) + "\n")


def digest(paths: Iterable[Path]) -> str | None:
    """sha256 over the files in the order of their names; None without any."""
    found = sorted(paths)
    if not found:
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()
