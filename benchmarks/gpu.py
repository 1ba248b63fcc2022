"""The engine on one GPU, against transformers' `generate` and against what memory allows.

    python -m benchmarks.gpu                        8B and 1B, batches of 1, 16 and 64; results/gpu.json and pictures
    python -m benchmarks.gpu --base 1B --batch 1    part of it (both may be given again)
    python -m benchmarks.gpu --quick                tiny models anywhere, one round, to see that it works; no files

Models have the dimensions of Llama-3.1-8B and Llama-3.2-1B with two side models of 0.1B and random bf16 weights, made
on the device. They were taught a rule (see `benchmarks.models`), so every text is known and checked, and a drafter that
was taught a rule spoiled at a share of the tokens is right at the other share: acceptance is chosen, not hoped for.

A step is one decode step of the whole batch, while every stream is decoding. Sides take turns round by round; medians
of the rounds are reported. The bound is the weights and KV that a step reads over the bandwidth of copying 1 GiB on
this device. "Three forwards" are the bare forwards of proxy-tuning's models, in turn, waited for once.

What settings of the engine cost (models beside each other, batch-invariant forwards) is measured by engines that take
over the same models one after another, the first again at the end. Flips are greedy texts that differ between a batch
of one and the largest batch, of the embedded trained base and of a random model, whose flat rows are the worst case.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import bounds
from benchmarks.gpu_sides import (
    DRAFTS,
    SHARES,
    Run,
    bare_forwards,
    copy_bandwidth,
    decode,
    generated,
    predictions,
    programs,
    prompts_of,
)
from benchmarks.models import SIZES, build, make_rule, make_tokenizer, spoiled
from benchmarks.pictures import draw
from decoding.core import EngineConfig, Program
from decoding.engine import Engine
from decoding.generate import host, load_models

Side = Callable[[], Run]
FAMILY = Path(__file__).resolve().parent.parent / "server" / "family"
SIDE = "0.1B"
FLAGS: dict[str, dict[str, bool]] = {
    "default": {},
    "one after another": {"side_streams": False},
    "batch-invariant": {"batch_invariant": True},
    "default, again": {},
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured: model sizes by role, batches, lengths in tokens."""

    base: str
    side: str
    batches: Sequence[int]
    prompt: int
    new_tokens: int
    rounds: int
    device: torch.device
    compiled: bool

    @property
    def context(self) -> int:
        """Of a stream halfway."""
        return self.prompt + self.new_tokens // 2

    @property
    def positions(self) -> int:
        """Of KV that the largest batch needs, with room for drafts and partly filled blocks."""
        return max(self.batches) * (self.prompt + self.new_tokens + 2 * DRAFTS + 32)


def known_flags(flags: dict[str, bool]) -> dict[str, bool]:
    """Those of `flags` that this engine has."""
    return {name: value for name, value in flags.items() if name in {field.name for field in fields(EngineConfig)}}


def config_of(setting: Setting, models: Sequence[str], flags: dict[str, bool]) -> EngineConfig:
    """KV for the largest batch in all models, nothing cached between texts, everything compiled or captured."""
    memory = setting.positions * sum(bounds.kv_bytes(SIZES[name]) for name in models)
    return EngineConfig(
        kv_memory=memory,
        prefix_cache=False,
        max_num_seqs=max(64, *setting.batches),
        max_num_batched_tokens=8192,  # prompts are read in a few ticks, so that all streams decode for most of the run
        compile_from=0,
        **flags,
    )


def measure_base(setting: Setting, bandwidth: float, console: Console) -> dict[str, Any]:
    """All sides of one base model, under all settings of the engine."""
    base, side = SIZES[setting.base], SIZES[setting.side]
    rule = make_rule(base.vocab, 0)
    rules = {f"draft {share}": spoiled(rule, 1 - share, 2) for share in SHARES}
    sizes = {"base": setting.base} | dict.fromkeys(("expert", "anti", *rules), setting.side)
    tokenizer = make_tokenizer(base.vocab)
    hosted = {
        id: host(id, build(SIZES[size], seed, setting.device, rules.get(id, rule)), tokenizer)
        for seed, (id, size) in enumerate(sizes.items())
    }
    peer = build(base, 0, setting.device, rule)
    peer.generation_config.eos_token_id = None
    result: dict[str, Any] = {"settings": {}, "missing_flags": []}
    for label, flags in FLAGS.items():
        if known_flags(flags) != flags:
            result["missing_flags"].append(label)
            continue
        console.print(f"{setting.base}, engine: {label} ...")
        engine = Engine(hosted, config_of(setting, list(sizes.values()), flags))
        result["settings"][label] = {}
        for batch in setting.batches:
            prompts = prompts_of(batch, setting.prompt, base.vocab, batch)
            sides = sides_of(engine, setting, prompts, rule, label == "default")
            if label == "default":
                sides |= generated(peer, prompts, setting.new_tokens, setting.compiled)
            result["settings"][label][str(batch)] = interleave(sides, setting.rounds, rule.tolist(), prompts)
        del engine, sides
        gc.collect()
    result["bound_ms"] = {
        str(batch): {
            "plain": bounds.bound_ms([base], batch, setting.context, bandwidth),
            "proxy-tuning": bounds.bound_ms([base, side, side], batch, setting.context, bandwidth),
        }
        for batch in setting.batches
    }
    result["ratios"] = {str(batch): ratios(result, str(batch)) for batch in setting.batches}
    return result


