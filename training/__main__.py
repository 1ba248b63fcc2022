"""`python -m training <command>`."""

import typer

from training.demo.command import demo
from training.distill import distill
from training.judge import judge
from training.pretrain import pretrain
from training.sft import sft

app = typer.Typer(
    name="training",
    help="Make the models that steer: pretraining, tuning, drafters, judges, and the embedded demo family.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def training() -> None:
    """Make the models that steer. `python -m training COMMAND --help` explains one command."""


app.command("demo")(demo)
app.command("distill")(distill)
app.command("judge")(judge)
app.command("pretrain")(pretrain)
app.command("sft")(sft)

if __name__ == "__main__":
    app()
