"""`python -m training judge`: a judge head, which accepts harmless drafts that the exact rule refuses."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from decoding.core import ModelLoadError
from training.chats import read_tasks
from training.demo.tasks import STOP, sums
from training.judging import Job, Task, make_judge
from training.mining import GRADERS

DEMO = "demo"  # in place of a file: the embedded family's sums


_Target = Annotated[Path, typer.Option(help="Directory of the model that verifies.", exists=True, file_okay=False)]
_Drafter = Annotated[Path, typer.Option(help="Directory of the model that drafts.", exists=True, file_okay=False)]
_Output = Annotated[Path, typer.Option(help="Directory to write: judge.safetensors, trimtab.json.")]
_Data = Annotated[
    str,
    typer.Option(
        help='JSON lines of {"prompt", "answer"}: tasks with exact final answers. The word demo stands for the '
        "embedded family's sums."
    ),
]
_Grader = Annotated[str, typer.Option(help=f"How a text becomes a final answer: {', '.join(GRADERS)}.")]
_Stop = Annotated[
    str | None, typer.Option(help="String that ends an answer, beside the end token [demo: a blank line].")
]
_L2 = Annotated[float, typer.Option(min=0, help="Weight of the squared weights, as in sum of losses + l2/2 w^2.")]


def judge(
    target: _Target,
    drafter: _Drafter,
    output: _Output,
    data: _Data = DEMO,
    grader: _Grader = "last-number",
    stop: _Stop = None,
    tasks: Annotated[int, typer.Option(min=2, help="How many sums to draw for demo data.")] = 600,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    l2: _L2 = 10.0,
    balanced: Annotated[bool, typer.Option(help="Let both classes weigh the same; then 0.5 accepts far more.")] = False,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of tasks for the metrics.")] = 0.25,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Learn which drafts matter. A judge head accepts a draft that changes no answer, though it is not the target's.

    Labels need no people: at each place where the drafter's token differs from the target's, the draft is kept and the
    target goes on; the draft matters if the final answer changes. One weight row on the target's hidden state learns
    to tell. Text that was accepted so is no exact sample of the target any more: it is served only where a request
    asks for it. A killed run continues when it is run again.

    Example: python -m training judge --target server/family/base --drafter server/family/drafter --output my-judge
    """
    if data == DEMO:
        stop = stop or STOP
    job = Job(target, drafter, output, grader, stop, max_tokens, l2, balanced, seed)
    try:
        learn, measure = _demo(seed, tasks, held_out) if data == DEMO else _read(Path(data), held_out)
        card = make_judge(job, learn, measure, Console())
    except (ValueError, ModelLoadError) as error:
        raise typer.BadParameter(str(error)) from error
    found = card["metrics"]
    typer.echo(
        f"wrote {output}: {found['labels']['training']} labels, held out {found['held_out'] or 'one class only'}"
    )


def _demo(seed: int, count: int, held_out: float) -> tuple[list[Task], list[Task]]:
    apart = max(1, round(count * held_out))
    learn = [Task(*drawn) for drawn in sums(seed, count - apart, held_out=False)]
    return learn, [Task(*drawn) for drawn in sums(seed, apart, held_out=True)]


def _read(path: Path, held_out: float) -> tuple[list[Task], list[Task]]:
    if not path.is_file():
        raise ValueError(f"--data {path} is no file; give JSON lines, or the word {DEMO}")
    found = [Task(*each) for each in read_tasks(path)]
    apart = max(1, round(len(found) * held_out))
    if apart >= len(found):
        raise ValueError(f"{path.name} holds {len(found)} tasks; too few to learn from and to hold some out")
    return found[apart:], found[:apart]
