"""From token lists to fixed-length rows.

Knows nothing about tokenization or models. A document is its token ids and, for each of them, whether it is a target of
the loss.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and which of them the loss counts (`None`: all)."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        assert self.targets is None or len(self.targets) == len(self.ids)


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed training rows."""

    ids: npt.NDArray[np.uint32]  # [rows, length]
    targets: npt.NDArray[np.bool_]  # [rows, length], true where the loss counts the token

    def __post_init__(self) -> None:
        assert self.ids.shape == self.targets.shape
        assert self.ids.ndim == 2

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def save(self, path: Path) -> None:
        """Write as one .npz file; it appears whole or not at all."""
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, ids=self.ids, targets=np.packbits(self.targets, axis=1), length=self.ids.shape[1])
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Rows":
        """Read what `save` wrote."""
        with np.load(path) as stored:
            targets = np.unpackbits(stored["targets"], axis=1, count=int(stored["length"])).astype(np.bool_)
            return cls(stored["ids"], targets)


def pack(documents: Iterable[Document], rows: int, length: int, end: int) -> Rows:
    """Fill `rows` rows of `length` tokens with documents, each followed by the `end` token (always a target).

    Every row begins with the beginning of a document, because that is what a prompt looks like; the document that
    crosses the end of a row is cut there and its rest dropped. Too few documents leave end tokens that are no targets.

    Raises:
        ValueError: there is no document at all.
    """
    ids = np.full((rows, length), end, dtype=np.uint32)
    targets = np.zeros((rows, length), dtype=np.bool_)
    stream = iter(documents)
    for row in range(rows):
        used = _fill(stream, ids[row], targets[row], end)
        if used == 0:
            if row == 0:
                raise ValueError("there are no documents to pack; check the input file")
            return Rows(ids[:row].copy(), targets[:row].copy())
    return Rows(ids, targets)


def join(parts: Sequence[Rows]) -> Rows:
    """Rows one after another; all of one length."""
    return Rows(np.concatenate([part.ids for part in parts]), np.concatenate([part.targets for part in parts]))


def _fill(stream: Iterator[Document], ids: npt.NDArray[np.uint32], targets: npt.NDArray[np.bool_], end: int) -> int:
    """Fill one row in place; how many of its tokens were used."""
    used, length = 0, len(ids)
    while used < length:
        document = next(stream, None)
        if document is None:
            break
        counted = document.targets if document.targets is not None else (True,) * len(document.ids)
        take = min(len(document.ids) + 1, length - used)
        ids[used : used + take] = (*document.ids, end)[:take]
        targets[used : used + take] = (*counted, True)[:take]
        used += take
    return used


def row_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of rows in an epoch: a function of (seed, epoch) alone, so that resuming needs no stored generator."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def batch_indices(step: int, batch: int, rows: int, seed: int | None) -> npt.NDArray[np.int64]:
    """Which rows step number `step` (from 0) trains on; epochs follow one another without a gap.

    Each epoch is shuffled by `seed`, or, with None, read in the order of the rows.
    """
    first = step * batch
    if seed is None:
        return np.arange(first, first + batch) % rows
    epochs = range(first // rows, (first + batch - 1) // rows + 1)
    joined = np.concatenate([row_order(rows, seed, epoch) for epoch in epochs])
    offset = first - epochs[0] * rows
    return joined[offset : offset + batch]
