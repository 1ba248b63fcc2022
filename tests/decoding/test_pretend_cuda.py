"""Engines whose rows are on a device that is not the host's: nothing is mixed up, the texts are the same, few waits."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

import decoding.solvers
import triton_kernels.fusion_weights
from decoding import search
from decoding.core import EngineConfig, Program, Request, Sampling, SearchPlan
from decoding.decide import Decider
from decoding.download import Download
from decoding.events import Delta, Failed, PromptLogprobs
from decoding.judge import JudgeHead
from decoding.prepare import prepare
from decoding.propose import Proposer
from decoding.search.spec import SearchKind
from decoding.search.verbs import Candidate, Feed, Fork, Outcome, Probe, Run, Search, Steps, Top, Until
from tests.decoding.test_device_path import CONFIG, agree, other, said
from tests.decoding.test_search_engine import PLAIN, Nothing
from tests.decoding.test_speculation import ALL, NUDGE, OPEN, PROCESSED, Brackets, drafting, fakes, play
from tests.decoding.test_strategies import requests
from tests.fakes import table_engine
from tests.pretend_cuda import CUDA, OnCuda, PretendCuda, on_cuda, pretend
from tests.thin import thinned

FREE = [case for case in ALL if case is not NUDGE and case[0] != "dynamic_fusion"]  # no solver
SOLVED = [case for case in ALL if case not in FREE]
SEARCHED = Sampling(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
HOT = {"temperature": 0.7, "seed": 6, "top_k": 20, "top_p": 0.8}


@pytest.fixture(autouse=True)
def solved_by_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA's kernels would run, the solvers' specifications do: the interpreter reads no pretended memory."""
    monkeypatch.setattr(decoding.solvers, "_on_gpu", lambda row: isinstance(row, OnCuda))
    monkeypatch.setattr(triton_kernels.fusion_weights, "on_kernel", lambda row, kernel: False)


