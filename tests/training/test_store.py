"""Kept work: what a kill cut off is dropped, what was made from something else is refused."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from training.store import Store, chunks, paced


def test_entries_survive(tmp_path: Path) -> None:
    store = Store(tmp_path / "work" / "kept.jsonl", {"seed": 1})
    store.add([{"ids": [1, 2]}, {"ids": []}])
    store.add([{"ids": [3]}])
    assert Store(store.path, {"seed": 1}).entries == store.entries == [{"ids": [1, 2]}, {"ids": []}, {"ids": [3]}]


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_a_cut_line_is_dropped_and_written_anew(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "kept.jsonl"
    Store(path, {"seed": 1}).add([{"n": 1}, {"n": 2}])
    path.write_bytes(path.read_bytes()[:-lost])
    again = Store(path, {"seed": 1})
    assert again.entries == [{"n": 1}]
    again.add([{"n": 3}])
    assert Store(path, {"seed": 1}).entries == [{"n": 1}, {"n": 3}]


def test_a_cut_head_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    Store(path, {"seed": 1})
    path.write_bytes(path.read_bytes()[:4])
    assert Store(path, {"seed": 2}).entries == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Store(tmp_path / "kept.jsonl", {"seed": 1}).add([{"n": 1}])
    with pytest.raises(ValueError, match="other settings"):
        Store(tmp_path / "kept.jsonl", {"seed": 2})


def test_paced_tells_rate_and_time_left() -> None:
    shown = io.StringIO()
    parts = list(paced(chunks(list(range(7)), 3), "walk", "steps", Console(file=shown)))
    assert parts == [[0, 1, 2], [3, 4, 5], [6]]
    assert "walk: 7/7" in shown.getvalue()
    assert "steps/s, 0.0 minutes left" in shown.getvalue()
