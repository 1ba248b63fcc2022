"""`python -m decoding.strategies` prints the README's table of strategies."""

from __future__ import annotations

from decoding.strategies import table

print(table())
