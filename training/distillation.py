"""A drafter for a target, in three steps (Goel et al. 2024, arXiv:2403.00858): text, the target's words, its logits.

1. A new drafter first learns to read: cross-entropy on text. 2. The target writes the responses, at several
temperatures, because those are the contexts that a drafter will meet. 3. White-box loss on the target's distributions
there, mixed with text so that the drafter forgets little. Every step resumes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from decoding.core import Sampling
from decoding.judge import weights_hash
from training.chats import Ids
from training.data import Document, Rows, join, pack
from training.drafter import first_drafter, read_tokenizer
from training.heads import reading
from training.loop import Recipe, train
from training.measure import Response, agreements, report
from training.store import Store, chunks, paced
from training.whitebox import Loss, distillation
from training.writer import open_engine, write

GAMMAS = (1, 2, 4, 8)
_AT_ONCE = 128  # prompts that the target answers in one batch


@dataclass(frozen=True, slots=True)
class Material:
    """Token ids of what the target is asked and of plain text, for training and held out for the report."""

    prompts: Sequence[Ids]
    texts: Sequence[Ids]
    held_out_prompts: Sequence[Ids]
    held_out_texts: Sequence[Ids]


@dataclass(frozen=True, slots=True)
class Job:
    """One distillation. `reading` is the recipe of step 1 for a drafter with new weights, `recipe` that of step 3."""

    target: Path
    start: str
    output: Path
    loss: str
    recipe: Recipe
    reading: Recipe | None = None
    per_position: bool = False  # tvd++: a sigma for each position
    lk_decay: float | None = None  # lk: the mixed form
    temperatures: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)
    max_tokens: int = 96
    text_share: float = 0.1
    length: int = 256

    @property
    def criterion(self) -> Loss:
        """The loss of step 3. Raises ValueError for an unknown name."""
        return Loss(self.loss, self.per_position, self.lk_decay)


def distil(job: Job, material: Material, console: Console) -> dict[str, Any]:
    """Make the drafter and write `job.output`: weights (bf16), tokenizer, trimtab.json. Returns the card.

    The target's responses stay in `work/responses.jsonl` there, so that another loss can be tried on the same ones.

    Raises ValueError: the drafter's tokenizer is another one, an unknown loss, a checkpoint of another recipe, nothing
    to train on. ModelLoadError: the target cannot be served.
    """
    criterion = job.criterion
    tokenizer = read_tokenizer(job.target)
    work = job.output / "work"
    target: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job.target, dtype=torch.float32).eval()
    torch.manual_seed(job.recipe.seed)
    drafter, new = first_drafter(job.start, target, tokenizer)
    responses, held_out = _responses(job, material, work, console)
    end = int(tokenizer.eos_token_id)
    texts = _pack([Document(ids) for ids in material.texts], job.length, end)
    if new and job.reading is not None and texts is not None:
        train(
            drafter, texts, job.reading, checkpoint=work / "reading.pt", objective=reading(drafter), title="reading",
            console=console,
        )  # fmt: skip
    rows = mixed(_pack([_document(each, end) for each in responses], job.length, end), texts, job.text_share)
    objective = distillation(target, drafter, criterion, console)
    outcome = train(
        drafter, rows, job.recipe, checkpoint=work / "distil.pt", objective=objective, title="distil", console=console
    )
    drafter.eval().to(torch.bfloat16).save_pretrained(job.output)
    tokenizer.save_pretrained(job.output)
    metrics = _measure(target, drafter.float(), held_out, material.held_out_texts, job.recipe.batch)
    metrics |= {"tokens": outcome.tokens, "cpu_minutes": round(outcome.cpu_minutes, 2), "losses": outcome.losses[-1:]}
    card = _card(job, material, metrics)
    (job.output / "trimtab.json").write_text(json.dumps(card, indent=1) + "\n")
    for name in ("reading.pt", "distil.pt"):
        (work / name).unlink(missing_ok=True)
    return card


def mixed(responses: Rows | None, texts: Rows | None, text_share: float) -> Rows:
    """All response rows and so many text rows (repeated if need be) that they are `text_share` of the whole.

    Without responses, the texts; without texts, the responses. Raises ValueError without either.
    """
    if responses is None or texts is None:
        alone = texts if responses is None else responses
        if alone is None:
            raise ValueError("there is neither a prompt nor a text to train on; check the data")
        return alone
    count = round(len(responses) * text_share / (1 - text_share))
    if count == 0:
        return responses
    picked = np.arange(count) % len(texts)
    return join([responses, Rows(texts.ids[picked], texts.targets[picked])])


def _responses(job: Job, material: Material, work: Path, console: Console) -> tuple[list[Response], list[Response]]:
    """What the target answers to every prompt at every temperature: for training, held out."""
    prompts = [*material.prompts, *material.held_out_prompts]
    asked = [(prompt, temperature) for prompt in prompts for temperature in job.temperatures]
    made_from = {
        "target": weights_hash(job.target),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "temperatures": job.temperatures,
        "max_tokens": job.max_tokens,
        "seed": job.recipe.seed,
    }
    store = Store(work / "responses.jsonl", made_from)
    left = list(enumerate(asked))[len(store.entries) :]
    if left:
        engine = open_engine(job.target)
        for part in paced(chunks(left, _AT_ONCE), "the target writes", "responses", console):
            samplings = [
                Sampling(temperature=temperature, seed=job.recipe.seed * 1_000_003 + index, max_tokens=job.max_tokens)
                for index, (_, temperature) in part
            ]
            written = write(engine, [prompt for _, (prompt, _) in part], samplings)
            store.add([{"ids": ids} for ids in written])
    known = [
        Response(prompt, tuple(entry["ids"]), temperature)
        for (prompt, temperature), entry in zip(asked, store.entries, strict=True)
    ]
    cut = len(material.prompts) * len(job.temperatures)
    return known[:cut], known[cut:]


def _document(response: Response, end: int) -> Document:
    """The loss counts the response; `pack` ends a document itself."""
    ids = response.ids[:-1] if response.ids[-1:] == (end,) else response.ids
    return Document(response.prompt + ids, (False,) * len(response.prompt) + (True,) * len(ids))


def _pack(documents: Sequence[Document], length: int, end: int) -> Rows | None:
    if not documents:
        return None
    return pack(documents, sum(-(-(len(document.ids) + 1) // length) for document in documents), length, end)


def _measure(
    target: nn.Module, drafter: nn.Module, responses: Sequence[Response], texts: Sequence[Ids], batch: int
) -> dict[str, Any]:
    """Acceptance on the target's held-out responses, by temperature, and on held-out text at T = 1."""
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (drafter, target)]
    found: dict[str, Any] = {"params": sizes[0], "size_ratio": round(sizes[0] / sizes[1], 4)}
    if responses:
        by = report(agreements(target, drafter, responses, batch), responses, GAMMAS, sizes[0] / sizes[1])
        found["by_temperature"] = by
    read = [Response(ids[:1], ids[1:], 1.0) for ids in texts if len(ids) > 1]
    if read:
        accepted = torch.cat([each.accepted for each in agreements(target, drafter, read, batch)])
        found["text_acceptance"] = round(float(accepted.mean()), 4)
    return found


def _card(job: Job, material: Material, metrics: dict[str, Any]) -> dict[str, Any]:
    start = Path(job.start)
    made = start.is_dir() and bool(list(start.glob("*.safetensors")))
    return {
        "role": "drafter",
        "command": "distill",
        "target": job.target.resolve().name,
        "target_hash": weights_hash(job.target),
        "made_from": weights_hash(start) if made else (start.name if start.is_dir() else job.start),
        "tokenizer": hashlib.sha256((job.output / "tokenizer.json").read_bytes()).hexdigest(),
        "sha256": weights_hash(job.output),
        "data": {"prompts": len(material.prompts), "texts": len(material.texts)},
        "seed": job.recipe.seed,
        "recipe": {
            "loss": job.loss,
            "per_position": job.per_position,
            "lk_decay": job.lk_decay,
            "temperatures": job.temperatures,
            "max_tokens": job.max_tokens,
            "text_share": job.text_share,
            "length": job.length,
            "reading": None if job.reading is None else asdict(job.reading),
            "distil": asdict(job.recipe),
        },
        "metrics": metrics,
    }
