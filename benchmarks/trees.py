"""Would drafts as a tree beat a chain? Arithmetic on measured ranks and costs: `python -m benchmarks.trees`.

On greedy texts of the target, how often its token is the drafter's first, second, .. choice gives the chance that a
branch of a tree is the right one. Under independent positions, the best tree of n nodes takes the n likeliest paths
(as Sequoia, arXiv:2402.12374, and EAGLE-2, arXiv:2406.16858, grow theirs), and yields 1 + the sum of their chances a
pass. It costs a draft step per level, over that level's nodes, and a pass over n + 1 rows. The same for chains.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speculation import FAMILY, QUESTIONS, forward_seconds, peer, widened
from decoding.core import EngineConfig
from decoding.engine import Engine
from decoding.generate import load_models

WIDTH = 4  # choices of the drafter that a tree may try at one place


@torch.inference_mode()
def rank_shares(target: Any, drafter: Any, tokenizer: Any, length: int) -> list[float]:
    """How often the target's greedy token is the drafter's first, second, .. choice."""
    counts, total = [0] * WIDTH, 0
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer.encode(question + "\n\n", add_special_tokens=False)])
        text = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        logits = drafter(text).logits[0, ids.shape[1] - 1 : -1].float()  # [length, V]
        chosen = text[0, ids.shape[1] :, None]
        ranks = (logits > logits.gather(1, chosen)).sum(1)
        total += len(ranks)
        for i in range(WIDTH):
            counts[i] += int((ranks == i).sum())
    return [count / total for count in counts]


def best_tree(shares: Sequence[float], nodes: int) -> tuple[float, list[int]]:
    """Tokens a pass of the likeliest tree of `nodes` nodes, and how many of them each level has."""
    heap = [(-share, 1) for share in shares]
    heapq.heapify(heap)
    gain, levels = 1.0, [0] * (nodes + 1)
    for _ in range(nodes):
        chance, depth = heapq.heappop(heap)
        gain -= chance
        levels[depth] += 1
        for share in shares:
            heapq.heappush(heap, (chance * share, depth + 1))
    return gain, [count for count in levels if count]


def chain(shares: Sequence[float], nodes: int) -> tuple[float, list[int]]:
    """The same of a single chain."""
    return sum(shares[0] ** i for i in range(nodes + 1)), [1] * nodes


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", type=Path, default=FAMILY / "drafter", help="the distilled drafter")
    parser.add_argument("--parameters", type=int, default=300_000_000, help="size of the widened base")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens per text")
    parser.add_argument("--most", type=int, default=16, help="the largest tree")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
    drafter = AutoModelForCausalLM.from_pretrained(args.drafter, dtype="auto").eval()
    shares = rank_shares(peer(FAMILY / "base"), drafter, tokenizer, args.new_tokens)
    console = Console()
    console.print("the target's token is the drafter's choice 1, 2, ..:", [f"{share:.2f}" for share in shares])
    result: dict[str, Any] = {"rank_shares": shares}
    with tempfile.TemporaryDirectory() as folder:
        for pair in ("base", "widened"):
            path = FAMILY / "base"
            if pair == "widened":
                path = widened(path, Path(folder) / "widened", args.parameters)
            models = {"base": str(path), "drafter": str(args.drafter)}
            engine = Engine(load_models(models, self_check=False), EngineConfig(kv_memory=1 << 28, compile_from=0))
            target = {n: forward_seconds(engine, [("base", n + 1)])[0] for n in range(args.most + 1)}
            draft = {n: forward_seconds(engine, [("base", 1), ("drafter", n)])[1] for n in range(1, args.most + 1)}
            table = Table(
                "drafts", "chain", "tree", "levels of the tree", title=f"{pair}: speed-up over plain decoding"
            )
            rows: dict[str, list[float]] = {"chain": [], "tree": []}
            for nodes in range(1, args.most + 1):
                shapes = {"chain": chain(shares, nodes), "tree": best_tree(shares, nodes)}
                for name, (gain, levels) in shapes.items():
                    spent = target[nodes] + sum(draft[count] for count in levels)
                    rows[name].append(gain * target[0] / spent)
                table.add_row(str(nodes), *(f"{rows[name][-1]:.2f}" for name in shapes), str(shapes["tree"][1]))
            console.print(table)
            result[pair] = rows | {"target_ms": [1e3 * s for s in target.values()]}
            result[pair]["best"] = {name: max(values) for name, values in rows.items()}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
