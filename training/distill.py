"""`python -m training distill`: a drafter for a target."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from decoding.core import ModelLoadError
from training.chats import Ids, read_prompts
from training.demo.tasks import demo_world
from training.demo.tasks import material as demo_material
from training.distillation import GAMMAS, Job, Material, distil
from training.drafter import read_tokenizer
from training.loop import Recipe
from triton_kernels.distill_sweep import KINDS

DEMO = "demo"  # in place of a file: the embedded family's own text
_DEMO_PROMPTS, _DEMO_TEXTS = 2_500, 40_000


_Target = Annotated[Path, typer.Option(help="Directory of the model to draft for.", exists=True, file_okay=False)]
_Model = Annotated[
    str,
    typer.Option(
        help="Drafter to start from: a directory with the target's tokenizer (new weights if it has only a "
        "config.json), or a shape LAYERSxHIDDEN such as 1x64 for a new Llama of the target's vocabulary."
    ),
]
_Output = Annotated[Path, typer.Option(help="Directory to write: weights (bf16), tokenizer, trimtab.json.")]
_Data = Annotated[
    str,
    typer.Option(
        help='JSON lines: {"prompt"} or {"messages"} are answered by the target, {"text"} is read. Without '
        "prompts, the beginnings of the texts serve. The word demo stands for the embedded family's own text."
    ),
]
_Loss = Annotated[str, typer.Option(help=f"{', '.join(KINDS)}: KL(target, drafter), distance, or acceptance.")]
_Sigma = Annotated[str, typer.Option(help="tvd++: standardise rewards over the batch or by position.")]
_Decay = Annotated[
    float | None, typer.Option(min=0, help="lk: w KL + (1 - w) TVD, w = exp(-decay * acceptance), if given.")
]
_Temperature = Annotated[
    list[float] | None, typer.Option(min=0, help="The target writes at each of them [default: 0, 0.3, 0.7, 1].")
]
_Batch = Annotated[
    int, typer.Option(min=1, help="Rows a step; their hidden states are held, logits a chunk at a time.")
]


def distill(
    target: _Target,
    model: _Model,
    output: _Output,
    data: _Data = DEMO,
    loss: _Loss = "kl",
    sigma: _Sigma = "batch",
    lk_decay: _Decay = None,
    temperature: _Temperature = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 96,
    text_share: Annotated[float, typer.Option(min=0, max=0.9, help="Share of text among the rows of the loss.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the white-box loss.")] = 1000,
    reading_steps: Annotated[int, typer.Option(min=0, help="Steps on text before it, for new weights.")] = 2000,
    batch: _Batch = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens a row.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Highest rate; linear warm-up and decay.")] = 3e-3,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of prompts and texts for the report.")] = 0.05,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make a drafter: a small model that guesses what a large one will say, so that speculation is fast.

    The target writes the responses, at several temperatures (kept in work/responses.jsonl of the output); the drafter
    learns the target's distributions along them. At the end: acceptance (1 - total variation), tau (tokens a target
    pass) for several draft lengths, and MBSU (the speed-up if time were memory traffic), on held-out prompts. A killed
    run continues when it is run again.

    Example: python -m training distill --target server/family/base --model 1x64 --output my-drafter
    """
    temperatures = tuple(temperature or (0.0, 0.3, 0.7, 1.0))
    recipe = Recipe(steps, batch, learning_rate, warmup=max(1, steps // 20), seed=seed)
    reading = Recipe(reading_steps, batch, 5e-3, warmup=max(1, reading_steps // 20), seed=seed)
    console = Console()
    try:
        if sigma not in ("batch", "position"):
            raise ValueError(f"--sigma is batch or position, not {sigma}")
        by_position = sigma == "position"
        job = Job(target, model, output, loss, recipe, reading if reading_steps else None, by_position, lk_decay,
                  temperatures, max_tokens, text_share, length)  # fmt: skip
        card = distil(job, _material(data, job, held_out), console)
    except (ValueError, ModelLoadError) as error:
        raise typer.BadParameter(str(error)) from error
    _print(console, card["metrics"])
    typer.echo(f"wrote {output}")


def _material(data: str, job: Job, held_out: float) -> Material:
    tokenizer = read_tokenizer(job.target)
    if data == DEMO:
        return demo_material(tokenizer, demo_world(), job.recipe.seed, _DEMO_PROMPTS, _DEMO_TEXTS)
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"--data {data} is no file; give JSON lines, or the word {DEMO}")
    prompts, texts = read_prompts(path, tokenizer)
    kept = _apart(texts, held_out)
    if not prompts:  # halves of the texts then, each on its text's side of the split
        return Material(
            _fitting(_halves(texts[kept:]), job.length),
            texts[kept:],
            _fitting(_halves(texts[:kept]), job.length),
            _short(texts[:kept], job.length),
        )
    prompts = _fitting(prompts, job.length)
    apart = _apart(prompts, held_out)
    return Material(prompts[apart:], texts[kept:], prompts[:apart], _short(texts[:kept], job.length))


def _apart(items: list[Ids], share: float) -> int:
    """How many are held out: one at least, to have something to measure on."""
    return max(1, round(len(items) * share)) if items else 0


def _halves(texts: list[Ids]) -> list[Ids]:
    return [ids[: max(1, len(ids) // 2)] for ids in texts]


def _fitting(prompts: list[Ids], length: int) -> list[Ids]:
    """What does not fit a row has no response in it."""
    return [ids for ids in prompts if 0 < len(ids) < length]


def _short(texts: list[Ids], length: int) -> list[Ids]:
    return [ids[:length] for ids in texts]


def _print(console: Console, metrics: dict[str, object]) -> None:
    by_temperature = metrics.get("by_temperature")
    if not isinstance(by_temperature, dict):
        return
    table = Table("temperature", "acceptance", *(f"tau {gamma} (MBSU)" for gamma in GAMMAS), title="Held out")
    for temperature, found in by_temperature.items():
        cells = [found["draft_length"][str(gamma)] for gamma in GAMMAS]
        table.add_row(temperature, f"{found['acceptance']:.3f}", *(f"{c['tau']:.2f} ({c['mbsu']:.2f})" for c in cells))
    console.print(table)
