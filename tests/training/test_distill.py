"""`distill`: what it writes, that it learns, that a kill costs nothing, what it refuses."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decoding.judge import weights_hash
from tests.fakes import byte_tokenizer
from tests.training.small import invoke, lines, refused, texts
from training import distillation
from training.chats import Ids
from training.data import Rows
from training.distillation import Job, Material, distil, mixed
from training.loop import Outcome, Recipe, train


@pytest.fixture(scope="module")
def material() -> Material:
    encode = byte_tokenizer()
    read: list[Ids] = [tuple(encode(text)["input_ids"]) for text in texts(1, 60)]
    return Material([ids[:5] for ids in read[:20]], read[:50], [ids[:4] for ids in read[50:54]], read[54:])


def job(target: Path, output: Path, **changes: Any) -> Job:
    recipe = Recipe(steps=24, batch=4, learning_rate=1e-2, warmup=3, save_seconds=0.0)
    settings: dict[str, Any] = {
        "loss": "kl", "recipe": recipe, "reading": recipe, "temperatures": (0.0, 1.0), "max_tokens": 12, "length": 32,
        "start": "1x16",
    }  # fmt: skip
    return Job(target=target, output=output, **settings | changes)


QUIET = Console(file=io.StringIO())


def test_distill_from_the_command_line(target: Path, tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"prompt": text[:6]} for text in texts(1, 30)]
    data = lines(tmp_path / "data.jsonl", entries + [{"text": text} for text in texts(2, 40)])
    short = ("--steps", 20, "--reading-steps", 20, "--batch", 4, "--length", 32, "--max-tokens", 10)
    output = tmp_path / "drafter"
    shown = invoke(
        "distill", "--target", target, "--model", "1x16", "--data", data, "--output", output, "--temperature", 0,
        "--temperature", 0.9, *short,
    )  # fmt: skip
    assert "tau 4" in shown
    card = json.loads((output / "trimtab.json").read_text())
    assert card["role"] == "drafter"
    assert card["target_hash"] == weights_hash(target)
    assert card["sha256"] == weights_hash(output)
    assert card["made_from"] == "1x16"
    assert card["recipe"]["loss"] == "kl"
    drafter, large = (AutoModelForCausalLM.from_pretrained(path) for path in (output, target))
    assert drafter.dtype == torch.bfloat16
    assert card["metrics"]["params"] == drafter.num_parameters()
    assert card["metrics"]["size_ratio"] == pytest.approx(drafter.num_parameters() / large.num_parameters(), abs=1e-4)
    assert list(card["metrics"]["by_temperature"]) == ["0", "0.9"]
    for found in card["metrics"]["by_temperature"].values():
        assert 0 <= found["acceptance"] <= 1
        assert all(1 <= each["tau"] <= int(gamma) + 1 for gamma, each in found["draft_length"].items())
    # Then on from it: no reading, another loss, and texts alone, whose beginnings are the prompts.
    data = lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts(2, 40)])
    again = tmp_path / "again"
    arguments = ("--loss", "tvd++", "--sigma", "position", *short)
    invoke("distill", "--target", target, "--model", output, "--data", data, "--output", again, *arguments)
    card = json.loads((again / "trimtab.json").read_text())
    assert card["made_from"] == weights_hash(output)
    assert card["recipe"]["per_position"] is True
    norms = [load_file(path / "model.safetensors")["model.norm.weight"] for path in (output, again)]
    assert not torch.equal(*norms)


@pytest.mark.parametrize(
    ("loss", "least"),
    [
        ({"loss": "kl"}, 0.8),
        pytest.param({"loss": "lk"}, 0.8, marks=pytest.mark.slow),
        pytest.param({"loss": "lk", "lk_decay": 2.0}, 0.8, marks=pytest.mark.slow),
        ({"loss": "tvd"}, 0.5),  # its gradient vanishes where the drafter gives next to nothing
    ],
)
def test_it_learns_to_be_accepted(
    target: Path, material: Material, tmp_path: Path, loss: dict[str, Any], least: float
) -> None:
    none = job(target, tmp_path / "none", reading=None, recipe=Recipe(1, 1, 1e-9))
    before = distil(none, material, QUIET)["metrics"]["by_temperature"]["1"]["acceptance"]
    some = job(target, tmp_path / "some", recipe=Recipe(150, 8, 1e-2, warmup=5), start="1x32", **loss)
    after = distil(some, material, QUIET)["metrics"]["by_temperature"]["1"]["acceptance"]
    assert before < 0.2  # six of 257 tokens are ever written
    assert after > least


def test_a_target_drafts_for_itself(target: Path, material: Material, tmp_path: Path) -> None:
    """Started from the target there is nothing to learn: everything is accepted, up to bf16."""
    same = Job(target, str(target), tmp_path / "same", "kl", Recipe(2, 2, 1e-6), max_tokens=8, length=32)
    found = distil(same, material, QUIET)["metrics"]["by_temperature"]
    assert found["1"]["acceptance"] > 0.97
    assert found["1"]["draft_length"]["4"]["tau"] > 2.5


class Killed(Exception):
    """As if the process had ended here."""


@pytest.mark.parametrize("where", ["the target writes", "reading", "distil"])
def test_a_killed_run_ends_as_one_that_was_not(
    target: Path, material: Material, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil(job(target, tmp_path / "whole"), material, QUIET)
    write, calls = distillation.write, []

    def cut(*arguments: Any, **named: Any) -> Outcome:
        if named["title"] != where:
            return train(*arguments, **named)
        train(*arguments, **named, stop_after=7)
        raise Killed

    def twice(*arguments: Any) -> list[Ids]:
        if len(calls) == 2:
            raise Killed
        calls.append(arguments)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "train", cut)
        if where == "the target writes":
            patch.setattr(distillation, "_AT_ONCE", 8)
            patch.setattr(distillation, "write", twice)
        with pytest.raises(Killed):
            distil(job(target, tmp_path / "killed"), material, QUIET)
    distil(job(target, tmp_path / "killed"), material, QUIET)
    for name in ("model.safetensors", "work/responses.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed" / "work").iterdir()) == ["responses.jsonl"]


def test_one_part_text_to_nine_parts_responses() -> None:
    def rows(count: int, value: int) -> Rows:
        ids = np.full((count, 4), value, dtype=np.uint16)
        return Rows(ids, ids > 0)

    joined = mixed(rows(18, 1), rows(5, 2), 0.1)
    assert joined.ids[:, 0].tolist() == [1] * 18 + [2] * 2
    assert joined.targets.all()
    assert len(mixed(rows(18, 1), rows(5, 2), 0.4)) == 30  # texts are repeated
    assert len(mixed(rows(18, 1), None, 0.4)) == 18
    assert len(mixed(None, rows(5, 2), 0.4)) == 5
    with pytest.raises(ValueError, match="neither"):
        mixed(None, None, 0.1)


def test_what_distill_refuses(target: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", [{"text": text} for text in texts(2, 9)])
    common = ("distill", "--target", target, "--output", tmp_path / "out")
    given = (*common, "--data", data)
    assert "neither a directory nor a shape" in refused(*given, "--model", "tiny")
    assert "no loss called 'mse'" in refused(*given, "--model", "1x16", "--loss", "mse")
    assert "batch or position" in refused(*given, "--model", "1x16", "--sigma", "row")
    other = tmp_path / "other"
    byte_tokenizer(extra=3).save_pretrained(other)
    assert "another tokenizer" in refused(*given, "--model", other)
    bad = lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"words": "b"}])
    assert "line 2" in refused(*common, "--model", "1x16", "--data", bad)
    chats = lines(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    assert "chat template" in refused(*common, "--model", "1x16", "--data", chats)
    assert "is no file" in refused(*common, "--model", "1x16", "--data", tmp_path / "none")
