"""`python -m training sft`: tune a causal LM on responses."""

from pathlib import Path
from typing import Annotated

import typer

from training.fit import Job, fit
from training.loop import Recipe


def sft(
    data: Annotated[
        Path,
        typer.Option(
            help='JSON lines, each {"messages": ...} or {"prompt", "completion"}.', exists=True, dir_okay=False
        ),
    ],
    model: Annotated[Path, typer.Option(help="Hugging Face directory to start from.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option(help="Directory to write: weights (bf16), tokenizer, trimtab.json.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens a row.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Highest rate; linear warm-up and decay.")] = 5e-4,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents kept for the metric.")] = 0.02,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Tune a model on chats or on prompt and completion pairs; the loss counts responses only.

    The result is an expert: steer a larger model of the same tokenizer with it and the model it was tuned from.

    Example: python -m training sft --data chats.jsonl --model base-small --output my-expert
    """
    recipe = Recipe(steps, batch, learning_rate, warmup=max(1, steps // 10), seed=seed)
    outcome = fit(Job("sft", "expert", data, model, output, length, held_out, recipe), fresh=False)
    typer.echo(f"wrote {output}: {outcome.tokens} tokens, held-out loss {outcome.held_out_nats:.4f} nats a token")
