"""A judge head for a target and a drafter: mined labels, hidden states, one logistic regression, a directory."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from decoding.core import Sampling
from decoding.judge import CARD, WEIGHTS, weights_hash
from training.chats import Ids
from training.drafter import read_tokenizer, same_tokenizer
from training.logistic import Linear, NothingToLearn, auc, fit_logistic
from training.mining import GRADERS, Answers, Label, greedy_choices, last_hidden, mine
from training.store import Store, chunks, paced
from training.writer import open_engine, write

_AT_ONCE = 128  # prompts that walk together
_RECALLS = (0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and its right answer if it is known (it is only counted: labels ask whether the answer *changes*)."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One judge head."""

    target: Path
    drafter: Path
    output: Path
    grader: str = "last-number"
    stop: str | None = None
    max_tokens: int = 128
    l2: float = 10.0
    balanced: bool = False
    seed: int = 0


def make_judge(job: Job, tasks: Sequence[Task], held_out: Sequence[Task], console: Console) -> dict[str, Any]:
    """Mine, fit and write `job.output`: judge.safetensors, trimtab.json. Returns the card.

    Labels of finished prompts stay in `work/labels.jsonl` there.

    Raises ValueError: another tokenizer, an unknown grader, a prompt that does not fit; NothingToLearn: no labels, or
    all the same. ModelLoadError: the target cannot be served.
    """
    mined = [_mine(job, part, name, console) for name, part in (("training", tasks), ("held-out", held_out))]
    target: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job.target, dtype="auto").eval()
    (x, y), (held_x, held_y) = (_features(target, [label for labels, _ in part for label in labels]) for part in mined)
    head = fit_logistic(x, y, l2=job.l2, balanced=job.balanced)
    head = Linear(head.weight.float().double(), float(torch.tensor(head.bias)))  # as it is stored
    save_file(
        {"weight": head.weight.float().contiguous(), "bias": torch.tensor([head.bias], dtype=torch.float32)},
        job.output / WEIGHTS,
    )
    metrics = {
        "labels": {"training": len(y), "held_out": len(held_y)},
        "important": {"training": int((~y).sum()), "held_out": int((~held_y).sum())},
        "training": judged(head(x), y),
        "held_out": judged(head(held_x), held_y),
        "target_accuracy": _accuracy([right for part in mined for _, right in part]),
    }
    card = _card(job, len(head.weight), [len(tasks), len(held_out)], metrics)
    (job.output / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return card


def judged(scores: Tensor, accept: Tensor) -> dict[str, Any]:
    """How a head's `scores` [n] tell `accept` [n] bool: AUC; accuracy and shares at threshold 0.5; other thresholds.

    `recall_important`: share of the important labels that are rejected. `accepted`: share of the unimportant ones that
    are accepted. `thresholds`: the one that rejects at least this share of the important ones, and what it accepts.
    """
    found = auc(scores, accept)
    if found is None:
        return {}
    bad = scores[~accept].sort().values
    table: dict[str, Any] = {}
    for recall in _RECALLS:
        cut = bad[min(len(bad) - 1, int(torch.tensor(recall * len(bad)).ceil()) - 1)]
        accepted = float((scores[accept] > cut).double().mean())
        table[f"{recall:g}"] = {"threshold": round(float(cut.sigmoid()), 4), "accepted": round(accepted, 4)}
    said = scores > 0
    return {
        "auc": round(found, 4),
        "accuracy": round(float((said == accept).double().mean()), 4),
        "recall_important": round(float((~said[~accept]).double().mean()), 4),
        "accepted": round(float(said[accept].double().mean()), 4),
        "thresholds": table,
    }


Mined = list[tuple[list[Label], bool | None]]
"""For each task its labels, and whether the target's own answer was right (None if nobody knows)."""


def _mine(job: Job, tasks: Sequence[Task], part: str, console: Console) -> Mined:
    """Labels of all tasks, from the store as far as it has them."""
    made_from = {
        "target": weights_hash(job.target),
        "drafter": weights_hash(job.drafter),
        "tasks": hashlib.sha256(json.dumps([[task.prompt, task.answer] for task in tasks]).encode()).hexdigest(),
        "settings": [job.grader, job.stop, job.max_tokens],
    }
    store = Store(job.output / "work" / f"labels-{part}.jsonl", made_from)
    left = tasks[len(store.entries) :]
    if left:
        tokenizer = read_tokenizer(job.target)
        if not same_tokenizer(read_tokenizer(job.drafter), tokenizer):
            raise ValueError(f"{job.drafter} has another tokenizer than the target; a drafter speaks the target's ids")
        if job.grader not in GRADERS:
            raise ValueError(f"no grader called {job.grader!r}; choose from {', '.join(GRADERS)}")
        drafter: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job.drafter, dtype=torch.float32).eval()
        engine = open_engine(job.target)
        ends = frozenset(engine.hosted["target"].text.eos_ids)
        answers = Answers(
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            GRADERS[job.grader],
            ends,
            job.stop,
            job.max_tokens,
        )

        def finish(prefixes: Sequence[Ids], room: Sequence[int]) -> list[Ids]:
            stop = () if job.stop is None else (job.stop,)
            return write(engine, prefixes, [Sampling(temperature=0, max_tokens=n, stop=stop) for n in room])

        for some in paced(chunks(left, _AT_ONCE), f"mining, {part}", "prompts", console):
            prompts = [tuple(tokenizer(task.prompt)["input_ids"]) for task in some]
            walks = mine(prompts, answers, finish, lambda pairs: greedy_choices(drafter, pairs))
            store.add(
                [
                    {
                        "labels": [[label.context, label.accept] for label in walk.labels],
                        "right": None if task.answer is None else walk.wanted == job_answer(job, task.answer),
                    }
                    for walk, task in zip(walks, some, strict=True)
                ]
            )
    return [
        ([Label(tuple(context), accept) for context, accept in entry["labels"]], entry["right"])
        for entry in store.entries
    ]


def job_answer(job: Job, answer: str) -> str | None:
    """A given answer as the grader reads it, so that "1,200" is "1200"."""
    return GRADERS[job.grader](answer)


def _features(target: PreTrainedModel, labels: Sequence[Label]) -> tuple[Tensor, Tensor]:
    """Hidden states [n, hidden] fp32 and labels [n] bool (accept)."""
    if not labels:
        raise NothingToLearn("there is no place where the drafter differs from the target; nothing can be judged")
    hidden = last_hidden(target, [label.context for label in labels])
    return hidden, torch.tensor([label.accept for label in labels])


def _accuracy(marks: Sequence[bool | None]) -> float | None:
    known = [mark for mark in marks if mark is not None]
    return round(sum(known) / len(known), 4) if known else None


def _card(job: Job, hidden: int, tasks: list[int], metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "role": "judge",
        "command": "judge",
        "target": job.target.resolve().name,
        "target_hash": weights_hash(job.target),
        "drafter": job.drafter.resolve().name,
        "drafter_hash": weights_hash(job.drafter),
        "tokenizer": hashlib.sha256((job.target / "tokenizer.json").read_bytes()).hexdigest(),
        "hidden_size": hidden,
        "accept": "weight . h + bias > logit(threshold), h at the draft token's own position",
        "seed": job.seed,
        "tasks": {"training": tasks[0], "held_out": tasks[1]},
        "recipe": {
            "grader": job.grader,
            "stop": job.stop,
            "max_tokens": job.max_tokens,
            "l2": job.l2,
            "balanced": job.balanced,
        },
        "metrics": metrics,
    }
