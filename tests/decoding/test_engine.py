"""The engine over table models: what comes out is what the table says, however the ticks were cut."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from decoding.core import BadRequest, EngineConfig, Overloaded, Program, Request, Sampling, UnknownModel
from decoding.engine import Engine
from decoding.events import Delta, Done, Failed
from decoding.strategies import STRATEGIES
from tests.fakes import EOS, TableModel, random_table, table_engine

SMALL = EngineConfig(block_size=4, max_num_batched_tokens=16, max_num_seqs=32)


def models(memory: int = 40) -> dict[str, TableModel]:
    return {name: TableModel(name, random_table(i), memory) for i, name in enumerate(("base", "expert", "anti"))}


def program(kind: str, **params: object) -> Program:
    strategy = STRATEGIES[kind]
    return strategy.build(strategy.params(**params), "base")


PLAIN = program("plain")
PROXY = program("proxy_tuning", expert="expert", anti="anti", alpha=0.7)
CFG = program("cfg", negative_prompt="no", guidance=1.5)


def request(
    name: str, prog: Program, prompts: list[list[int]], sampling: Sampling, n: int = 1, salt: str = ""
) -> Request:
    return Request(name, prog, tuple(map(tuple, prompts)), sampling, "base", 257, (EOS,), n, salt)


def greedy_reference(fakes: dict[str, TableModel], req: Request, length: int) -> list[int]:
    """Full recompute, one token at a time, sharing no code with the engine."""
    out: list[int] = []
    for _ in range(length):
        z = torch.zeros(257)
        for term, prompt in zip(req.program.policy.terms, req.prompts, strict=True):
            z = z + term.weight * fakes[term.role.model].row([*prompt, *out])
        out.append(int(z.argmax()))
        if out[-1] == EOS and not req.sampling.ignore_eos:
            break
    return out


def run(engine: Engine, requests: list[Request]) -> dict[str, dict[int, list[int]]]:
    """Submit everything, step to the end, return ids by request and choice."""
    for req in requests:
        engine.submit(req)
    out: dict[str, dict[int, list[int]]] = {}
    for _ in range(100_000):
        if not engine.has_work():
            break
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                out.setdefault(event.request_id, {}).setdefault(event.index, []).extend(event.token_ids)
        engine.check()
    assert not engine.has_work(), "the engine made no progress"
    assert all(pool.used == 0 for pool in engine.pools.values())
    return out


def mixed_requests(seed: int, count: int, length: int = 24) -> list[Request]:
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        prog = (PLAIN, PROXY, CFG)[i % 3]
        prompts = [[rng.randrange(256) for _ in range(rng.choice((1, 3, 10, 37, 60)))] for _ in prog.policy.terms]
        sampling = Sampling(temperature=0.0, max_tokens=length, ignore_eos=True)
        if i % 4 == 3:
            sampling = replace(sampling, temperature=1.0, seed=i, top_p=0.9)
        requests.append(request(f"r{i}", prog, prompts, sampling))
    return requests


def test_greedy_equals_full_recompute_for_every_strategy_in_one_batch() -> None:
    fakes = models()
    requests = [replace(r, sampling=replace(r.sampling, temperature=0.0)) for r in mixed_requests(0, 12)]
    out = run(table_engine(fakes, SMALL), requests)
    for req in requests:
        assert out[req.id][0] == greedy_reference(fakes, req, 24)


def test_a_request_alone_equals_the_same_among_fifteen_others() -> None:
    requests = mixed_requests(1, 16)
    together = run(table_engine(models(), SMALL), requests)
    for req in requests:
        assert run(table_engine(models(), SMALL), [req])[req.id] == together[req.id]


@pytest.mark.parametrize("tokens", [4, 7, 64, 4096])
@pytest.mark.parametrize("rows", [3, 512])
def test_budgets_do_not_change_the_texts(tokens: int, rows: int) -> None:
    requests = mixed_requests(2, 9)
    wanted = run(table_engine(models(), SMALL), requests)
    config = replace(SMALL, max_num_batched_tokens=tokens, max_logit_rows=rows)
    assert run(table_engine(models(), config), requests) == wanted


def test_a_small_pool_gives_the_same_texts_and_counts_preemptions() -> None:
    requests = mixed_requests(3, 40, length=40)
    wanted = run(table_engine(models(), SMALL), requests)
    need = sum(
        -(-(len(p) + 40) // 4)
        for r in requests
        for t, p in zip(r.program.policy.terms, r.prompts)
        if t.role.model == "base"
    )
    engine = table_engine(models(), SMALL, blocks=need // 8)
    assert run(engine, requests) == wanted
    assert engine.stats().preemptions > 0


def test_two_hundred_random_aborts_leave_nothing_behind() -> None:
    rng = random.Random(7)
    engine = table_engine(models(), SMALL, blocks=120)
    live: list[str] = []
    for i in range(200):
        req = replace(mixed_requests(i, 6)[rng.randrange(6)], id=f"a{i}", n=rng.choice((1, 1, 3)))
        engine.submit(req)
        live.append(req.id)
        for _ in range(rng.randrange(4)):
            engine.step()
            engine.check()
        engine.abort(live.pop(rng.randrange(len(live))))
        engine.check()
    for name in live:
        engine.abort(name)
    engine.check()
    assert not engine.has_work()
    assert engine.stats().aborts == 200
    assert all(pool.used == 0 for pool in engine.pools.values())


def test_abort_of_an_unknown_request_is_ignored() -> None:
    engine = table_engine(models(), SMALL)
    engine.abort("nobody")
    assert engine.stats().aborts == 0


def test_a_prefix_hit_on_one_role_only_gives_the_same_tokens() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    base_prompt = list(range(40))
    first = request("first", PLAIN, [base_prompt], Sampling(temperature=0.0, max_tokens=4, ignore_eos=True))
    second = request(
        "second", PROXY, [base_prompt, [9] * 30, [8] * 10], Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    )
    run(engine, [first])
    before = sum(len(s.token_ids) for spans in fakes["base"].spans for s in spans)
    out = run(engine, [second])
    computed = sum(len(s.token_ids) for spans in fakes["base"].spans for s in spans) - before
    assert out["second"][0] == greedy_reference(fakes, second, 8)
    assert computed == 40 - 36 + 7  # nine full blocks of four were there; the last position never is


def test_a_prefix_hit_leaves_at_least_one_position() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    req = request("x", PLAIN, [list(range(16))], Sampling(temperature=0.0, max_tokens=1, ignore_eos=True))
    run(engine, [req])
    run(engine, [replace(req, id="y")])
    assert [len(s.token_ids) for s in fakes["base"].spans[-1]] == [4]


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    prompt = list(range(41))
    sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
    run(engine, [request(f"r{i}", PLAIN, [prompt], sampling) for i in range(5)])
    assert sum(len(s.token_ids) for spans in fakes["base"].spans for s in spans) == 40 + 5


def test_the_salt_separates_caches() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
    run(engine, [request("a", PLAIN, [list(range(41))], sampling)])
    run(engine, [request("b", PLAIN, [list(range(41))], sampling, salt="other")])
    assert engine.stats().models[0].prefix_hits == 0
    run(engine, [request("c", PLAIN, [list(range(41))], sampling, salt="other")])
    assert engine.stats().models[0].prefix_hits == 10


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    fakes = models()
    engine = table_engine(fakes, replace(SMALL, prefix_cache=False))
    sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
    run(engine, [request(f"r{i}", PLAIN, [list(range(41))], sampling) for i in range(3)])
    assert sum(len(s.token_ids) for spans in fakes["base"].spans for s in spans) == 3 * 41


@pytest.mark.parametrize("prog", [PLAIN, PROXY, CFG])
def test_n_choices_prefill_once_and_differ_by_their_noise(prog: Program) -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    prompts = [[200 + i, *range(30 + i)] for i in range(len(prog.policy.terms))]
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    out = run(engine, [request("n", prog, prompts, sampling, n=5)])["n"]
    assert sorted(out) == [0, 1, 2, 3, 4]
    assert len({tuple(ids) for ids in out.values()}) == 5
    # the root's prompt once, then only last positions: one per sibling and one per further token
    tracks = sum(term.role.model == "base" for term in prog.policy.terms)
    prompt_positions = sum(len(p) for t, p in zip(prog.policy.terms, prompts) if t.role.model == "base")
    computed = sum(len(s.token_ids) for spans in fakes["base"].spans for s in spans)
    assert computed == prompt_positions + tracks * (4 + 5 * 11)
    alone = run(table_engine(models(), SMALL), [request("one", prog, prompts, sampling)])["one"]
    assert alone[0] == out[0]


def test_forks_survive_a_pool_too_small_for_all_of_them() -> None:
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=30, ignore_eos=True)
    req = request("n", PROXY, [list(range(20))] * 3, sampling, n=8)
    wanted = run(table_engine(models(), SMALL), [req])
    engine = table_engine(models(), SMALL, blocks=14)
    assert run(engine, [req]) == wanted


def test_a_seed_gives_the_same_text_and_no_seed_gives_another() -> None:
    seeded = request("s", PLAIN, [[1, 2, 3]], Sampling(seed=11, max_tokens=20, ignore_eos=True))
    free = request("f", PLAIN, [[1, 2, 3]], Sampling(max_tokens=20, ignore_eos=True))
    engine = table_engine(models(), SMALL)
    assert run(engine, [seeded]) == run(engine, [seeded])
    assert run(engine, [free]) != run(engine, [free])


def test_prompt_logprobs_are_those_of_the_mix() -> None:
    fakes = models()
    engine = table_engine(fakes, replace(SMALL, max_logit_rows=7))
    prompt = list(range(5, 45))
    req = request("p", PROXY, [prompt] * 3, Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=2, logprobs=2))
    engine.submit(req)
    events = []
    while engine.has_work():
        events += engine.step()
    scored = events[0].logprobs
    assert scored[0] is None
    assert len(scored) == len(prompt)
    for i in range(1, len(prompt)):
        z = sum(t.weight * fakes[t.role.model].row(prompt[:i]) for t in PROXY.policy.terms)
        lp = torch.log_softmax(z, 0)
        assert scored[i].token_id == prompt[i]
        assert scored[i].logprob == pytest.approx(float(lp[prompt[i]]), abs=1e-4)
        assert [token for token, _ in scored[i].top] == lp.topk(2).indices.tolist()


def test_prompt_rows_need_one_prompt_for_all_roles() -> None:
    engine = table_engine(models(), SMALL)
    sampling = Sampling(max_tokens=1, prompt_logprobs=0)
    with pytest.raises(BadRequest, match="same prompt"):
        engine.submit(request("p", CFG, [[1, 2, 3], [9, 9, 9]], sampling))
    # a different first id (another model's BOS) or a prefix before the shared ids is fine
    run(engine, [request("q", CFG, [[7, 2, 3], [5, 5, 8, 2, 3]], sampling)])


def test_max_tokens_zero_scores_without_generating() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    engine.submit(request("z", PLAIN, [[1, 2, 3]], Sampling(max_tokens=0, prompt_logprobs=0), n=2))
    events = []
    while engine.has_work():
        events += engine.step()
    assert len(events[0].logprobs) == 3
    assert [e.finish_reason for e in events if isinstance(e, Delta)] == ["length", "length"]
    assert isinstance(events[-1], Done)
    assert events[-1].usage.completion_tokens == 0
    engine.submit(request("y", PLAIN, [[1, 2, 3]], Sampling(max_tokens=0)))
    assert [type(e) for e in engine.step()] == [Delta, Done]


def test_eos_ends_the_text_and_ignore_eos_does_not() -> None:
    table = torch.full((257, 257), -5.0)
    for i in range(256):
        table[i, i + 1] = 5.0
    fakes = {"base": TableModel("base", table)}
    req = request("e", PLAIN, [[250]], Sampling(temperature=0.0, max_tokens=20))
    engine = table_engine(fakes, SMALL)
    engine.submit(req)
    deltas = [e for _ in range(10) for e in engine.step() if isinstance(e, Delta)]
    assert [t for d in deltas for t in d.token_ids] == [251, 252, 253, 254, 255, 256]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    out = run(engine, [replace(req, id="i", sampling=replace(req.sampling, ignore_eos=True, max_tokens=8))])
    assert len(out["i"][0]) == 8
    with_min = replace(req, id="m", sampling=replace(req.sampling, min_tokens=7, max_tokens=8))
    assert EOS not in run(engine, [with_min])["m"][0][:6]


def test_a_stop_string_across_tokens_never_shows() -> None:
    table = torch.full((257, 257), -5.0)
    for i in range(256):
        table[i, i + 1] = 5.0
    req = request("s", PLAIN, [[ord("a")]], Sampling(temperature=0.0, max_tokens=20, stop=("ef", "xyz")))
    engine = table_engine({"base": TableModel("base", table)}, SMALL)
    engine.submit(req)
    deltas = [e for _ in range(20) for e in engine.step() if isinstance(e, Delta)]
    assert "".join(d.text for d in deltas) == "bcd"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "ef")


def test_usage_counts_everything() -> None:
    engine = table_engine(models(), SMALL)
    engine.submit(
        request("u", PROXY, [[1] * 9, [2] * 5, [3] * 7], Sampling(seed=1, max_tokens=6, ignore_eos=True), n=2)
    )
    events = []
    while engine.has_work():
        events += engine.step()
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 12)
    assert dict(usage.forwards).keys() == {"base", "expert", "anti"}


def test_a_zero_weight_drops_the_term_and_its_forwards() -> None:
    fakes = models()
    prog = program("proxy_tuning", expert="expert", anti="anti", alpha=0.0)
    req = request("z", prog, [[1, 2, 3]] * 3, Sampling(temperature=0.0, max_tokens=9, ignore_eos=True))
    out = run(table_engine(fakes, SMALL), [req])
    plain = request("p", PLAIN, [[1, 2, 3]], req.sampling)
    assert out["z"][0] == greedy_reference(models(), plain, 9)
    assert not fakes["expert"].spans
    assert not fakes["anti"].spans


def test_a_failing_forward_fails_its_requests_and_no_other() -> None:
    fakes = models()
    engine = table_engine(fakes, SMALL)
    fakes["expert"].broken = True
    engine.submit(request("bad", PROXY, [[1, 2]] * 3, Sampling(max_tokens=4)))
    engine.submit(request("good", PLAIN, [[1, 2]], Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)))
    events = []
    while engine.has_work():
        events += engine.step()
        engine.check()
    assert [e.request_id for e in events if isinstance(e, Failed)] == ["bad"]
    assert [e.request_id for e in events if isinstance(e, Done)] == ["good"]


def test_a_row_without_an_allowed_token_is_the_requests_error() -> None:
    engine = table_engine({"base": TableModel("base", torch.full((257, 257), float("nan")))}, SMALL)
    engine.submit(request("n", PLAIN, [[1, 2]], Sampling(max_tokens=4)))
    events = engine.step()
    assert isinstance(events[0], Failed)
    engine.check()


def test_requests_that_can_never_run_are_refused() -> None:
    engine = table_engine(models(), replace(SMALL, max_queue=3), blocks=20)
    sampling = Sampling(max_tokens=4)
    with pytest.raises(BadRequest, match="takes 512"):
        engine.submit(request("long", PLAIN, [[1] * 600], sampling))
    with pytest.raises(BadRequest, match="kv-memory"):
        engine.submit(request("fat", PLAIN, [[1] * 100], sampling))
    with pytest.raises(UnknownModel, match="Served: base"):
        engine.submit(request("who", STRATEGIES["plain"].build(STRATEGIES["plain"].params(), "who"), [[1]], sampling))
    with pytest.raises(Overloaded):
        engine.submit(request("many", PLAIN, [[1]], sampling, n=4))
    engine.submit(request("ok", PLAIN, [[1]], sampling))
    with pytest.raises(BadRequest, match="in use"):
        engine.submit(request("ok", PLAIN, [[1]], sampling))


def test_generate_takes_texts_and_gives_completions() -> None:
    engine = table_engine(models(), SMALL)
    sampling = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
    one, two = engine.generate(["Hello", "Bye"], PROXY, sampling)
    assert one.token_ids == greedy_reference(models(), request("r", PROXY, [list(b"Hello")] * 3, sampling), 5)
    assert one.finish_reason == "length"
    assert len(two.logprobs) == 5
    assert len(engine.generate("Hi", sampling=replace(sampling, temperature=1.0), n=3)) == 3


def test_many_streams_do_not_starve_a_prefill_or_each_other() -> None:
    config = replace(SMALL, max_num_batched_tokens=8, max_logit_rows=4, max_num_seqs=16)
    engine = table_engine(models(), config)
    sampling = Sampling(temperature=0.0, max_tokens=30, ignore_eos=True)
    for i in range(8):
        engine.submit(request(f"s{i}", PLAIN, [[i]], sampling))
    wide = request("wide", PLAIN, [[9]], replace(sampling, temperature=1.0, seed=1), n=8)
    engine.submit(wide)
    engine.submit(request("long", PLAIN, [list(range(100))], sampling))
    seen: dict[str, int] = {}
    for _ in range(60):
        for event in engine.step():
            if isinstance(event, Delta):
                seen[event.request_id] = seen.get(event.request_id, 0) + 1
    assert min(seen[f"s{i}"] for i in range(8)) >= 15  # 4 rows a tick among 9 requests
    assert seen["wide"] <= 60
    assert seen["long"] > 0
