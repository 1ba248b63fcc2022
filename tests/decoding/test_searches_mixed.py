"""Searches of every kind beside plain streams in one batch: all end, are what they are alone, give memory back."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from decoding.admit import Hosted
from decoding.core import EngineConfig, ModelSpec, Program, Request, Sampling
from decoding.engine import Engine
from decoding.events import Delta, Done, Event, Failed
from decoding.plan import Plan
from decoding.prepare import prepare
from decoding.scorers.spec import ScorerParams
from decoding.search import SEARCHES, searching
from decoding.search.cascade import Reference
from decoding.state import Stream
from decoding.text import TextModel
from tests.decoding.test_search_engine import PLAIN
from tests.fakes import TableModel, byte_tokenizer, random_table
from tests.server.tables import letters

PRM: dict[str, Any] = {"scorer": "prm"}
GROWN: dict[str, Any] = {**PRM, "step_tokens": 4}
SHORT = ScorerParams(max_words=3)
KINDS: dict[str, dict[str, Any]] = {
    "best_of_n": {"n": 3, **PRM},
    "sharpen": {"n": 3},
    "beam": {"n": 4, "width": 2, "max_steps": 3, **GROWN},
    "dvts": {"n": 4, "width": 2, "max_steps": 3, **GROWN},
    "lookahead": {"n": 4, "width": 2, "max_steps": 3, **GROWN},
    "mcts": {"iterations": 3, "branch": 2, **GROWN},
    "beam_search": {"width": 2},
    "deal": {"k": 3, "lookahead": 3, "constraint": SHORT},
    "reward_search": {"k": 3, **PRM},
    "adaptive": {"max_samples": 4, "wave": 2, "prune_at": 4, "threshold": 1.0},
    "revise": {"chains": 2, "length": 2, **PRM},
    "agents": {},
    "tree_prompt": {},
    "step_speculative": {"draft": "small", **GROWN},
    "selective": {**PRM, "threshold": 0.9},
    "cascade": {"small": "small", "references": (Reference("1+1?", "2", True), Reference("2+2?", "5", False))},
    "nudging_search": {"nudger": "small"},
    "auto": {"n": 4, **PRM},
}


def make_engine(blocks: int, **settings: Any) -> Engine:
    tables = {"base": letters(1), "small": letters(2), "prm": random_table(3, width=257)}
    hosted = {}
    for id, table in tables.items():
        kind: Any = "prm" if id == "prm" else "causal"
        spec = ModelSpec(id, f"/{id}", kind=kind, step_marker="+", score_tokens=("y", "n"))
        model = TableModel(id, table, 5, max_model_len=2048)
        hosted[id] = Hosted(model, TextModel(id, byte_tokenizer()), blocks * 4, None, kind, spec)
    return Engine(hosted, EngineConfig(block_size=4, **settings))


def requests_of(engine: Engine) -> list[Request]:
    """Two searches of each kind, and 32 plain streams."""

    def one(program: Program, i: int) -> Request:
        sampling = Sampling(max_tokens=16, seed=i)
        return replace(prepare(program, f"prompt {i}", sampling, engine.catalog()), id=f"{i}")

    searches = [searching(kind, "base", **params) for kind, params in KINDS.items()] * 2
    return [one(program, i) for i, program in enumerate([*searches, *[PLAIN] * 32])]


def drain(engine: Engine, ticks: int = 4000) -> list[Event]:
    events: list[Event] = []
    for _ in range(ticks):
        if not engine.has_work():
            return events
        events += engine.step()
        engine.check()
    raise AssertionError("it does not end")


def texts(events: list[Event]) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in events:
        assert not isinstance(event, Failed), event
        if isinstance(event, Delta):
            found[event.request_id] = found.get(event.request_id, "") + event.text
    return found


def test_every_kind_is_here() -> None:
    assert set(KINDS) == set(SEARCHES)


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, str], int]:
    """Every request's text when nothing else runs, and the blocks that all of them take together."""
    engine = make_engine(8192)
    found: dict[str, str] = {}
    need = 0
    for request in requests_of(engine):
        engine.submit(request)
        events, most = [], 0.0
        while engine.has_work():
            events += engine.step()
            most = max(most, engine.pools["base"].used)
        found |= texts(events)
        need += round(most * 8192)
    return found, need