def sides_of(
    engine: Engine, setting: Setting, prompts: Sequence[Sequence[int]], rule: torch.Tensor, all_of_them: bool
) -> dict[str, Side]:
    """What the engine does with one batch, and the bare forwards under it."""
    sides: dict[str, Side] = {}
    for title, program in programs().items():
        if all_of_them or title in ("plain", "proxy-tuning", "dynamic fusion"):
            predicted = predictions(title, rule, prompts, setting.new_tokens)
            sides[title] = partial(decode, engine, program, prompts, setting.new_tokens, predicted)
    for title, models in (("three forwards", ("base", "expert", "anti")), ("side forwards", ("expert", "anti"))):
        sides[title] = partial(bare_forwards, engine, models, len(prompts), setting.context)
    return sides


def interleave(
    sides: dict[str, Side], rounds: int, rule: Sequence[int], prompts: Sequence[Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Medians of every side after a warm-up call each; a side that fails is told and left out."""
    seen: dict[str, list[Run]] = {}
    failed: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        try:
            side()
            seen[name] = []
        except Exception as error:
            failed[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    for _ in track(range(rounds), description="rounds", transient=True):
        for name, runs in seen.items():
            runs.append(sides[name]())
    last = [prompt[-1] for prompt in prompts]
    return failed | {
        name: {
            "step_ms": 1e3 * statistics.median(run.step for run in runs),
            "wrong_tokens": bounds.wrong_share(rule, last, runs[-1].texts) if runs[-1].texts else None,
            "acceptance": runs[-1].acceptance,
            "tokens_per_pass": runs[-1].tokens_per_pass,
        }
        for name, runs in seen.items()
    }


def ratios(result: dict[str, Any], batch: str) -> dict[str, float]:
    """What the sides of one batch say of each other; what was not measured is left out."""
    settings = result["settings"]

    def step(name: str, label: str = "default") -> float:
        return float(settings.get(label, {}).get(batch, {}).get(name, {}).get("step_ms", "nan"))

    own = step("plain") + step("expert") + step("anti")
    off = "one after another"
    made = {
        "plain: share of the bandwidth bound": result["bound_ms"][batch]["plain"] / step("plain"),
        "proxy-tuning: share of the bandwidth bound": result["bound_ms"][batch]["proxy-tuning"] / step("proxy-tuning"),
        "proxy-tuning: time over its three forwards": step("proxy-tuning") / step("three forwards"),
        "proxy-tuning: time over its models' own decoding": step("proxy-tuning") / own,
        "proxy-tuning, one after another: time over its three forwards": step("proxy-tuning", off)
        / step("three forwards", off),
        "dynamic fusion: time over its models' own decoding": step("dynamic fusion") / own,
        "proxy-tuning: share of the side models that is hidden": bounds.hidden_share(
            step("proxy-tuning"), step("proxy-tuning", off), step("side forwards", off)
        ),
        "plain: batch-invariant over default": step("plain", "batch-invariant") / step("plain"),
        "proxy-tuning: batch-invariant over default": step("proxy-tuning", "batch-invariant") / step("proxy-tuning"),
        "plain: default again over default": step("plain", "default, again") / step("plain"),
    }
    names = settings.get("default", {}).get(batch, {})
    made |= {f"plain over {name}": step(name) / step("plain") for name in names if name.startswith("generate")}
    drafted = [name for name in names if name.startswith(("drafter", "prediction"))]
    made |= {f"{name}: speed-up over plain": step("plain") / step(name) for name in drafted}
    return {name: ratio for name, ratio in made.items() if ratio == ratio}


def measure_flips(setting: Setting, size: str) -> dict[str, Any]:
    """Share of greedy texts that differ between a batch of one and the largest, per model and setting."""
    flat = build(SIZES[size], 9, setting.device)
    models = {"random": {"m": host("m", flat, make_tokenizer(SIZES[size].vocab))}}
    models["trained"] = load_models({"m": str(FAMILY / "base")})
    count = max(setting.batches)
    result: dict[str, Any] = {}
    for name, hosted in models.items():
        for label in ("default", "batch-invariant"):
            if known_flags(FLAGS[label]) != FLAGS[label]:
                continue
            per_token = hosted["m"].runner.kv_bytes_per_block(16) // 16
            config = replace(config_of(setting, [], FLAGS[label]), kv_memory=setting.positions * per_token)
            engine = Engine(hosted, config)
            text = hosted["m"].text
            prompts = [text.encode(f"What is {3 * i + 2} + {7 * i + 5}?\n\n") for i in range(count)]
            program = Program.plain("m")
            batched = decode(engine, program, prompts, setting.new_tokens).texts
            alone = [decode(engine, program, [prompt], setting.new_tokens).texts[0] for prompt in prompts]
            result[f"{name}, {label}"] = bounds.flip_rate(alone, batched)
            del engine
            gc.collect()
    return result


def show(console: Console, name: str, found: dict[str, Any], batches: Sequence[int]) -> None:
    """Steps of the default engine, and ratios."""
    steps = Table("side", *(f"step of {batch}, ms" for batch in batches), title=name)
    default = found["settings"]["default"]
    sides = dict.fromkeys(side for batch in batches for side in default[str(batch)])
    for side in sides:
        row = [default[str(batch)].get(side, {}).get("step_ms") for batch in batches]
        steps.add_row(side, *("-" if value is None else f"{value:.2f}" for value in row))
    table = Table("comparison", *(f"batch {batch}" for batch in batches))
    for ratio in dict.fromkeys(each for batch in batches for each in found["ratios"][str(batch)]):
        row = [found["ratios"][str(batch)].get(ratio) for batch in batches]
        table.add_row(ratio, *("-" if value is None else f"{value:.2f}" for value in row))
    console.print(steps, table)
    wrong = {f"{side}, batch {b}": v for b in batches for side, v in default[str(b)].items() if v.get("wrong_tokens")}
    if wrong:
        console.print(f"Texts that are not the rule's: {', '.join(wrong)}.", style="red")
    if found["missing_flags"]:
        console.print(f"This engine has no setting for: {', '.join(found['missing_flags'])}.")


def main() -> None:
    """Measure, print tables, write JSON and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["8B", "1B"], action="append", help="a base model (may be given again)")
    parser.add_argument("--batch", type=int, action="append", help="a number of streams (may be given again)")
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens a stream")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up")
    parser.add_argument("--skip-compiled", action="store_true", help="leave out generate with a compiled forward")
    parser.add_argument("--quick", action="store_true", help="tiny models and batches, one round; writes no results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        parser.error("This needs a CUDA device; --quick tries all sides on this CPU.")
    bases = ["tiny"] if args.quick else args.base or ["8B", "1B"]
    batches = tuple(args.batch or ((1, 3) if args.quick else (1, 16, 64)))
    if args.quick:
        args.prompt, args.new_tokens, args.rounds = 24, 12, 1
    console = Console()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_bandwidth(device),
        "setting": {"batches": batches, "prompt": args.prompt, "new_tokens": args.new_tokens, "rounds": args.rounds},
        "bases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gpu.json" if args.quick else args.out
        for base in bases:
            side = "tiny" if args.quick else SIDE
            lengths = (args.prompt, args.new_tokens, args.rounds)
            setting = Setting(base, side, batches, *lengths, device, not args.skip_compiled)
            result["bases"][base] = found = measure_base(setting, result["copy_bytes_per_second"], console)
            show(console, base, found, batches)
            out.write_text(json.dumps(result, indent=1) + "\n")  # what there is outlives a failure of what follows
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        console.print("Flips ...")
        result["flips"] = measure_flips(setting, "tiny" if args.quick else "1B")
        console.print(f"Greedy texts that differ between a batch of 1 and of {max(batches)}: {result['flips']}")
        out.write_text(json.dumps(result, indent=1) + "\n")
        for line in draw(result, out):
            console.print(line)
    if args.quick:
        console.print("Tried, nothing measured: no file was written.")


if __name__ == "__main__":
    main()
