"""Processors on the device path: rows that nobody else reads get them in the mix, the others behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from decoding import device_mix, device_verify
from decoding.core import Request
from decoding.judge import JudgeHead
from tests.decoding.test_device_path import Kernels, agree, other, said
from tests.decoding.test_speculation import OPEN, Brackets, drafting
from tests.decoding.test_strategies import requests

EDITED: dict[str, Any] = {"repetition_penalty": 1.5, "frequency_penalty": 0.6, "logit_bias": ((65, 2.0), (67, -3.0))}
MASKED: dict[str, Any] = {"allowed_token_ids": tuple(range(60, 200)), "min_tokens": 3, "ignore_eos": False}
HOT: dict[str, Any] = {"temperature": 1.0, "seed": 2, "max_tokens": 6}
FLOORED = [case for case in OPEN if "plausibility" in case[1]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows each launch of a mix writes: those that mix, and those that only process."""
    made: dict[str, list[int]] = {"mixed": [], "processed": []}

    def counted(kind: str, mix: Callable[..., Any]) -> Callable[..., Any]:
        def run(tracks: Any, index: torch.Tensor, *args: Any, **more: Any) -> Any:
            made[kind].append(index.shape[1])
            return mix(tracks, index, *args, **more)

        return run

    monkeypatch.setattr(device_mix, "mix", counted("mixed", device_mix.mix))
    process = device_verify.process_on_device  # drafters' rows are processed elsewhere

    def apart(z: torch.Tensor, rows: Sequence[int], *args: Any) -> None:
        made["processed"].append(len(rows))
        process(z, rows, *args)

    monkeypatch.setattr(device_verify, "process_on_device", apart)
    return made


def processed(**changes: Any) -> list[Request]:
    """Strategies of every kind, some edited, some masked, some drafting, some of grammars."""
    edited, masked = HOT | EDITED | changes, HOT | MASKED | changes
    made = requests(OPEN[::3], **edited) + other(requests(OPEN[::3], **masked))
    drafted = requests(OPEN[1::4], **edited | masked)
    made += [dataclasses.replace(r, id=f"{r.id}-drafts") for r in drafting(drafted, "near", 3, "coupled")]
    bound = [dataclasses.replace(r, constraint=Brackets) for r in requests(OPEN[1::4], **HOT | changes)]
    return made + other(bound)


def test_rows_with_processors_are_written_once(calls: dict[str, list[int]]) -> None:
    made = processed(logprobs=None)
    agree(said("reference", made), said("host", made))
    assert sum(calls["mixed"]) > 100
    assert calls["processed"] == []


def test_log_probs_are_of_the_rows_before_the_processors(calls: dict[str, list[int]]) -> None:
    made = processed(logprobs=3)
    agree(said("reference", made), said("host", made))
    assert sum(calls["processed"]) > 100


def test_traced_rows_are_read_before_the_processors(calls: dict[str, list[int]]) -> None:
    (one,) = requests(OPEN[:1], logprobs=None, **HOT | EDITED)
    traced = dataclasses.replace(one, program=dataclasses.replace(one.program, trace=True))
    agree(said("reference", [traced]), said("host", [traced]))
    assert calls["processed"] == [1] * HOT["max_tokens"]


@pytest.mark.parametrize("accept", ["kl", "judge"])
def test_rules_that_compare_see_the_rows_before_the_processors(accept: str, calls: dict[str, list[int]]) -> None:
    biased = HOT | {"logit_bias": tuple((i, 30.0) for i in range(60, 80)), "logprobs": None, "max_tokens": 12}
    made = drafting(requests(OPEN[::3], **biased), "near", 3, accept)
    judges = {"base": JudgeHead(torch.tensor([4.0]), 0.0)}
    agree(said("reference", made, judges=judges), said("host", made, judges=judges))
    assert calls["processed"]


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_a_floor_looks_among_the_allowed_of_rows_that_are_processed_later(
    kernels: Kernels, calls: dict[str, list[int]]
) -> None:
    """Of one launch: masks with and without log-probs, edits without masks, and none of these."""
    short = HOT | {"max_tokens": 3, "logprobs": None}
    made: list[Request] = []
    for i, changes in enumerate((MASKED, MASKED | EDITED | {"logprobs": 2}, EDITED, {})):
        own = requests(FLOORED[1:2], **short | changes)
        made += [dataclasses.replace(r, id=f"{i}") for r in own]
    agree(said(kernels, made), said("host", made))
    # The first goes ahead, for the others share its prompt; behind it both rows with masks are processed apart.
    assert calls == {"mixed": [1, 4, 4, 3], "processed": [2, 2, 1]}


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_a_floor_and_masks_are_one_launch_where_nobody_asks_for_more(
    kernels: Kernels, calls: dict[str, list[int]]
) -> None:
    short = HOT | {"max_tokens": 3, "logprobs": None}
    made = requests(FLOORED[1:2], **short | MASKED) + other(requests(FLOORED[1:2], **short | EDITED))
    agree(said(kernels, made), said("host", made))
    assert calls["processed"] == []
