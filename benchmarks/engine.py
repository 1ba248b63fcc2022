"""Ratios of Trimtab against transformers, and of its layers against each other, all measured in one run.

    python -m benchmarks.engine                 the ~330M model, about ten minutes on two cores
    python -m benchmarks.engine --size tiny     seconds, to see that it works

Every side is warmed up, sides of a comparison are interleaved round by round, and medians are reported. A step is
one decode step of the whole batch: from the moment every stream has its first token to the last token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the server sets it for its engine; read when torch is imported

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.http_load import serve_and_measure
from benchmarks.models import SIZES, make_model
from benchmarks.peers import Timing, hf_generate, hf_proxy_loop, load_peer
from decoding.core import EngineConfig, Program, Sampling
from decoding.engine import Engine
from decoding.events import Delta
from decoding.generate import load_models
from decoding.prepare import Entry, prepare
from decoding.strategies import STRATEGIES

Side = Callable[[], Timing]


def engine_run(engine: Engine, program: Program | list[Program], prompts: list[list[int]], new_tokens: int) -> Timing:
    """Greedy decode of all prompts in one batch, under one program or one each."""
    programs = program if isinstance(program, list) else [program] * len(prompts)
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    catalog = {info.id: Entry(engine.hosted[info.id].text, info) for info in engine.models}
    began = time.perf_counter()
    for each, prompt in zip(programs, prompts, strict=True):
        engine.submit(prepare(each, tuple(prompt), sampling, catalog))
    started: set[str] = set()
    first = began
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Delta) and event.request_id not in started:
                started.add(event.request_id)
                first = time.perf_counter()
    ended = time.perf_counter()
    return Timing((ended - first) / (new_tokens - 1), ended - began)


def interleave(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, float]]:
    """Median step and total of every side, after one warm-up call each."""
    for side in sides.values():
        side()
    seen: dict[str, list[Timing]] = {name: [] for name in sides}
    for _ in track(range(rounds), description="rounds", transient=True):
        for name, side in sides.items():
            seen[name].append(side())
    return {
        name: {
            "step_ms": 1e3 * statistics.median(t.step for t in timings),
            "total_s": statistics.median(t.total for t in timings),
        }
        for name, timings in seen.items()
    }


def prompts_of(count: int, length: int, salt: int) -> list[list[int]]:
    """Random prompts of bytes; no two share a block, so the prefix cache cannot help."""
    rng = random.Random(salt)
    return [[rng.randrange(256) for _ in range(length)] for _ in range(count)]


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    base_size, side_size = (SIZES[name] for name in (("tiny", "tiny") if args.size == "tiny" else (args.size, "30M")))
    paths = {
        "base": make_model(folder / "base", base_size, 0),
        "expert": make_model(folder / "expert", side_size, 1),
        "anti": make_model(folder / "anti", side_size, 2),
        "other": make_model(folder / "other", side_size, 3),
    }
    config = EngineConfig(prefix_cache=False, kv_memory=1 << 30)
    engines = {"compiled": Engine(load_models({k: str(v) for k, v in paths.items()}), config)}
    if not args.skip_eager:
        engines["eager"] = Engine(load_models({"base": str(paths["base"])}, compile=False), config)
    peers = {name: load_peer(path) for name, path in paths.items()}
    n, streams = args.new_tokens, args.streams
    one = prompts_of(1, args.prompt, 1)
    many = prompts_of(streams, args.prompt, 2)
    plain = {name: STRATEGIES["plain"].build(STRATEGIES["plain"].params(), name) for name in paths}
    proxy = STRATEGIES["proxy_tuning"]
    mixed = proxy.build(proxy.params(expert="expert", anti="anti"), "base")
    solved = STRATEGIES["dynamic_fusion"]
    fusion = solved.build(solved.params(experts=["expert", "other"], small="anti"), "base")
    tuned = STRATEGIES["emulated_fine_tuning"]
    emulated = tuned.build(tuned.params(tuned=["expert", "other"], reference="anti", top_p=0.9), "base")
    ours = engines["compiled"]
    sides: dict[str, Side] = {
        "generate x1": lambda: hf_generate(peers["base"], one, n),
        "engine x1": lambda: engine_run(ours, plain["base"], one, n),
        f"generate x{streams}": lambda: hf_generate(peers["base"], many, n),
        f"engine x{streams}": lambda: engine_run(ours, plain["base"], many, n),
        "three forwards x1": lambda: hf_proxy_loop(
            [peers[m] for m in ("base", "expert", "anti")], [1.0, 1.0, -1.0], one[0], n
        ),
        "proxy x1": lambda: engine_run(ours, mixed, one, n),
        f"proxy x{streams}": lambda: engine_run(ours, mixed, many, n),
    }
    if "eager" in engines:
        sides["engine eager x1"] = lambda: engine_run(engines["eager"], plain["base"], one, n)
    for title, program in (("fusion", fusion), ("emulated", emulated)):
        sides[f"{title} x1"] = lambda program=program: engine_run(ours, program, one, n)  # type: ignore[misc]
        sides[f"{title} x{streams}"] = lambda program=program: engine_run(ours, program, many, n)  # type: ignore[misc]
    for name in ("expert", "anti", "other"):
        sides[f"{name} x1"] = lambda name=name: engine_run(ours, plain[name], one, n)  # type: ignore[misc]
        sides[f"{name} x{streams}"] = lambda name=name: engine_run(ours, plain[name], many, n)  # type: ignore[misc]
    medians = interleave(sides, args.rounds)
    if not args.skip_http:
        medians |= serve_and_measure(
            paths["base"], lambda: engine_run(ours, plain["base"], many, n), many, n, max(3, args.rounds)
        )
    return {"medians": medians, "ratios": ratios(medians, streams)}


def ratios(medians: dict[str, dict[str, float]], streams: int) -> dict[str, float]:
    """The comparisons that matter, each a quotient of decode steps of this run."""

    def step(name: str) -> float:
        return medians[name]["step_ms"]

    s = streams
    table = {
        "one stream: speed-up over generate": step("generate x1") / step("engine x1"),
        f"{s} streams: speed-up over generate one by one": s * step("generate x1") / step(f"engine x{s}"),
        f"{s} streams: speed-up over generate on one batch": step(f"generate x{s}") / step(f"engine x{s}"),
        f"{s} streams, whole calls: speed-up over generate one by one": (
            s * medians["generate x1"]["total_s"] / medians[f"engine x{s}"]["total_s"]
        ),
        "proxy x1: time over the three models' own": (
            step("proxy x1") / (step("engine x1") + step("expert x1") + step("anti x1"))
        ),
        f"proxy x{s}: time over the three models' own": (
            step(f"proxy x{s}") / (step(f"engine x{s}") + step(f"expert x{s}") + step(f"anti x{s}"))
        ),
        f"proxy x{s}: speed-up over a loop of three forwards": s * step("three forwards x1") / step(f"proxy x{s}"),
    }
    for title, label in (("fusion", "dynamic fusion, 2 experts"), ("emulated", "EFT, 2 tuned, top-p gate")):
        for count in (1, s):
            own = sum(step(f"{m} x{count}") for m in ("engine", "expert", "anti", "other"))
            table[f"{label} x{count}: time over the four models' own"] = step(f"{title} x{count}") / own
    if "engine eager x1" in medians:
        table["one stream, eager: speed-up over generate"] = step("generate x1") / step("engine eager x1")
    if f"http x{s}" in medians:
        table[f"HTTP x{s}: time over the engine alone"] = step(f"http x{s}") / step("engine beside http")
    return table


def main() -> None:
    """Parse flags, measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["330M", "tiny"], default="330M", help="the base model (side models: 30M)")
    parser.add_argument("--streams", type=int, default=16, help="concurrent streams")
    parser.add_argument("--prompt", type=int, default=128, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens per stream")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up")
    parser.add_argument("--skip-http", action="store_true", help="leave the HTTP server out")
    parser.add_argument("--skip-eager", action="store_true", help="leave the uncompiled engine out")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder for the next run")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(args, args.models or Path(temporary))
    result["setting"] = {
        "size": args.size,
        "dtype": "bfloat16",
        "streams": args.streams,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    console = Console()
    steps = Table("side", "decode step, ms", "whole call, s", title="medians")
    for name, values in result["medians"].items():
        steps.add_row(name, f"{values['step_ms']:.2f}", f"{values['total_s']:.2f}")
    table = Table(
        "comparison", "ratio", title=f"{args.size} bf16, contexts {args.prompt}..{args.prompt + args.new_tokens}"
    )
    for name, ratio in result["ratios"].items():
        table.add_row(name, f"{ratio:.2f}")
    console.print(steps, table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
