"""What one client, one model or one odd setting must not do to the others."""

from __future__ import annotations

import itertools
import math
import random
import threading
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from decoding.core import BadRequest, EngineConfig, Policy, Program, Request, Role, Sampling, Term, View
from decoding.engine import Engine
from decoding.events import Delta, Done, Event, Failed, PromptLogprobs
from decoding.prepare import MAX_TERMS, Entry, prepare
from server.engine_process import Loop, Submit
from tests.decoding.test_engine import CFG, PLAIN, PROXY, models, program, request
from tests.fakes import EOS, TableModel, random_table, table_engine

SMALL = EngineConfig(block_size=4)
GREEDY = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True)
COLD: list[dict[str, Any]] = [
    {"temperature": 1e-38},
    {"temperature": 1e-38, "top_p": 0.9},
    {"temperature": 1e-38, "min_p": 0.1},
    {"temperature": 1e-45, "seed": 1},
]


def steps(engine: Engine, most: int = 100) -> list[Event]:
    events: list[Event] = []
    for _ in range(most):
        if not engine.has_work():
            break
        events += engine.step()
        engine.check()
    return events


@pytest.mark.parametrize("extreme", [*COLD, {"top_k": 2**63}])
def test_extreme_sampling_touches_nobody_else(extreme: dict[str, Any]) -> None:
    engine = table_engine(models(), SMALL)
    engine.submit(request("good", PLAIN, [[1, 2, 3]], GREEDY))
    engine.submit(request("odd", PLAIN, [[1, 2, 3]], Sampling(max_tokens=5, ignore_eos=True, **extreme)))
    events = steps(engine)
    assert sum(isinstance(event, Done) for event in events) == 2
    tokens = {event.request_id: [] for event in events}  # type: dict[str, list[int]]
    for event in events:
        if isinstance(event, Delta):
            tokens[event.request_id] += event.token_ids
    if extreme in COLD:
        assert tokens["odd"] == tokens["good"]  # as good as greedy
    assert max(tokens["odd"]) < 257


def test_a_request_that_cannot_be_sampled_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import decoding.decide as module

    def broken(z: torch.Tensor, checks: Any, generator: Any) -> Any:
        if any(check.sequence.group.request.id == "bad" for check in checks):
            raise RuntimeError("broken on purpose")
        return verify(z, checks, generator)

    verify = module.verify
    monkeypatch.setattr(module, "verify", broken)
    engine = table_engine(models(), SMALL)
    engine.submit(request("bad", PROXY, [[1, 2, 3]] * 3, GREEDY))
    engine.submit(request("good", PLAIN, [[1, 2, 3]], replace(GREEDY, prompt_logprobs=0)))
    events = steps(engine)
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["bad"]
    assert [event.request_id for event in events if isinstance(event, Done)] == ["good"]
    assert sum(isinstance(event, PromptLogprobs) for event in events) == 1


@pytest.mark.parametrize("settings", [{"max_logit_rows": 2}, {"max_num_batched_tokens": 2}, {"max_logit_rows": 1}])
def test_no_budget_is_too_small_for_a_policy(settings: dict[str, int]) -> None:
    engine = table_engine(models(), replace(SMALL, **settings))
    for i in range(3):
        engine.submit(request(f"{i}", PROXY, [[1, 2, 3]] * 3, GREEDY))
    assert sum(isinstance(event, Done) for event in steps(engine, 200)) == 3


def test_policies_have_a_limit_of_terms_and_weights() -> None:
    engine = table_engine(models(), SMALL)
    catalog = {info.id: Entry(engine.hosted[info.id].text, info) for info in engine.models}
    many = Policy(tuple(Term(f"t{i}", Role("base", view=View("text", f"{i}")), 0.1) for i in range(MAX_TERMS + 1)))
    with pytest.raises(BadRequest, match="at most 32"):
        prepare(Program("x", many), "hi", GREEDY, catalog)
    with pytest.raises(BadRequest, match="weights go up to"):
        prepare(Program("x", Policy((Term("t", Role("base"), 1e39),))), "hi", GREEDY, catalog)
    fits = replace(many, terms=many.terms[:MAX_TERMS])
    assert len(engine.generate("hi", Program("x", fits), GREEDY)[0].token_ids) == 5


@pytest.mark.parametrize("rows", [1, 2, 4, 512])
def test_prompt_logprobs_are_sent_once(rows: int) -> None:
    engine = table_engine(models(), replace(SMALL, max_logit_rows=rows))
    engine.submit(request("a", PLAIN, [[1, 2, 3, 4, 5]], replace(GREEDY, prompt_logprobs=1)))
    assert [len(event.logprobs) for event in steps(engine) if isinstance(event, PromptLogprobs)] == [5]


def test_the_scored_prompt_is_the_requests_own() -> None:
    """With guidance 0 the positive prompt has no weight, but it is still what the client sent."""
    engine = table_engine(models(), SMALL)
    cold = program("cfg", negative_prompt="something else", guidance=0.0)
    with pytest.raises(BadRequest, match="same prompt"):
        engine.generate("hi there", cold, replace(GREEDY, prompt_logprobs=0))
    assert len(engine.generate("hi there", cold, GREEDY)[0].token_ids) == 5


