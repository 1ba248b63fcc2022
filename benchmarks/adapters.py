"""Decode with adapters over decode of their bare base, in one run: `python -m benchmarks.adapters`.

Sixteen streams over eight adapters (two streams each) on the ~330M model, against sixteen bare streams: the same
engine with its compiled forward, and one that never compiles. Rounds are interleaved, medians reported.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.engine import engine_run, interleave, prompts_of
from benchmarks.models import SIZES, make_model
from benchmarks.peers import Timing
from decoding.core import EngineConfig, ModelSpec, Program
from decoding.engine import Engine
from decoding.generate import load_models

TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_adapter(path: Path, base: Path, rank: int, targets: list[str], seed: int) -> Path:
    """Write a random LoRA for the model in `base`, in PEFT's format."""
    path.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in AutoModelForCausalLM.from_pretrained(base, dtype="auto").named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            rows, columns = module.weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=noise) * columns**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=noise) * 0.01
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median decode steps, and the ratios."""
    base = make_model(folder / "base", SIZES[args.size], 0)
    paths = [make_adapter(folder / f"a{i}", base, args.rank, TARGETS[args.targets], i) for i in range(args.adapters)]
    specs = [ModelSpec("base", str(base))]
    specs += [ModelSpec(path.name, str(path), kind="adapter", of="base") for path in paths]
    config = EngineConfig(prefix_cache=False, kv_memory=1 << 29)
    engines = {
        "compiled": Engine(load_models(specs, self_check=False), config),
        "eager": Engine(load_models(specs, compile=False, self_check=False), config),
    }
    prompts = prompts_of(args.streams, args.prompt, 1)

    def decode(engine: Engine, models: list[str]) -> Timing:
        programs = [Program.plain(model) for model in models]
        return engine_run(engine, programs, prompts, args.new_tokens)

    bare = ["base"] * args.streams
    mixed = [paths[i % len(paths)].name for i in range(args.streams)]
    sides = {f"{kind}, bare": lambda e=engine: decode(e, bare) for kind, engine in engines.items()}
    sides |= {f"{kind}, adapters": lambda e=engine: decode(e, mixed) for kind, engine in engines.items()}
    medians = {name: timing["step_ms"] for name, timing in interleave(sides, args.rounds).items()}
    over = {
        f"adapters ({a}) over bare ({b})": medians[f"{a}, adapters"] / medians[f"{b}, bare"]
        for a, b in (("compiled", "compiled"), ("eager", "eager"), ("eager", "compiled"))
    }
    runner = engines["eager"].runners["base"]
    weights = sum(p.nbytes for p in runner.model.parameters())  # type: ignore[attr-defined]
    memory = runner.loras.bytes() / weights  # type: ignore[attr-defined]
    return {"arguments": vars(args), "step_ms": medians, "ratios": over, "adapters' share of the base's bytes": memory}


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="330M")
    parser.add_argument("--targets", choices=TARGETS, default="all")
    for name, value in (("adapters", 8), ("rank", 8), ("streams", 16), ("prompt", 32), ("new_tokens", 24)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
