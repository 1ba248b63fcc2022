"""The one training loop: AdamW, warm-up and linear decay, clipping, checkpoints, a held-out metric at the end.

Knows nothing about text. What is trained on is `Rows`; what is minimised is an `Objective`. A run that is killed
continues from its last checkpoint and ends with the same weights as a run that was not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from training.data import Rows, batch_indices
from training.losses import cross_entropy

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, ids [batch, length], targets [batch, length] bool) -> scalar loss."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. One step reads `batch` rows."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    bf16: bool = True
    in_order: bool = False  # read the rows as they come, for text that is a curriculum; else shuffle every epoch
    seed: int = 0
    save_seconds: float = 60.0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then linear decay to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup)


@dataclass(slots=True)
class Progressed:
    """What a run has done so far, across kills."""

    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    recent: float = 0.0  # sum of the losses since the last entry of `losses`
    losses: list[float] = field(default_factory=list)  # mean nats, one for each hundred steps


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run reports."""

    steps: int
    tokens: int
    cpu_minutes: float
    wall_minutes: float
    losses: tuple[float, ...]
    held_out_nats: float | None


def language_modelling(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The default objective: next-token cross-entropy on the targets."""
    return cross_entropy(model(input_ids=ids, use_cache=False).logits, ids, targets)


def train(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    held_out: Rows | None = None,
    objective: Objective = language_modelling,
    title: str = "train",
    console: Console | None = None,
    stop_after: int | None = None,
) -> Outcome:
    """Train `model` in place and report.

    `checkpoint`: where the state is kept every `recipe.save_seconds`; resumed from when it exists, removed by the
    caller. `stop_after`: end this call (with a checkpoint) after so many steps in all, as a kill would; for tests and
    short sessions.

    Raises:
        ValueError: the checkpoint was made with another recipe.
    """
    # Fused: one kernel call for all parameters; at these sizes the other kind costs as much as a forward pass.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    state = _resume(model, optimizer, checkpoint, recipe)
    last = min(recipe.steps, recipe.steps if stop_after is None else stop_after)
    model.train()
    with _Reporter(title, recipe, rows.ids.shape[1], state, console) as reporter:
        clock = _Clock(state)
        saved = time.monotonic()
        while state.step < last:
            state.recent += _step(model, optimizer, rows, recipe, state.step, objective)
            state.step += 1
            state.tokens += recipe.batch * rows.ids.shape[1]
            if state.step % 100 == 0 or state.step == recipe.steps:
                state.losses.append(round(state.recent / ((state.step - 1) % 100 + 1), 4))
                state.recent = 0.0
            clock.update(state)
            reporter.update(state)
            if checkpoint is not None and time.monotonic() - saved > recipe.save_seconds:
                _save(model, optimizer, state, checkpoint, recipe)
                saved = time.monotonic()
    if checkpoint is not None:
        _save(model, optimizer, state, checkpoint, recipe)
    nats = None if held_out is None else evaluate_nats(model, held_out, recipe.batch)
    return Outcome(state.step, state.tokens, state.cpu_seconds / 60, state.wall_seconds / 60, tuple(state.losses), nats)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, recipe: Recipe, step: int, objective: Objective
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    device = next(model.parameters()).device
    picked = batch_indices(step, recipe.batch, len(rows), None if recipe.in_order else recipe.seed)
    ids = torch.from_numpy(rows.ids[picked].astype("int64")).to(device)  # [batch, length]
    targets = torch.from_numpy(rows.targets[picked]).to(device)  # [batch, length]
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
        loss = objective(model, ids, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


@torch.no_grad()
def evaluate_nats(model: nn.Module, rows: Rows, batch: int) -> float:
    """Mean cross-entropy over all targets of `rows`, in nats a token, in the model's own precision."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for first in range(0, len(rows), batch):
        ids = torch.from_numpy(rows.ids[first : first + batch].astype("int64")).to(device)
        targets = torch.from_numpy(rows.targets[first : first + batch]).to(device)
        counted = int(targets[:, 1:].sum())
        total += float(language_modelling(model, ids, targets)) * counted
        count += counted
    return total / max(1, count)


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, state: Progressed, path: Path, recipe: Recipe) -> None:
    """Write beside and rename, so that a kill in the middle leaves the older checkpoint."""
    partial = path.with_suffix(".partial")
    fields = {name: getattr(state, name) for name in Progressed.__slots__}
    stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": fields, "recipe": repr(recipe)}
    torch.save(stored, partial)
    partial.replace(path)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None, recipe: Recipe) -> Progressed:
    if path is None or not path.exists():
        return Progressed()
    stored: dict[str, Any] = torch.load(path, weights_only=True)
    if stored["recipe"] != repr(recipe):
        raise ValueError(f"{path} was made with another recipe; remove it to begin anew, or use that recipe again")
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    return Progressed(**stored["state"])


class _Clock:
    """Adds this process's time to what earlier, killed processes spent."""

    def __init__(self, state: Progressed) -> None:
        self._cpu = state.cpu_seconds - time.process_time()
        self._wall = state.wall_seconds - time.monotonic()

    def update(self, state: Progressed) -> None:
        state.cpu_seconds = self._cpu + time.process_time()
        state.wall_seconds = self._wall + time.monotonic()


class _Reporter:
    """A progress bar on a terminal; a line every half minute where there is none (a log file)."""

    def __init__(self, title: str, recipe: Recipe, length: int, state: Progressed, console: Console | None) -> None:
        self._title, self._recipe = title, recipe
        self._tokens_a_step = recipe.batch * length
        self._console = console or Console()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=recipe.steps, completed=state.step, note="")
        self._began, self._first = time.monotonic(), state.step
        self._spoke = self._began

    def __enter__(self) -> "_Reporter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, state: Progressed) -> None:
        """Show the step, the loss, tokens a second, and the time left."""
        now = time.monotonic()
        rate = (state.step - self._first) / max(1e-9, now - self._began)  # steps a second
        loss = f"loss {state.losses[-1]:.3f} " if state.losses else ""
        note = f"{loss}{rate * self._tokens_a_step:,.0f} tokens/s"
        self._bar.update(self._task, completed=state.step, note=note)
        if not self._console.is_terminal and now - self._spoke > 30:
            left = (self._recipe.steps - state.step) / max(rate, 1e-9) / 60
            self._console.print(
                f"{self._title}: step {state.step}/{self._recipe.steps} {note}, {left:.1f} minutes left"
            )
            self._spoke = now
