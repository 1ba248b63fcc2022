"""Speculation against plain decoding and against transformers' assisted generation, all in one run.

    python -m benchmarks.speculation                 the embedded base, and the same base at a large model's cost
    python -m benchmarks.speculation --quick         one round of short texts, to see that it works

Two pairs: the embedded `base` with its drafter, and the same base with MLPs widened by units whose output weights are
zero, so that it writes the same text at the cost of ~300M parameters. Greedy, EOS is a token like any other, bf16, one
stream unless a row says otherwise. Sides are interleaved round by round; medians of the rounds' ratios are compared.

Every model is compiled, as one of the size of a real drafter would be (`--compile-from 0`).

"predicted" is what measured acceptance and bare forwards allow: tau t(1) / (k d(1) + t(k + 1)), tau the measured tokens
a pass, t and d the times of forwards of target and drafter by number of tokens as they take turns, k the draft length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the server sets it for its engine; read when torch is imported

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding.core import EngineConfig, Program, Sampling, Speculation
from decoding.engine import Engine
from decoding.events import Done, Usage
from decoding.generate import load_models
from decoding.hosting import SpanInput
from decoding.prepare import Entry, prepare
from decoding.strategies import STRATEGIES

FAMILY = Path(__file__).resolve().parent.parent / "server" / "family"
QUESTIONS = (
    "What is 12 + 30 + 7?",
    "What is 45 + 8 + 21?",
    "Hello! How are you?",
    "What is 5 + 6 + 70 + 2?",
    "Tell me about the valley.",
    "What is 64 + 17?",
)


def widened(source: Path, target: Path, parameters: int) -> Path:
    """Write the Llama in `source` with MLPs so wide that it has about `parameters`; its logits stay what they are."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = model.config
    own = sum(p.numel() for p in model.parameters())
    extra = (parameters - own) // (3 * config.hidden_size * config.num_hidden_layers) // 64 * 64
    noise = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            more = torch.randn(extra, config.hidden_size, generator=noise) * 0.02
            linear.weight = torch.nn.Parameter(torch.cat([linear.weight, more.to(linear.weight.dtype)]))
        down = layer.mlp.down_proj
        down.weight = torch.nn.Parameter(torch.cat([down.weight, down.weight.new_zeros(config.hidden_size, extra)], 1))
    config.intermediate_size += extra
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def scrambled(source: Path, target: Path) -> Path:
    """Write the model in `source` with random weights: a drafter that is never right."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = (torch.randn(parameter.shape, generator=noise) * 0.2).to(parameter.dtype)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@dataclass
class Side:
    """One way to write the texts. `run` returns seconds a token; `usages` are those of its last run."""

    run: Callable[[Side], float]
    seconds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds a token."""
        return statistics.median(self.seconds)

    def speculation(self) -> dict[str, float]:
        """Acceptance, drafts a pass and tokens a pass."""
        drafted = sum(u.drafted for u in self.usages)
        passes = max(1, sum(u.passes for u in self.usages))
        return {
            "acceptance": sum(u.accepted for u in self.usages) / drafted if drafted else 0.0,
            "drafted_per_pass": drafted / passes,
            "tokens_per_pass": sum(u.completion_tokens for u in self.usages) / passes,
        }


def ours(engine: Engine, program: Program, prompts: Sequence[str], length: int, streams: int = 1) -> Side:
    """The engine on `streams` prompts at a time."""
    catalog = {info.id: Entry(engine.hosted[info.id].text, info) for info in engine.models}
    sampling = Sampling(temperature=0.0, max_tokens=length, ignore_eos=True)

    def run(side: Side) -> float:
        side.usages = []
        spent = 0.0
        for start in range(0, len(prompts), streams):
            requests = [prepare(program, prompt, sampling, catalog) for prompt in prompts[start : start + streams]]
            began = time.perf_counter()
            for request in requests:
                engine.submit(request)
            while engine.has_work():
                side.usages += [event.usage for event in engine.step() if isinstance(event, Done)]
            spent += time.perf_counter() - began
        return spent / (len(prompts) * length)

    return Side(run)


