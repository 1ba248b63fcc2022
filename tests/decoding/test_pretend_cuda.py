"""Engines whose rows are on a device that is not the host's: nothing is mixed up, the texts are the same, few waits."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

import decoding.solvers
from decoding.core import Request
from decoding.decide import Decider
from decoding.judge import JudgeHead
from tests.decoding.test_device_path import CONFIG, agree, other, said
from tests.decoding.test_speculation import ALL, NUDGE, OPEN, PROCESSED, Brackets, drafting, fakes, play
from tests.decoding.test_strategies import requests
from tests.fakes import table_engine
from tests.pretend_cuda import CUDA, OnCuda, PretendCuda, on_cuda, pretend

FREE = [case for case in ALL if case is not NUDGE and case[0] != "dynamic_fusion"]  # no solver
HOT = {"temperature": 0.7, "seed": 6, "top_k": 20, "top_p": 0.8}


@pytest.fixture(autouse=True)
def solved_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.solvers, "_on_gpu", lambda _: False)


def waits(made: list[Request], monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[list[str]]:
    """What the host waits for in each tick's decision. The texts are the host's, and nothing was logged as failed."""
    found: list[list[str]] = []
    decide = Decider.decide

    def counted(self: Decider, *given: Any) -> Any:
        before = len(mode.waits)
        decision = decide(self, *given)
        found.append(mode.waits[before:])
        return decision

    with monkeypatch.context() as patch, PretendCuda() as mode:
        patch.setattr(Decider, "decide", counted)
        patch.setattr(logging.getLogger("trimtab.engine"), "exception", pytest.fail)
        engine = pretend(table_engine(on_cuda(fakes()), dataclasses.replace(CONFIG, kernels="reference"), **more))
        got, _ = play(engine, made)
    agree(got, said("host", made, **more))
    return found


@pytest.mark.parametrize("changes", [{}, HOT], ids=["greedy", "hot"])
def test_a_tick_waits_once_whatever_is_mixed(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(FREE, max_tokens=4, **changes)
    for each in waits(made, monkeypatch):
        assert [wait.split()[0] for wait in each] == ["down"], each


@pytest.mark.parametrize("accept", ["rejection", "coupled"])
@pytest.mark.parametrize("draft", ["near", "expert", "ngram"])
def test_a_tick_waits_once_for_its_drafts(draft: str, accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(FREE[::4], temperature=1.0, seed=11, top_p=0.95, max_tokens=5)
    made = drafting(made, draft, 3, accept) + other(requests(FREE[1::4], max_tokens=4))
    for each in waits(made, monkeypatch):
        assert [wait.split()[0] for wait in each] == ["down"], each


@pytest.mark.parametrize("accept", ["kl", "mixture", "typical", "judge"])
def test_lossy_rules_mix_no_devices_up(accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drafting(requests(OPEN[::4], temperature=1.0, seed=3, max_tokens=4), "near", 3, accept)
    waits(made, monkeypatch, judges={"base": JudgeHead(torch.tensor([4.0]), 0.0)})


@pytest.mark.parametrize("changes", PROCESSED, ids=lambda c: "-".join(c))
def test_processors_mix_no_devices_up(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(OPEN[::4], **({"max_tokens": 4, "temperature": 1.0, "seed": 2} | changes))
    made += drafting(other(requests(OPEN[1::8], **({"max_tokens": 4} | changes))), "near", 3, "coupled")
    waits(made, monkeypatch)


def test_solvers_grammars_and_traces_mix_no_devices_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(ALL[::2], temperature=1.0, seed=4, max_tokens=3)
    made += other([dataclasses.replace(r, constraint=Brackets) for r in requests(OPEN[::4], max_tokens=4)])
    traced = [dataclasses.replace(r, program=dataclasses.replace(r.program, trace=True)) for r in requests(ALL[1::2])]
    made += [dataclasses.replace(r, id=f"{r.id}-traced") for r in traced]
    waits(made, monkeypatch)


def test_the_pretence_fails_where_cuda_does_and_sees_what_waits() -> None:
    with PretendCuda() as mode:
        x = OnCuda(torch.arange(4.0))
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="same device"):
            x.gather(0, torch.tensor([0]))
        with pytest.raises(RuntimeError, match="host is indexed"):
            torch.ones(4)[x.long()]
        assert mode.waits == []
        assert (x + torch.tensor(1.0)).host.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert torch.tensor([1, 2]).pin_memory().to(CUDA, non_blocking=True).host.tolist() == [1, 2]
        assert mode.waits == []
        assert x[[1, 2]].tolist() == [1.0, 2.0]
        assert bool(x.sum() > 0)
        x[x > 1] = 0.0
        assert len(mode.waits) == 4  # up, down, a number, a mask