def test_a_failing_model_leaves_requests_to_other_models_alone() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    other = Program("plain", Policy((Term("base", Role("anti")),)))
    engine.submit(request("mix", PROXY, [[1, 2, 3]] * 3, GREEDY))
    engine.submit(Request("good", other, ((1, 2, 3),), GREEDY, "anti", 257, (EOS,)))
    engine.step()
    fakes["base"].broken = True
    events = steps(engine)
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["mix"]
    assert [event.request_id for event in events if isinstance(event, Done)] == ["good"]


def test_many_choices_do_not_keep_a_newcomer_out() -> None:
    engine = table_engine(models(), replace(SMALL, max_num_seqs=8))
    engine.submit(request("wide", PLAIN, [[1, 2, 3]], Sampling(seed=1, max_tokens=100, ignore_eos=True), n=12))
    for _ in range(3):
        engine.step()
    engine.submit(request("plain", PLAIN, [[1, 2, 3]], GREEDY))
    waited = next(tick for tick in range(300) if any(event.request_id == "plain" for event in engine.step()))
    assert waited < 4
    assert sum(isinstance(event, Done) for event in steps(engine, 2000)) == 2


def test_a_small_token_budget_goes_round() -> None:
    engine = table_engine(models(), replace(SMALL, max_num_seqs=8, max_num_batched_tokens=4))
    for i in range(8):
        engine.submit(request(f"r{i}", PLAIN, [[1, 2, 3]], replace(GREEDY, max_tokens=100)))
    seen: dict[str, list[int]] = {}
    for tick in range(300):
        for event in engine.step():
            if isinstance(event, Delta):
                seen.setdefault(event.request_id, []).append(tick)
    assert max(b - a for ticks in seen.values() for a, b in itertools.pairwise(ticks)) < 10


def test_a_broken_models_logits_are_not_the_clients_fault() -> None:
    engine = table_engine({"base": TableModel("base", random_table(0) * math.nan)}, SMALL)
    engine.submit(request("a", PLAIN, [[1, 2, 3]], GREEDY))
    (failure,) = [event for event in steps(engine) if isinstance(event, Failed)]
    assert (failure.kind, failure.message) == ("EngineFailure", "The logits of base hold no finite number here.")


@pytest.mark.parametrize("extreme", [{"top_k": 2**63}, {"temperature": 1e-38, "top_p": 0.9}])
def test_odd_requests_do_not_stop_the_engines_process(extreme: dict[str, Any]) -> None:
    ours, theirs = Pipe()
    loop = threading.Thread(target=Loop(theirs, table_engine(models(), SMALL)).run, daemon=True)
    loop.start()
    for i in range(4):
        ours.send(Submit(request(f"odd{i}", PLAIN, [[1, 2, 3]], Sampling(max_tokens=2, **extreme))))
        while not any(isinstance(event, Failed | Done) for event in ours.recv().events):
            pass
    assert loop.is_alive()
    ours.close()
    loop.join(10)


@pytest.mark.parametrize("seed", range(16))
def test_a_random_life_under_odd_budgets(seed: int) -> None:
    """Whatever the budgets, prompts, stops and aborts: no hang, no failure, nothing left behind."""
    rng = random.Random(seed)
    config = EngineConfig(
        block_size=rng.choice([1, 3, 4]),
        max_num_batched_tokens=rng.choice([1, 3, 8, 64]),
        max_logit_rows=rng.choice([1, 3, 9, 512]),
        max_num_seqs=rng.choice([1, 2, 5, 32]),
        prefix_cache=rng.random() < 0.7,
    )
    engine = table_engine(models(), config, blocks=-(-180 // config.block_size))
    submitted, live, failures = 0, set(), []  # type: int, set[str], list[Failed]
    for _ in range(8000):
        if submitted < 30 and rng.random() < 0.3:
            req = _random_request(rng, f"r{submitted}")
            engine.submit(req)
            live.add(req.id)
            submitted += 1
        if live and rng.random() < 0.05:
            engine.abort(live.pop())
        for event in engine.step():
            if isinstance(event, Failed):
                failures.append(event)
            if isinstance(event, Done):
                live.discard(event.request_id)
        engine.check()
        if submitted == 30 and not engine.has_work():
            break
    assert not engine.has_work(), config
    assert not [failure for failure in failures if failure.kind == "EngineFailure"], failures
    assert all(pool.used == 0 for pool in engine.pools.values())


def _random_request(rng: random.Random, name: str) -> Request:
    prog = rng.choice((PLAIN, PROXY, CFG))
    prompt = [rng.randrange(3) for _ in range(rng.choice((1, 4, 8, 12, 40)))]
    same = rng.random() < 0.5
    prompts = [prompt + ([] if same else [rng.randrange(3)] * rng.randrange(5)) for _ in prog.policy.terms]
    sampling = Sampling(
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.choice((None, 1)),
        max_tokens=rng.choice((0, 1, 2, 20)),
        ignore_eos=rng.random() < 0.5,
        prompt_logprobs=0 if same and rng.random() < 0.5 else None,
        logprobs=rng.choice((None, 0, 2)),
        stop=("a",) if rng.random() < 0.3 else (),
        stop_token_ids=(5, 6) if rng.random() < 0.3 else (),
    )
    if sampling.max_tokens and rng.random() < 0.3:
        sampling = replace(sampling, min_tokens=rng.randint(0, sampling.max_tokens))
    return request(name, prog, prompts, sampling, n=rng.choice((1, 1, 2, 5)))
