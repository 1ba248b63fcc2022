"""What mixing and drawing cost beside the forwards, per tick: `python -m benchmarks.policies`.

Random logits in bf16, as flat as those of random models (the worst case for truncation), no forwards. Every case runs
many times, interleaved with the others; the least time is reported, for other jobs only ever add to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from decoding.core import Policy, Program, Request, Role, Sampling, Term
from decoding.hosting import Rows
from decoding.mix import mix
from decoding.plan import Sample
from decoding.sampling import verify
from decoding.state import Group, Sequence, Track
from decoding.strategies import STRATEGIES

NAMES = ("base", "expert", "anti", "other")
GREEDY = Sampling(temperature=0.0)
MIXES: dict[str, tuple[str, dict[str, object]]] = {
    "one model": ("plain", {}),
    "proxy-tuning": ("proxy_tuning", {"expert": "expert", "anti": "anti"}),
    "three models' log-probs": ("multi_objective", {}),
    "contrastive, plausibility 0.1": ("contrastive", {"amateur": "anti"}),
    "EFT, two tuned": ("emulated_fine_tuning", {"tuned": ["expert", "other"], "reference": "anti"}),
    "EFT, two tuned, top-p gate 0.9": (
        "emulated_fine_tuning",
        {"tuned": ["expert", "other"], "reference": "anti", "top_p": 0.9},
    ),
    "dynamic fusion, two experts": ("dynamic_fusion", {"experts": ["expert", "other"], "small": "anti"}),
}
DRAWS = {
    "greedy": GREEDY,
    "temperature 1": Sampling(),
    "temperature 1 with a seed": Sampling(seed=1),
    "top-k 50": Sampling(top_k=50),
    "top-p 0.9": Sampling(top_p=0.9),
    "top-p 0.9 with a seed": Sampling(top_p=0.9, seed=1),
    "min-p 0.1": Sampling(min_p=0.1),
    "log-probs, 5 best": replace(GREEDY, logprobs=5),
}


def samples_of(program: Program, sampling: Sampling, count: int, width: int) -> list[Sample]:
    """One row of each of `count` requests; row i of every model is the i-th request's."""
    terms = program.policy.terms
    models = list(program.models)
    of = tuple(models.index(term.role.model) for term in terms)
    request = Request("r", program, ((0,),) * len(terms), sampling, models[0], 1000, (1,))
    group = Group(request, 0, program.policy, of, width, 100)
    tracks = [Track(model, (0,), b"") for model in models]
    return [Sample(Sequence(group, i, (i,), tracks, None), -1, 1, [i] * len(models)) for i in range(count)]  # type: ignore[arg-type]


def cases(count: int, width: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    noise = torch.Generator().manual_seed(0)
    rows = {name: Rows((torch.randn(count, width, generator=noise) * 0.6).bfloat16()) for name in NAMES}
    starts = torch.zeros(width, dtype=torch.bool)
    found: dict[str, Callable[[], object]] = {}
    for title, (name, given) in MIXES.items():
        strategy = STRATEGIES[name]
        if name == "multi_objective":
            terms = tuple(Term(model, Role(model), 0.5) for model in ("base", "expert", "other"))
            program = Program(name, Policy(terms, logprobs=True))
        else:
            program = strategy.build(strategy.params(**given), "base")
        members = samples_of(program, GREEDY, count, width)
        found[f"mix: {title}"] = lambda members=members: mix(members, rows, lambda *_: None, lambda *_: starts)
    plain = STRATEGIES["plain"].build(STRATEGIES["plain"].params(), "base")
    z = rows["base"].logits.float()
    for title, sampling in DRAWS.items():
        owners = [sample.sequence for sample in samples_of(plain, sampling, count, width)]
        found[f"draw: {title}"] = lambda owners=owners: verify(z.clone(), owners, noise)
    found["(copy of the rows, in every draw)"] = z.clone
    return found


def least(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each case, the best of all rounds, after a warm-up."""
    best = dict.fromkeys(timed, float("inf"))
    for turn in range(rounds + 2):
        for title, case in timed.items():
            began = time.perf_counter()
            case()
            if turn >= 2:
                best[title] = min(best[title], 1e3 * (time.perf_counter() - began))
    return best


def main() -> None:
    """Parse flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--width", type=int, default=32000, help="vocabulary")
    parser.add_argument("--rounds", type=int, default=40, help="repetitions of every case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("per tick, ms", "1 row", "16 rows", title=f"vocabulary {args.width}, {args.threads} threads")
    with torch.inference_mode():
        columns = [least(cases(count, args.width), args.rounds) for count in (1, 16)]
    for title in columns[0]:
        table.add_row(title, *(f"{column[title]:.2f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
