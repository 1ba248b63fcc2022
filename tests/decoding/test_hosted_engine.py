"""Strategies over real (tiny, random, fp32) models against ten lines of full recompute that share no code with us."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.admit import Hosted
from decoding.core import EngineConfig, Program, Request, Sampling
from decoding.engine import Engine
from decoding.events import Delta, Failed, TokenLogprob
from decoding.runner import Runner
from decoding.strategies import STRATEGIES
from decoding.text import TextModel
from tests.fakes import byte_tokenizer
from tests.tiny import randomize

CHUNKS = EngineConfig(block_size=16, max_num_batched_tokens=64, max_num_seqs=32)
WIDTHS = {"base": 257, "expert": 258, "anti": 321}  # padded heads: +1 and +64


def tiny_llama(seed: int, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return randomize(LlamaForCausalLM(config).eval(), seed)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def references() -> dict[str, LlamaForCausalLM]:
    return {name: tiny_llama(i, width, 3 - i % 2) for i, (name, width) in enumerate(WIDTHS.items())}


def make_engine(config: EngineConfig = CHUNKS, blocks: dict[str, int] | None = None) -> Engine:
    text = byte_tokenizer()
    hosted = {}
    for i, (name, width) in enumerate(WIDTHS.items()):
        runner = Runner(tiny_llama(i, width, 3 - i % 2), name)
        memory = blocks[name] * runner.kv_bytes_per_block(config.block_size) if blocks else None
        hosted[name] = Hosted(runner, TextModel(name, text), memory)
    return Engine(hosted, config)


@torch.no_grad()
def reference(models: dict[str, LlamaForCausalLM], req: Request, length: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy ids and the mix's log-probs per step: every model sees its whole sequence anew for every token."""
    out: list[int] = []
    rows = []
    for _ in range(length):
        z = torch.zeros(req.width)
        for term, prompt in zip(req.program.policy.terms, req.prompts, strict=True):
            ids = torch.tensor([[*prompt, *out]])
            z += term.weight * models[term.role.model](ids).logits[0, -1, : req.width]
        rows.append(torch.log_softmax(z, 0))
        out.append(int(z.argmax()))
    return out, rows


def run(engine: Engine, requests: list[Request]) -> dict[str, tuple[list[int], list[TokenLogprob]]]:
    for req in requests:
        engine.submit(req)
    out: dict[str, tuple[list[int], list[TokenLogprob]]] = {req.id: ([], []) for req in requests}
    while engine.has_work():
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                out[event.request_id][0].extend(event.token_ids)
                out[event.request_id][1].extend(event.logprobs)
        engine.check()
    assert all(pool.used == 0 for pool in engine.pools.values())
    return out


def program(kind: str, model: str = "base", **params: object) -> Program:
    return STRATEGIES[kind].build(STRATEGIES[kind].params(**params), model)


def proxy(alpha: float) -> Program:
    return program("proxy_tuning", expert="expert", anti="anti", alpha=alpha)


def cfg(guidance: float) -> Program:
    return program("cfg", negative_prompt="-", guidance=guidance)


def request(name: str, prog: Program, lengths: list[int], **sampling: object) -> Request:
    rng = random.Random(name)
    prompts = tuple(tuple(rng.randrange(256) for _ in range(n)) for n in lengths)
    settings = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=5)
    models = {term.role.model for term in prog.policy.terms}
    width = min(WIDTHS[model] for model in models)
    return Request(name, prog, prompts, replace(settings, **sampling), "base", width, (256,))  # type: ignore[arg-type]


def assert_equals_reference(
    models: dict[str, LlamaForCausalLM], req: Request, got: tuple[list[int], list[TokenLogprob]]
) -> None:
    ids, rows = reference(models, req, req.sampling.max_tokens or 0)
    assert got[0] == ids
    for entry, token, row in zip(got[1], ids, rows, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values = row.topk(5).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5])
def test_proxy_tuning_and_cfg_equal_full_recompute(references: dict[str, LlamaForCausalLM], alpha: float) -> None:
    """A different prompt length per role, chunked, beside each other and plain requests, over padded heads."""
    requests = [
        request(f"proxy-a-{alpha}", proxy(alpha), [10, 400, 33]),
        request(f"proxy-b-{alpha}", proxy(alpha), [400, 10, 10]),
        request(f"cfg-a-{alpha}", cfg(alpha), [10, 400]),
        request(f"cfg-b-{alpha}", cfg(alpha), [130, 1]),
        *(request(f"plain-{name}-{alpha}", program("plain", name), [50 + i]) for i, name in enumerate(WIDTHS)),
    ]
    out = run(make_engine(), requests)
    for req in requests:
        assert_equals_reference(references, req, out[req.id])


@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_prefix_hit_on_one_role_only(references: dict[str, LlamaForCausalLM], role: int) -> None:
    engine = make_engine()
    req = request(f"hit-{role}", proxy(1.0), [100, 100, 100])
    name = req.program.policy.terms[role].role.model
    warm = Request("warm", program("plain", name), (req.prompts[role],), req.sampling, "base", WIDTHS[name])
    run(engine, [warm])
    out = run(engine, [req])
    assert [stats.prefix_hits for stats in engine.stats().models] == [
        6 * (stats.id == name) for stats in engine.stats().models
    ]
    assert_equals_reference(references, req, out[req.id])


def mixed(count: int, length: int) -> list[Request]:
    rng = random.Random(count)
    progs = [proxy(1.0), cfg(1.5), program("plain"), program("plain", "expert"), proxy(0.5)]
    requests = []
    for i in range(count):
        prog = progs[i % len(progs)]
        lengths = [rng.choice((1, 9, 40, 90)) for _ in prog.policy.terms]
        changes: dict[str, object] = {"temperature": 1.0, "seed": i, "top_p": 0.9} if i % 3 == 2 else {}
        requests.append(request(f"m{i}", prog, lengths, max_tokens=length, **changes))
    return requests


def test_every_request_alone_equals_the_same_among_fifteen_others() -> None:
    requests = mixed(16, 8)
    together = run(make_engine(), requests)
    engine = make_engine(replace(CHUNKS, prefix_cache=False))
    for req in requests:
        ids, entries = run(engine, [req])[req.id]
        assert ids == together[req.id][0]
        assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in together[req.id][1]], abs=1e-4)


def test_an_eighth_of_the_memory_gives_the_same_texts() -> None:
    requests = mixed(48, 24)
    wanted = run(make_engine(), requests)
    need = dict.fromkeys(WIDTHS, 0)
    for req in requests:
        for term, prompt in zip(req.program.policy.terms, req.prompts, strict=True):
            need[term.role.model] += -(-(len(prompt) + 24) // 16)
    engine = make_engine(blocks={name: blocks // 8 for name, blocks in need.items()})
    got = run(engine, requests)
    assert {name: ids for name, (ids, _) in got.items()} == {name: ids for name, (ids, _) in wanted.items()}
    assert engine.stats().preemptions > 0
    engine.check()


def test_two_hundred_random_aborts_leave_the_pool_empty() -> None:
    rng = random.Random(3)
    engine = make_engine(blocks=dict.fromkeys(WIDTHS, 30))
    live: list[str] = []
    for i in range(200):
        req = replace(mixed(10, 12)[rng.randrange(10)], id=f"a{i}", n=rng.choice((1, 3)))
        engine.submit(req)
        live.append(req.id)
        for _ in range(rng.randrange(3)):
            engine.step()
        engine.abort(live.pop(rng.randrange(len(live))))
        engine.check()
    for name in live:
        engine.abort(name)
    engine.check()
    assert all(pool.used == 0 for pool in engine.pools.values())