def counted(owner: Any, name: str, mode: PretendCuda, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the host waits for in each call of a method, filled in as it is called."""
    found: list[list[str]] = []
    method = getattr(owner, name)

    def calls(*given: Any) -> Any:
        before = len(mode.waits)
        result = method(*given)
        found.append(mode.waits[before:])
        return result

    monkeypatch.setattr(owner, name, calls)
    return found


def on_the_device(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """An engine that decides on pretended CUDA, where nothing is logged as failed."""
    monkeypatch.setattr(logging.getLogger("trimtab.engine"), "exception", pytest.fail)
    return pretend(table_engine(on_cuda(fakes()), dataclasses.replace(CONFIG, kernels="reference"), **more))


def waits(
    made: list[Request], monkeypatch: pytest.MonkeyPatch, of: tuple[Any, str] = (Decider, "decide"), **more: Any
) -> list[list[str]]:
    """What the host waits for in each tick's decision, or each call of another method. The texts are the host's."""
    with monkeypatch.context() as patch, PretendCuda() as mode:
        found = counted(*of, mode, patch)
        got, _ = play(on_the_device(patch, **more), made)
    agree(got, said("host", made, **more))
    return found


def once(each: list[str]) -> bool:
    return [wait.split()[0] for wait in each] == ["down"]


@pytest.mark.parametrize("changes", [{}, HOT], ids=["greedy", "hot"])
def test_a_tick_waits_once_whatever_is_mixed(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(FREE, max_tokens=4, **changes)
    for each in waits(made, monkeypatch):
        assert once(each), each


@pytest.mark.parametrize(
    ("draft", "accept"),
    thinned((draft, accept) for accept in ("rejection", "coupled") for draft in ("near", "expert", "ngram")),
)
def test_a_tick_waits_once_for_its_drafts(draft: str, accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(FREE[::4], temperature=1.0, seed=11, top_p=0.95, max_tokens=5)
    made = drafting(made, draft, 3, accept) + other(requests(FREE[1::4], max_tokens=4))
    for each in waits(made, monkeypatch):
        assert once(each), each


@pytest.mark.parametrize("accept", ["kl", "mixture", "typical", "judge"])
def test_lossy_rules_mix_no_devices_up(accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drafting(requests(OPEN[::4], temperature=1.0, seed=3, max_tokens=4), "near", 3, accept)
    waits(made, monkeypatch, judges={"base": JudgeHead(torch.tensor([4.0]), 0.0)})


@pytest.mark.parametrize("changes", thinned(([changes] for changes in PROCESSED), start=1))
def test_processors_mix_no_devices_up(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(OPEN[::4], **({"max_tokens": 4, "temperature": 1.0, "seed": 2} | changes))
    made += drafting(other(requests(OPEN[1::8], **({"max_tokens": 4} | changes))), "near", 3, "coupled")
    waits(made, monkeypatch)


@pytest.mark.parametrize("changes", [{}, HOT], ids=["greedy", "hot"])
def test_a_tick_waits_once_for_solvers_too(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits(requests(SOLVED + FREE[::6], max_tokens=4, **changes), monkeypatch)
    assert all(once(each) for each in found), found


def test_a_solver_with_a_state_waits_once_more_for_each_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drafting(requests([NUDGE] * 3, max_tokens=6), "near", 2, "rejection")
    found = waits(made, monkeypatch)
    assert max(map(len, found)) == 3
    assert all(wait.startswith("down") for each in found for wait in each), found


def test_a_tick_waits_once_for_prompts_log_probs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(FREE[::3], max_tokens=3, prompt_logprobs=2) + other(requests(FREE[1::3], prompt_logprobs=0))
    made = [dataclasses.replace(r, prompts=(r.prompts[0],) * len(r.prompts)) for r in made]
    found = besides(made, monkeypatch)
    assert all(once(each) for each in found), found


@pytest.mark.parametrize("draft", [None, "near"])
def test_a_tick_waits_once_more_for_all_traces(draft: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(ALL, max_tokens=4)
    made = made if draft is None else drafting(requests(FREE, max_tokens=4), draft, 2, "rejection")
    found = besides(
        [dataclasses.replace(r, program=dataclasses.replace(r.program, trace=True)) for r in made], monkeypatch
    )
    assert all(len(each) == 2 and once(each[:1]) and once(each[1:]) for each in found), found


def besides(made: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`waits` of the ticks' decisions; what is told besides texts, traces and prompts' log-probs, is the host's."""

    def told(engine: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for each in made:
            engine.submit(each)
        while engine.has_work():
            for event in engine.step():
                assert not isinstance(event, Failed), event
                if isinstance(event, Delta):
                    found.setdefault(event.request_id, []).extend(dataclasses.astuple(each) for each in event.trace)
                if isinstance(event, PromptLogprobs):
                    found.setdefault(event.request_id, []).extend(event.logprobs[1:])
        return found

    wanted = told(table_engine(fakes(), CONFIG))
    assert all(wanted.values())
    with monkeypatch.context() as patch, PretendCuda() as mode:
        ticks = counted(Decider, "decide", mode, patch)
        got = told(on_the_device(patch))
    assert close(got, wanted)
    return [each for each in ticks if each]


@pytest.mark.parametrize(
    ("draft", "accept", "tokens", "changes"),
    [
        ("near", "rejection", 3, HOT),
        ("expert", "rejection", 3, {"constraint": Brackets}),
        ("near", "coupled", "auto", HOT),
        ("expert", "coupled", "auto", {"constraint": Brackets}),
        ("near", "kl", 2, {}),
        ("expert", "kl", 2, HOT),
    ],
)
def test_a_draft_step_waits_once(
    draft: str, accept: str, tokens: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {key: value for key, value in changes.items() if key != "constraint"}
    made = drafting(requests(OPEN[::6], **({"max_tokens": 5} | sampling)), draft, tokens, accept)
    made += drafting(other(requests(OPEN[1::12], max_tokens=5, repetition_penalty=1.2)), draft, tokens, accept)
    made = [dataclasses.replace(r, constraint=changes.get("constraint")) for r in made]
    found = waits(made, monkeypatch, (Proposer, "_draft"))
    assert found
    assert all(once(each) for each in found), found


def test_a_tick_waits_once_for_what_searches_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likeliest tokens, probed ones, fed ones, and drawn ones; with a mask too."""
    allowed = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True, allowed_token_ids=(65, 66, 67))

    def searched(engine: Any) -> list[Any]:
        told: list[Any] = []

        def run(it: Search) -> Steps:
            branches = yield Fork(it.root, 3)
            told.append((yield [Feed(branch, "xyz"[: i + 1], logprobs=True) for i, branch in enumerate(branches)]))
            told.append((yield [Top(branch, 1 + i) for i, branch in enumerate(branches)]))
            told.append((yield [Probe(branch, "? ", ["yes", "no", 7]) for branch in branches[1:]]))
            told.append((yield [Run(branch, Until(tokens=2), top=4) for branch in branches]))
            return Outcome([Candidate(branch) for branch in branches])

        search.HIDDEN["asks"] = SearchKind("asks", "", Nothing, lambda it, _: run(it))
        program = Program("plain", PLAIN.policy, search=SearchPlan("asks", Nothing()))
        made = [prepare(program, f"prompt {i}", s, engine.catalog()) for i, s in enumerate((SEARCHED, allowed))]
        play(engine, [dataclasses.replace(each, id=f"{i}") for i, each in enumerate(made)])
        return told

    monkeypatch.setattr(search, "HIDDEN", dict(search.HIDDEN))
    wanted = searched(table_engine(fakes(), EngineConfig(block_size=4)))
    with monkeypatch.context() as patch, PretendCuda() as mode:
        found = counted(Decider, "decide", mode, patch)
        got = searched(on_the_device(patch))
    assert all(once(each) for each in found if each), found
    assert len(found) > 4
    assert close(got, wanted)


def close(got: Any, wanted: Any) -> bool:
    """Whether nested values are the same, numbers up to rounding."""
    if dataclasses.is_dataclass(got) and not isinstance(got, type):
        return close(dataclasses.astuple(got), dataclasses.astuple(wanted))
    if isinstance(got, dict):
        return got.keys() == wanted.keys() and all(close(got[key], wanted[key]) for key in got)
    if isinstance(got, list | tuple):
        return len(got) == len(wanted) and all(map(close, got, wanted))
    return bool(got == pytest.approx(wanted, abs=1e-4)) if isinstance(got, float) else bool(got == wanted)


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


def test_a_download_is_one_copy_of_whatever_is_wanted() -> None:
    made = [torch.tensor([True, False, True]), torch.tensor([1 << 40, 3]), torch.randn(2, 3), torch.tensor(7)]
    made += [torch.zeros(0, 4), torch.tensor([0.1, 0.2], dtype=torch.float64)]
    for lift in (OnCuda, lambda x: x):
        with PretendCuda() as mode:
            down = Download()
            found = [down.want(lift(x)) for x in made]
            down.fetch()
            assert len(mode.waits) == (lift is OnCuda)
        for x, got in zip(made, found, strict=True):
            assert got().dtype == x.dtype
            assert torch.equal(got(), x)