@pytest.mark.parametrize(("share", "seats", "tokens"), [(1, 64, 32), (8, 64, 32), (8, 5, 32), (8, 64, 1), (1, 64, 5)])
def test_all_of_them_at_once_are_what_they_are_alone(
    alone: tuple[dict[str, str], int], share: int, seats: int, tokens: int
) -> None:
    wanted, need = alone
    engine = make_engine(need // share, max_num_seqs=seats, max_search_tokens=tokens)
    for request in requests_of(engine):
        engine.submit(request)
    assert texts(drain(engine)) == wanted
    assert share == 1 or engine.stats().preemptions > 0
    assert all(pool.used == 0 for pool in engine.pools.values())
    assert not engine.scheduler.resting


def searched(plan: Plan) -> tuple[int, int, bool]:
    """Of a tick: rows that hypotheses get, positions that scorers read, and whether others get rows."""
    rows = sum(sample.count for sample in plan.samples if sample.sequence.goal)
    read = sum(s.count for spans in plan.spans.values() for s in spans if isinstance(s.sequence, Stream))
    return rows, read, any(sample.sequence.goal is None for sample in plan.samples)


def ticks(
    monkeypatch: pytest.MonkeyPatch, searches: list[Program], length: int, streams: int = 1
) -> list[tuple[int, int, bool, list[str]]]:
    """`searched` of every tick, and whose hypotheses got the rows: streams of 40 tokens beside `searches`."""
    engine = make_engine(8192, max_search_tokens=6)
    found: list[tuple[int, int, bool, list[str]]] = []
    make = engine.scheduler.plan

    def plan(drafts: bool = True) -> Plan:
        made = make(drafts)
        found.append((*searched(made), [s.sequence.group.request.id for s in made.samples if s.sequence.goal]))
        return made

    monkeypatch.setattr(engine.scheduler, "plan", plan)
    for i, program in enumerate([*[PLAIN] * streams, *searches]):
        sampling = Sampling(max_tokens=40 if i < streams else length, ignore_eos=True, seed=i)
        engine.submit(replace(prepare(program, f"prompt {i}", sampling, engine.catalog()), id=f"{i}"))
    drain(engine)
    together = 40 + (streams > 1)  # they wait a tick for the prefix that they share
    assert sum(others for _, _, others, _ in found) == together  # streams get a row in every tick
    return found


def test_hypotheses_take_turns_where_others_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ticks(monkeypatch, [searching("best_of_n", "base", n=6, vote="majority")] * 3, 20)
    beside = [names for rows, _, others, names in found if others and rows]
    assert max(len(names) for names in beside) == 6
    full = [names for names in beside if len(names) == 6]
    assert len(full) > 20
    assert all(names.count(name) == 2 for names in full for name in ("1", "2", "3"))
    assert max(rows for rows, _, others, _ in found if not others) == 18  # there is no bound when they are alone


def test_searches_may_take_as_much_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ticks(monkeypatch, [searching("best_of_n", "base", n=6, vote="majority")] * 3, 20, streams=10)
    assert max(rows for rows, _, others, _ in found if others) == 10


def test_scorers_read_on_beside_hypotheses_where_others_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    beams = [searching("beam", "base", n=4, width=2, max_steps=8, **GROWN)] * 4
    found = ticks(monkeypatch, beams, 32)
    beside = [(rows, read) for rows, read, others, _ in found if others]
    assert max(rows + read for rows, read in beside) == 6
    assert max(rows for rows, read in beside if read) == 3
    assert max(rows for rows, _, others, _ in found if not others) == 16


def test_scorers_of_several_requests_read_by_turns_where_others_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(8192, max_search_tokens=6)
    readers: list[str] = []
    make = engine.scheduler.plan

    def plan(drafts: bool = True) -> Plan:
        made = make(drafts)
        spans = [span.sequence for spans in made.spans.values() for span in spans]
        readers.extend(s.group.payer.request.id for s in spans if isinstance(s, Stream))
        return made

    monkeypatch.setattr(engine.scheduler, "plan", plan)
    search = searching("best_of_n", "base", n=4, scorer="prm")
    for i, program in enumerate([PLAIN, search, search]):
        sampling = Sampling(max_tokens=12 if i else 200, ignore_eos=True, seed=i)
        engine.submit(replace(prepare(program, f"prompt {i}", sampling, engine.catalog()), id=f"{i}"))
    drain(engine)
    changes = sum(a != b for a, b in pairwise(readers))
    assert changes > 10, readers


@pytest.mark.parametrize("share", [1, 8])
@pytest.mark.parametrize("after", [3, 11, 25])
def test_cancelling_half_frees_their_memory_at_once(alone: tuple[dict[str, str], int], share: int, after: int) -> None:
    wanted, need = alone
    engine = make_engine(need // share)
    requests = requests_of(engine)
    for request in requests:
        engine.submit(request)
    events: list[Event] = []
    for _ in range(after):
        events += engine.step()
    gone = {request.id for request in requests[::2]}
    for id in gone:
        engine.abort(id)
    engine.check()
    scheduler = engine.scheduler
    held = [*scheduler.running, *scheduler.waiting, *scheduler.resting]
    assert not gone & {state.group.payer.request.id for state in held}
    events += drain(engine)
    assert {event.request_id for event in events if isinstance(event, Done)} >= set(wanted) - gone
    found = texts(events)
    assert {id: found[id] for id in set(wanted) - gone} == {id: wanted[id] for id in set(wanted) - gone}
    assert all(pool.used == 0 for pool in engine.pools.values())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "bound", [{"max_candidates": n} for n in (1, 2, 3, 7)] + [{"max_total_tokens": n} for n in (1, 9)]
)
def test_every_kind_ends_within_its_budgets(kind: str, bound: dict[str, int]) -> None:
    engine = make_engine(8192)
    program = searching(kind, "base", **KINDS[kind], **bound)
    request = replace(prepare(program, "prompt", Sampling(max_tokens=16, seed=1), engine.catalog()), id="one")
    engine.submit(request)
    (done,) = [event for event in drain(engine) if isinstance(event, Done)]
    report = done.usage.search
    assert report is not None
    assert report.branches <= 1 + bound.get("max_candidates", report.branches)  # the root is no fork
    assert report.generated <= bound.get("max_total_tokens", report.generated)
    assert not engine.scheduler.resting


def test_a_refinement_that_the_bound_leaves_no_room_for_is_not_the_answer() -> None:
    engine = make_engine(8192)
    program = searching("agents", "base", max_candidates=1)
    request = replace(
        prepare(program, "prompt", Sampling(max_tokens=16, seed=1, ignore_eos=True), engine.catalog()), id="one"
    )
    engine.submit(request)
    events = drain(engine)
    (done,) = [event for event in events if isinstance(event, Done)]
    report = done.usage.search
    assert report is not None
    assert report.exhausted == "max_candidates"
    answer = dict(report.details)["answer"]
    assert answer
    assert texts(events)["one"] == answer


def test_revisions_that_the_bound_leaves_no_room_for_are_no_answers() -> None:
    engine = make_engine(8192)
    program = searching("revise", "base", chains=2, length=2, max_candidates=3)  # two chains' first answers, one more
    sampling = Sampling(max_tokens=16, seed=1, ignore_eos=True)
    request = replace(prepare(program, "prompt", sampling, engine.catalog()), id="one")
    engine.submit(request)
    (done,) = [event for event in drain(engine) if isinstance(event, Done)]
    report = done.usage.search
    assert report is not None
    assert sorted(len(chain) for chain in dict(report.details)["chains"]) == [1, 2]