def theirs(target: Any, tokenizer: Any, prompts: Sequence[str], length: int, assistant: Any = None) -> Side:
    """transformers' `generate`, with an assistant model or without."""

    @torch.inference_mode()
    def run(side: Side) -> float:
        extra = {"assistant_model": assistant} if assistant is not None else {}
        began = time.perf_counter()
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
            mask = torch.ones_like(ids)
            out = target.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, **extra)
            assert out.shape[1] == ids.shape[1] + length
        return (time.perf_counter() - began) / (len(prompts) * length)

    return Side(run)


def peer(path: Path) -> Any:
    """The model as transformers loads it, to which EOS is a token like any other."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def forward_seconds(engine: Engine, turns: Sequence[tuple[str, int]]) -> list[float]:
    """Seconds of bare forwards of (model, tokens), all rows wanted, that take turns as in decoding: medians of 20.

    A small model is slower behind a large one, which leaves nothing of it in the caches.
    """
    times: list[list[float]] = [[] for _ in turns]
    for _ in range(20):
        for (model, tokens), seen in zip(turns, times, strict=True):
            blocks = list(range(-(-(tokens + 64) // engine.config.block_size)))
            span = SpanInput([5] * tokens, 64, blocks, list(range(tokens)))
            began = time.perf_counter()
            engine.runners[model].forward([span])
            seen.append(time.perf_counter() - began)
    return [statistics.median(seen) for seen in times]


def with_drafts(program: Program, draft: str, tokens: int | str) -> Program:
    """The program with exact speculation."""
    return replace(program, speculation=Speculation(draft, tokens, "rejection"))  # type: ignore[arg-type]


def sides_of(args: argparse.Namespace, target: Path, paths: dict[str, Path]) -> tuple[Engine, dict[str, Side]]:
    """Everything that is measured on one pair."""
    models = {"base": str(target)} | {name: str(path) for name, path in paths.items()}
    engine = Engine(
        load_models(models, self_check=False), EngineConfig(prefix_cache=False, kv_memory=1 << 28, compile_from=0)
    )
    plain = STRATEGIES["plain"].build(STRATEGIES["plain"].params(), "base")
    proxy_row = STRATEGIES["proxy_tuning"]
    proxy = proxy_row.build(proxy_row.params(expert="expert", anti="base-small"), "base")
    tokenizer, base, drafter = AutoTokenizer.from_pretrained(target), peer(target), peer(paths["drafter"])
    prompts = [question + "\n\n" for question in QUESTIONS[: args.prompts]]
    many = [f"{question}\n\nWhat is {i} + {i + 3}?\n\n" for i in range(4) for question in QUESTIONS[:4]]
    n, k = args.new_tokens, args.tokens
    few = max(8, n // 2)
    return engine, {
        "generate": theirs(base, tokenizer, prompts, n),
        "generate, assisted": theirs(base, tokenizer, prompts, n, drafter),
        "plain": ours(engine, plain, prompts, n),
        f"drafter, {k}": ours(engine, with_drafts(plain, "drafter", k), prompts, n),
        "drafter, auto": ours(engine, with_drafts(plain, "drafter", "auto"), prompts, n),
        "random drafter, auto": ours(engine, with_drafts(plain, "random", "auto"), prompts, n),
        "ngram, auto": ours(engine, with_drafts(plain, "ngram", "auto"), prompts, n),
        "proxy": ours(engine, proxy, prompts, n),
        f"proxy, expert drafts {k}": ours(engine, with_drafts(proxy, "expert", k), prompts, n),
        "proxy, expert drafts auto": ours(engine, with_drafts(proxy, "expert", "auto"), prompts, n),
        "16 streams, plain": ours(engine, plain, many, few, 16),
        "16 streams, drafter, auto": ours(engine, with_drafts(plain, "drafter", "auto"), many, few, 16),
        "16 streams, random drafter, auto": ours(engine, with_drafts(plain, "random", "auto"), many, few, 16),
    }


def costs(engine: Engine, k: int) -> tuple[float, float, float]:
    """Seconds of a forward of one token, of one of k + 1, and of a draft step that follows it."""
    (one,) = forward_seconds(engine, [("base", 1)])
    more, *steps = forward_seconds(engine, [("base", k + 1), *[("drafter", 1)] * k])
    return one, more, statistics.mean(steps)


def ratios(sides: dict[str, Side], seen: Sequence[tuple[float, float, float]], k: int) -> dict[str, float]:
    """What the sides say of each other: medians of the rounds' own ratios; `seen` are the rounds' costs."""

    def over(slower: str, faster: str) -> float:
        pairs = zip(sides[slower].seconds, sides[faster].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)

    drafts, assisted = f"drafter, {k}", "generate, assisted"
    tau = sides[drafts].speculation()["tokens_per_pass"]
    predicted = [tau * one / (k * step + more) for one, more, step in seen]
    realised = [a / b for a, b in zip(sides["plain"].seconds, sides[drafts].seconds, strict=True)]
    return {
        "drafts over plain decode, realised": statistics.median(realised),
        "drafts over plain decode, predicted": statistics.median(predicted),
        "realised over predicted": statistics.median(a / b for a, b in zip(realised, predicted, strict=True)),
        "auto over plain decode": over("plain", "drafter, auto"),
        "drafts over generate, assisted": over(assisted, drafts),
        "auto over generate, assisted": over(assisted, "drafter, auto"),
        "plain over generate": over("generate", "plain"),
        "assisted over generate": over("generate", assisted),
        "random drafter, auto: time over plain": over("random drafter, auto", "plain"),
        "16 streams, auto: time over plain": over("16 streams, drafter, auto", "16 streams, plain"),
        "16 streams, random, auto: time over plain": over("16 streams, random drafter, auto", "16 streams, plain"),
        "speculative proxy over proxy": over("proxy", "proxy, expert drafts auto"),
        "speculative proxy over the base's plain decode": over("plain", "proxy, expert drafts auto"),
        "forward of 1, ms": 1e3 * statistics.median(one for one, _, _ in seen),
        f"forward of {k + 1}, ms": 1e3 * statistics.median(more for _, more, _ in seen),
        "draft step, ms": 1e3 * statistics.median(step for _, _, step in seen),
    }


def main() -> None:
    """Parse flags, measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", type=Path, default=FAMILY / "drafter", help="the distilled drafter")
    parser.add_argument("--parameters", type=int, default=300_000_000, help="size of the widened base")
    parser.add_argument("--tokens", type=int, default=4, help="drafts per pass where the length is fixed")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens per text")
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS), help="texts per round")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds after the warm-up")
    parser.add_argument("--pairs", nargs="*", default=["base", "widened"], choices=["base", "widened"])
    parser.add_argument("--quick", action="store_true", help="one round of short texts, a small widened model")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.quick:
        args.parameters, args.new_tokens, args.prompts, args.rounds = 8_000_000, 12, 2, 1
    console = Console()
    result: dict[str, Any] = {"setting": {k: v for k, v in vars(args).items() if not isinstance(v, Path)}}
    result["setting"] |= {"drafter": args.drafter.name, "dtype": "bfloat16"}
    result["setting"] |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: FAMILY / name for name in ("expert", "base-small")} | {"drafter": args.drafter}
        paths["random"] = scrambled(args.drafter, Path(folder) / "random")
        for pair in args.pairs:
            target = FAMILY / "base"
            if pair == "widened":
                target = widened(target, Path(folder) / "widened", args.parameters)
            engine, sides = sides_of(args, target, paths)
            for side in sides.values():
                side.run(side)
            seen: list[tuple[float, float, float]] = []
            for _ in track(range(args.rounds), description=f"{pair}: rounds", transient=True):
                for name, side in sides.items():
                    side.seconds.append(side.run(side))
                    if name == "plain":
                        seen.append(costs(engine, args.tokens))
            found = ratios(sides, seen, args.tokens)
            drafts = {name: side.speculation() for name, side in sides.items() if side.usages}
            result[pair] = {
                "ms_per_token": {name: 1e3 * side.median for name, side in sides.items()},
                "speculation": drafts,
                "ratios": found,
            }
            table = Table("side", "ms a token", "acceptance", "drafts a pass", "tokens a pass", title=pair)
            for name, side in sides.items():
                figures = [f"{value:.2f}" for value in drafts[name].values()] if name in drafts else [""] * 3
                table.add_row(name, f"{1e3 * side.median:.2f}", *figures)
            console.print(table)
            summary = Table("comparison", "ratio", title=pair)
            for name, value in found.items():
                summary.add_row(name, f"{value:.2f}")
            console.print(summary)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
