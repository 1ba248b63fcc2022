"""What searches cost, and what they cost others: scorers' incremental KV, look-aheads, mixed load.

    python -m benchmarks.search                   all parts (half an hour on two cores)
    python -m benchmarks.search --part deal       one of: prm, deal, mixed
    python -m benchmarks.search --quick           short texts, to see that it works

prm    beam search (n 16, width 4, 40 steps of 32 tokens) over a random 330M model with a process reward model of the
       same size: the engine, whose scorer reads what is new, against the same search whose scorer reads whole texts
       one at a time with transformers; as many tokens are generated in both.
deal   DeAL (k 5, look-ahead of 10) over the embedded base widened to 300M parameters, with keywords: seconds and
       dependent forwards a token, with look-aheads drafted from earlier ones and without, over plain decoding.
mixed  16 plain streams beside 16 searches of different kinds, against the same streams beside 16 plain ones: the
       median time between two tokens of a stream.

Sides of a comparison are interleaved round by round where they are short; medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the server sets it for its engine; read when torch is imported

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.models import SIZES, make_model
from benchmarks.speculation import FAMILY, widened
from decoding.core import EngineConfig, ModelSpec, Program, Request, Sampling, SearchPlan
from decoding.engine import Engine
from decoding.events import Delta, Done, Failed, Usage
from decoding.generate import load_models
from decoding.prepare import prepare
from decoding.scorers.spec import Hypothesis, ScorerParams
from decoding.search import SEARCHES

Result = dict[str, Any]
QUESTIONS = ("What is 12 + 30 + 7?", "Hello! How are you?", "Tell me about the valley.", "What is 64 + 17?")


def plain(model: str = "base") -> Program:
    """The model alone."""
    return Program.plain(model)


def program(kind: str, model: str = "base", **params: Any) -> Program:
    """A search over the model alone."""
    return replace(plain(model), search=SearchPlan(kind, SEARCHES[kind].params(**params)))


def finish(engine: Engine, requests: list[Request]) -> dict[str, Usage]:
    """Run `requests` to their end. Raises RuntimeError if one fails."""
    for request in requests:
        engine.submit(request)
    usages: dict[str, Usage] = {}
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Done):
                usages[event.request_id] = event.usage
    return usages


def ask(engine: Engine, program: Program, prompt: str, sampling: Sampling) -> Request:
    """A request of `program`."""
    return prepare(program, prompt, sampling, engine.catalog())


def word_tokenizer(path: Path) -> None:
    """Give the model in `path` a tokenizer whose ids from 257 on are words, so that texts and ids agree both ways."""
    spec = json.loads((path / "tokenizer.json").read_text())
    vocab = {key: value for key, value in spec["model"]["vocab"].items() if value < 256}
    size = json.loads((path / "config.json").read_text())["vocab_size"]
    for i in range(257, size):
        letters, rest = "", i
        while rest:
            rest, digit = divmod(rest, 26)
            letters += chr(97 + digit)
        vocab[f"Ġ{letters}q"] = i
    spec["model"] |= {"vocab": vocab, "ignore_merges": True}
    spec["model"]["vocab"]["<eos>"] = 256
    spec["pre_tokenizer"] |= {"use_regex": True}
    (path / "tokenizer.json").write_text(json.dumps(spec))


# -- a process reward model as large as the policy ------------------------------------------------------------------


class WholeTexts:
    """The same scores by transformers, every text from its beginning, one at a time.

    Of every `one_in` texts one is read and counts as that many; texts of a step are equally long. The others get that
    one's scores: which beams live on changes nothing that is measured.
    """

    def __init__(self, path: Path, dtype: torch.dtype, reading: Any, one_in: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.reading, self.calls, self.tokens, self.seconds = reading, 0, 0, 0.0
        self.one_in, self._known = one_in, list[float]()

    def score(self, text: Hypothesis) -> list[float]:
        """Step scores."""
        self.calls += 1
        if (self.calls - 1) % self.one_in == 0:
            self._known = self._read(text)
        return self._known

    @torch.inference_mode()
    def _read(self, text: Hypothesis) -> list[float]:
        began = time.perf_counter()
        rendered = self.reading.render(text)
        marks = torch.tensor(rendered.marks)
        rows = self.model(torch.tensor([list(rendered.ids)]), logits_to_keep=marks, use_cache=False).logits[0]
        self.tokens += len(rendered.ids)
        self.seconds += time.perf_counter() - began
        found: list[float] = self.reading.read(rows.float(), None)
        return found


def pair(folder: Path, args: argparse.Namespace) -> tuple[list[ModelSpec], dict[str, Path]]:
    """A random policy and a PRM of the same size, which answers with tokens."""
    size = SIZES["tiny" if args.quick else args.size]
    paths = {}
    for i, name in enumerate(("base", "prm")):
        paths[name] = make_model(folder / f"{name}-{size.layers}", size, i)
        word_tokenizer(paths[name])
    more: dict[str, Any] = {"dtype": args.dtype, "max_model_len": 2048}
    prm = ModelSpec("prm", str(paths["prm"]), kind="prm", step_marker="+", score_tokens=("+", "-"), **more)
    return [ModelSpec("base", str(paths["base"]), **more), prm], paths


def measure_prm(folder: Path, args: argparse.Namespace) -> Result:
    """The cost of scoring every step of a beam search."""
    specs, paths = pair(folder, args)
    engine = Engine(load_models(specs, self_check=False), EngineConfig(kv_memory=6 << 30))
    steps, tokens = (4, 8) if args.quick else (args.steps, 32)
    search = program("beam", n=16, width=4, scorer="prm", max_steps=steps, step_tokens=tokens, separator="\n\n\n\n\n\n")
    sampling = Sampling(temperature=0.8, max_tokens=steps * tokens, ignore_eos=True)
    request = ask(engine, search, "word " * 24, sampling)
    finish(engine, [replace(request, id="warm", sampling=replace(sampling, max_tokens=2 * tokens))])
    began = time.perf_counter()
    (usage,) = finish(engine, [request]).values()
    ours = time.perf_counter() - began
    assert usage.search is not None
    reading = engine._host.make_scorer("prm", "base")
    whole = WholeTexts(paths["prm"], engine.runners["prm"].dtype, reading, args.one_in)
    engine._host.make_scorer = lambda spec, model: whole
    began = time.perf_counter()
    (other,) = finish(engine, [replace(request, id="whole")]).values()
    theirs = time.perf_counter() - began + whole.seconds * (args.one_in - 1)
    return {
        "n": 16,
        "steps": steps,
        "step_tokens": tokens,
        "generated": [usage.completion_tokens, other.completion_tokens],
        "one text read in": args.one_in,
        "scorer_tokens": [dict(usage.search.scored), whole.tokens * args.one_in],
        "seconds": [ours, theirs],
        "tokens_per_second": [usage.completion_tokens / ours, other.completion_tokens / theirs],
        "scoring_alone_s": whole.seconds * args.one_in,
        "throughput over whole texts": usage.completion_tokens / ours / (other.completion_tokens / theirs),
    }


# -- look-aheads ----------------------------------------------------------------------------------------------------


def measure_deal(folder: Path, args: argparse.Namespace) -> Result:
    """DeAL's cost a token over plain decoding."""
    base = FAMILY / "base" if args.quick else widened(FAMILY / "base", folder / "wide", 300_000_000)
    specs = [ModelSpec("base", str(base), dtype=args.dtype)]
    engine = Engine(load_models(specs, self_check=False), EngineConfig(kv_memory=2 << 30, compile_from=0))
    length = 12 if args.quick else 24
    sampling = Sampling(temperature=0.0, max_tokens=length, ignore_eos=True)
    constraint = ScorerParams(keywords=("valley", "river", "seven"))
    sides = {
        "plain": plain(),
        "deal": program("deal", k=5, lookahead=10, constraint=constraint),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    forwards: dict[str, list[float]] = {name: [] for name in sides}
    usages: dict[str, list[Usage]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, side in sides.items():
            spent = tokens = made = 0.0
            for prompt in QUESTIONS:
                before = engine.stats().models[0].forwards
                began = time.perf_counter()
                (usage,) = finish(engine, [ask(engine, side, prompt, sampling)]).values()
                spent += time.perf_counter() - began
                tokens += length
                made += engine.stats().models[0].forwards - before
                usages[name].append(usage)
            if turn:  # the first round warms up
                seconds[name].append(spent / tokens)
                forwards[name].append(made / tokens)
    ratios = [a / b for a, b in zip(seconds["deal"], seconds["plain"], strict=True)]
    drafted = sum(u.drafted for u in usages["deal"])
    return {
        "k": 5,
        "lookahead": 10,
        "tokens": length,
        "ms_per_token": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "dependent forwards per token": statistics.median(forwards["deal"]),
        "acceptance of drafts": sum(u.accepted for u in usages["deal"]) / drafted if drafted else None,
        "over plain decoding": statistics.median(ratios),
    }


# -- mixed load -----------------------------------------------------------------------------------------------------


def mixed_searches(count: int) -> list[Program]:
    """Searches of different kinds, each over a small number of branches."""
    prm: dict[str, Any] = {"scorer": "prm"}
    short = ScorerParams(max_words=20)
    kinds = [
        program("best_of_n", n=4, **prm),
        program("best_of_n", n=4, vote="majority"),
        program("sharpen", n=4),
        program("beam", n=4, width=2, step_tokens=16, max_steps=6, **prm),
        program("dvts", n=4, width=2, step_tokens=16, max_steps=6, **prm),
        program("lookahead", n=4, width=2, step_tokens=16, max_steps=4, **prm),
        program("mcts", iterations=4, branch=2, step_tokens=16, **prm),
        program("deal", k=3, lookahead=4, constraint=short),
        program("reward_search", k=3, **prm),
        program("revise", chains=2, length=2, **prm),
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


def gaps(engine: Engine, streams: list[Request], others: list[Request]) -> tuple[list[float], float]:
    """Seconds between two tokens of a stream, of all `streams`, while `others` run too; and until all have ended."""
    began = time.perf_counter()
    for request in (*others, *streams):
        engine.submit(request)
    last: dict[str, float] = {}
    found: list[float] = []
    watched = {request.id for request in streams}
    left, rest = set(watched), {request.id for request in others}
    while left:
        for event in engine.step():
            now = time.perf_counter()
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Done):
                left.discard(event.request_id)
                rest.discard(event.request_id)
            if isinstance(event, Delta) and event.request_id in watched and event.token_ids:
                if event.request_id in last and rest:  # only while the others run
                    found.append(now - last[event.request_id])
                last[event.request_id] = now
    while engine.has_work():
        engine.step()
    return found, time.perf_counter() - began


def measure_mixed(folder: Path, args: argparse.Namespace) -> Result:
    """What 16 searches cost 16 plain streams beside them."""
    count, length = (4, 16) if args.quick else (16, 96)
    specs, _ = pair(folder, args)
    result: Result = {"streams": count, "searches": count, "tokens": length}
    hosted = load_models(specs, self_check=False)
    per_block = sum(model.runner.kv_bytes_per_block(16) for model in hosted.values())
    need = 2 * count * 4 * length * per_block // 16  # of four hypotheses a search, and as much for the streams
    for label, memory in (("ample", 2 * need), ("an eighth", need // 8)):
        engine = Engine(hosted, EngineConfig(kv_memory=memory, max_search_tokens=args.search_tokens))
        sampling = Sampling(temperature=0.8, max_tokens=length, ignore_eos=True, seed=1)

        def streams(name: str, engine: Engine = engine, sampling: Sampling = sampling) -> list[Request]:
            return [
                replace(ask(engine, plain(), f"stream {i} of {name}", replace(sampling, seed=i)), id=f"{name}-{i}")
                for i in range(count)
            ]

        short = replace(sampling, max_tokens=length // 2)
        beside: dict[str, list[float]] = {"plain": [], "searches": []}
        whole: dict[str, list[float]] = {"plain": [], "searches": []}
        for turn in range(args.rounds):
            searches = [
                ask(engine, each, f"search {i} of {turn}", short) for i, each in enumerate(mixed_searches(count))
            ]
            for name, mine, others in (
                ("plain", streams(f"a{turn}"), streams(f"b{turn}")),
                ("searches", streams(f"c{turn}"), searches),
            ):
                found, seconds = gaps(engine, mine, others)
                beside[name] += found
                whole[name].append(seconds)
        medians = {name: 1e3 * statistics.median(values) for name, values in beside.items()}
        slowest = {name: 1e3 * statistics.quantiles(values, n=100)[98] for name, values in beside.items()}
        result[label] = {
            "kv_tokens": engine.models[0].kv_tokens,
            "preemptions": engine.stats().preemptions,
            "median ms between tokens": medians,
            "p99 ms between tokens": slowest,
            "seconds until all have ended": {name: statistics.median(values) for name, values in whole.items()},
            "median over beside plain": medians["searches"] / medians["plain"],
        }
    return result


PARTS = {"prm": measure_prm, "deal": measure_deal, "mixed": measure_mixed}


def main() -> None:
    """Measure, print a table, write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this one (may be given again)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=list(SIZES), default="330M", help="of the random policy and PRM")
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    default = "bfloat16" if bf16 else "float32"
    parser.add_argument("--dtype", default=default, help="bfloat16 where the CPU has instructions for it, else float32")
    parser.add_argument("--steps", type=int, default=40, help="of the beam search")
    parser.add_argument(
        "--one-in", type=int, default=1, help="the peer of prm reads one text in so many, and it counts so many times"
    )
    parser.add_argument("--search-tokens", type=int, help="max_search_tokens of mixed; by default the engine's")
    parser.add_argument("--quick", action="store_true", help="short texts of tiny models, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "search-cpu.json")
    args = parser.parse_args()
    console = Console()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.part or PARTS:
            console.print(f"Measuring {part} ...")
            known[part if args.size == "330M" or part == "deal" else f"{part} {args.size}"] = found = {
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "dtype": args.dtype,
                **PARTS[part](Path(folder), args),
            }
            table = Table("figure", "value", title=part)
            for name, value in found.items():
                table.add_row(name, str(value))
            console.print(table)
            if not args.quick:
                args.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
