"""The model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from decoding.core import Program
from decoding.strategies.spec import Strategy


@dataclass(frozen=True, slots=True)
class Plain:
    """No parameters."""


def build(params: Plain, model: str) -> Program:
    """z = z_model."""
    return Program.plain(model)


STRATEGY = Strategy("plain", "The model's own next-token distribution.", Plain, build)
