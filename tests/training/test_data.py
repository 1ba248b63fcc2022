"""Packing: nothing lost but the cut tails, rows begin with documents, every epoch reads every row once."""

from pathlib import Path

import numpy as np
import pytest

from training.data import Document, Rows, batch_indices, pack

END = 0


def test_rows_are_documents_and_ends() -> None:
    documents = [Document((5, 6)), Document((7, 8, 9), (False, True, True)), Document((1,))]
    packed = pack(documents, rows=2, length=6, end=END)
    assert packed.ids.tolist() == [[5, 6, END, 7, 8, 9], [1, END, END, END, END, END]]
    assert packed.targets.tolist() == [
        [True, True, True, False, True, True],
        [True, True, False, False, False, False],  # padding is no target
    ]


def test_a_cut_document_is_dropped_and_the_next_begins_a_row() -> None:
    packed = pack([Document((1, 2, 3, 4, 5, 6, 7)), Document((8, 9))], rows=2, length=4, end=END)
    assert packed.ids.tolist() == [[1, 2, 3, 4], [8, 9, END, END]]


def test_it_stops_when_the_documents_do() -> None:
    assert len(pack([Document((1, 2, 3))], rows=9, length=4, end=END)) == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no documents"):
        pack([], rows=1, length=4, end=END)


def test_large_vocabularies_fit() -> None:
    assert pack([Document((200_000,))], rows=1, length=2, end=END).ids.tolist() == [[200_000, END]]


def test_save_and_load(tmp_path: Path) -> None:
    packed = pack((Document((i, i + 1), (i % 2 == 0, True)) for i in range(1, 100)), rows=7, length=13, end=END)
    packed.save(tmp_path / "rows.npz")
    again = Rows.load(tmp_path / "rows.npz")
    assert np.array_equal(again.ids, packed.ids)
    assert np.array_equal(again.targets, packed.targets)


@pytest.mark.parametrize(("rows", "batch"), [(10, 1), (10, 3), (7, 7), (4, 9), (1, 5)])
def test_every_epoch_reads_every_row_once(rows: int, batch: int) -> None:
    steps = -(-3 * rows // batch)
    read = np.concatenate([batch_indices(step, batch, rows, seed=1) for step in range(steps)])
    for epoch in range(3):
        assert sorted(read[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
