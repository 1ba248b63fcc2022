"""What `benchmarks.gpu` measures: decoding by the engine, bare forwards, `generate`, and the bandwidth of copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.kernels import Timer, bandwidth_of
from benchmarks.models import text_of
from benchmarks.peers import hf_generate, wait_for
from decoding.core import Program, Sampling, Speculation
from decoding.engine import Engine
from decoding.events import Delta, Done, Failed, Usage
from decoding.hosting import SpanInput
from decoding.prepare import prepare
from decoding.strategies import STRATEGIES

REPETITIONS = 20
SHARES = (0.9, 0.7)  # of drafts that are right
DRAFTS = 4


@dataclass(slots=True)
class Run:
    """One measured call: seconds of a decode step of the whole batch (a token of each stream), and what was written.

    texts are empty where only time was measured.
    """

    step: float
    texts: list[list[int]] = field(default_factory=list)
    acceptance: float = 0.0
    tokens_per_pass: float = 1.0


def programs() -> dict[str, Program]:
    """What is decoded, by title; the models are base, expert, anti, and drafters by their share."""
    proxy, fusion = STRATEGIES["proxy_tuning"], STRATEGIES["dynamic_fusion"]
    plain = Program.plain("base")
    made = {
        "plain": plain,
        "expert": Program.plain("expert"),
        "anti": Program.plain("anti"),
        "proxy-tuning": proxy.build(proxy.params(expert="expert", anti="anti"), "base"),
        "dynamic fusion": fusion.build(fusion.params(experts=["expert"], small="anti"), "base"),
    }
    for share in SHARES:
        for draft, title in ((f"draft {share}", "drafter"), ("prediction", "prediction")):
            made[f"{title}, {share} right"] = replace(plain, speculation=Speculation(draft, DRAFTS, "rejection"))
    made[f"drafter, {SHARES[0]} right, auto"] = replace(
        plain, speculation=Speculation(f"draft {SHARES[0]}", "auto", "rejection")
    )
    return made


def prompts_of(count: int, length: int, vocab: int, salt: int) -> list[list[int]]:
    """Random prompts, no two alike."""
    noise = torch.Generator().manual_seed(salt)
    ids: list[list[int]] = torch.randint(vocab, (count, length), generator=noise).tolist()
    return ids


def predictions(title: str, rule: torch.Tensor, prompts: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """What a client would predict of each text, wrong at the share of tokens that the title says; else nothing."""
    if not title.startswith("prediction"):
        return [()] * len(prompts)
    share = float(title.split()[1])
    noise = torch.Generator().manual_seed(1)
    made = []
    for prompt in prompts:
        wrong = torch.rand(length, generator=noise) >= share
        text = text_of(rule, prompt[-1], length)
        made.append(tuple((token + 1) % len(rule) if bad else token for token, bad in zip(text, wrong.tolist())))
    return made


def decode(
    engine: Engine,
    program: Program,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    predictions: Sequence[tuple[int, ...]] | None = None,
) -> Run:
    """Greedy decode of all prompts in one batch. Steps in which some stream prefills or has ended do not count."""
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    catalog = engine.catalog()
    order: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        predicted = predictions[i] if predictions else ()
        request = prepare(program, tuple(prompt), sampling, catalog, prediction="." if predicted else None)
        engine.submit(replace(request, prediction=predicted))
        order[request.id] = i
    texts: list[list[int]] = [[] for _ in prompts]
    usages: list[Usage] = []
    seconds, tokens = 0.0, 0
    while engine.has_work():
        started = all(texts)
        began = time.perf_counter()
        events = engine.step()
        spent = time.perf_counter() - began
        deltas = [event for event in events if isinstance(event, Delta) and event.token_ids]
        for event in events:
            if isinstance(event, Failed):
                for id in order:
                    engine.abort(id)
                raise RuntimeError(event.message)
            if isinstance(event, Done):
                usages.append(event.usage)
        if started and len(deltas) == len(prompts):
            seconds += spent
            tokens += sum(len(delta.token_ids) for delta in deltas)
        for delta in deltas:
            texts[order[delta.request_id]] += delta.token_ids
    if not tokens:
        raise RuntimeError("no step in which all streams decode: raise --new-tokens")
    drafted, passes = sum(usage.drafted for usage in usages), sum(usage.passes for usage in usages)
    return Run(
        seconds * len(prompts) / tokens,
        texts,
        sum(usage.accepted for usage in usages) / max(1, drafted),
        sum(usage.completion_tokens for usage in usages) / max(1, passes),
    )


def bare_forwards(engine: Engine, models: Sequence[str], batch: int, context: int) -> Run:
    """A forward of one token of each stream of each model, waited for once: the median of some. The engine is idle."""
    blocks = -(-(context + 1) // engine.config.block_size)
    spans = [SpanInput([5], context, range(i * blocks, (i + 1) * blocks), [0]) for i in range(batch)]
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        for model in models:
            engine.runners[model].forward(spans)
        wait_for(engine.runners[models[0]].device)
        times.append(time.perf_counter() - began)
    return Run(statistics.median(times))


def generated(
    model: Any, prompts: Sequence[Sequence[int]], length: int, compiled: bool
) -> dict[str, Callable[[], Run]]:
    """transformers' `generate`: as it comes, with a static cache, and with that and a compiled forward."""
    options: dict[str, dict[str, Any]] = {
        "generate": {},
        "generate, static cache": {"cache_implementation": "static", "disable_compile": True},
    }
    if compiled:
        how = CompileConfig(dynamic=False)  # transformers' own mode, CUDA graphs; each batch a compilation of its own
        how._compile_all_devices = model.device.type == "cpu"  # only to try it there
        options["generate, compiled"] = {"cache_implementation": "static", "compile_config": how}

    def run(more: dict[str, Any]) -> Run:
        return Run(hf_generate(model, prompts, length, **more).step)

    return {name: partial(run, more) for name, more in options.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    if device.type == "cuda":
        return Timer(device).bandwidth()
    source = torch.ones(16 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return bandwidth_of(len(source), statistics.median(times))
