"""Commands on models of seconds: how tests call them, and what they read."""

import json
import random
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from training.__main__ import app


def texts(seed: int, count: int, *, letters: str = "aaab", step: int = 1) -> list[str]:
    """Digits that count up from anywhere by `step`, modulo 4, and letters by chance between them: "2a3b0a1a".

    A model of it is sure of the digits, which decide the last number, and has a favourite letter, which decides
    nothing.
    """
    rng = random.Random(seed)
    starts = [rng.randrange(4) for _ in range(count)]
    return ["".join(f"{(start + step * i) % 4}{rng.choice(letters)}" for i in range(12)) for start in starts]


def invoke(*arguments: object) -> str:
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exit_code == 0, shown.output
    return shown.output


def refused(*arguments: object) -> str:
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exit_code == 2
    return " ".join(shown.output.replace("│", " ").split())


def lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path
