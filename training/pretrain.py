"""`python -m training pretrain`: a causal LM from plain text."""

from pathlib import Path
from typing import Annotated

import typer

from training.fit import Job, fit
from training.loop import Recipe


def pretrain(
    data: Annotated[Path, typer.Option(help='JSON lines, each {"text": ...}.', exists=True, dir_okay=False)],
    model: Annotated[
        Path, typer.Option(help="Directory with config.json and tokenizer files.", exists=True, file_okay=False)
    ],
    output: Annotated[Path, typer.Option(help="Directory to write: weights (bf16), tokenizer, trimtab.json.")],
    fresh: Annotated[bool, typer.Option(help="New weights from config.json, or go on from the model's own.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens a row.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Highest rate; linear warm-up and decay.")] = 2e-3,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents kept for the metric.")] = 0.02,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train a model on text. A killed run continues from its checkpoint when it is run again.

    Example: python -m training pretrain --data text.jsonl --model tiny-llama --output my-base --steps 2000
    """
    recipe = Recipe(steps, batch, learning_rate, warmup=max(1, steps // 30), seed=seed)
    outcome = fit(Job("pretrain", "base", data, model, output, length, held_out, recipe), fresh=fresh)
    typer.echo(f"wrote {output}: {outcome.tokens} tokens, held-out loss {outcome.held_out_nats:.4f} nats a token")
