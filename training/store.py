"""Work that is kept as it is done, in JSON lines, so that a killed run goes on where it was; and how long it will take.

The first line says what the rest was made from. A line that a kill cut off is dropped.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Entry = dict[str, Any]
Item = TypeVar("Item")


class Store:
    """Entries of one file, in order. `made_from` is whatever the entries depend on, as plain JSON data."""

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        """Opens or begins `path`. Raises ValueError if it holds entries that were made from something else."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"made_from": made_from}, sort_keys=True)
        whole = path.read_bytes().rpartition(b"\n")[0].decode() if path.exists() else ""  # without a cut line
        lines = whole.splitlines()
        if len(lines) > 1 and lines[0] != head:
            raise ValueError(f"{path} was made with other settings; remove it to begin anew, or use those again")
        self.entries: list[Entry] = [json.loads(line) for line in lines[1:]]
        path.write_text("".join(line + "\n" for line in [head, *lines[1:]]))

    def add(self, entries: Sequence[Entry]) -> None:
        """Append `entries`, on disk first."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self.entries += entries


def paced(parts: Sequence[Sequence[Item]], title: str, unit: str, console: Console) -> Iterator[Sequence[Item]]:
    """The parts one after another, with rate and time left: a bar on a terminal, else a line every half minute."""
    total = sum(len(part) for part in parts)
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=total, note="")
    began = spoke = time.monotonic()
    done = 0
    with bar:
        for part in parts:
            yield part
            done += len(part)
            now = time.monotonic()
            rate = done / max(now - began, 1e-9)  # a second
            note = f"{rate:,.1f} {unit}/s"
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and (now - spoke > 30 or done == total):
                left = (total - done) / max(rate, 1e-9) / 60
                console.print(f"{title}: {done}/{total} {note}, {left:.1f} minutes left")
                spoke = now


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive pieces of at most `size`."""
    return [items[first : first + size] for first in range(0, len(items), size)]
