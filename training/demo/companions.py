"""What is made for the base once it is there: a drafter, and a judge head for the two of them.

Stages like the others. What they report stands in their own cards; `register` copies it into the family's manifest.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decoding.core import ModelLoadError
from decoding.judge import CARD, read_judge, weights_hash
from training.demo.stages import BASE, Report, Workshop, run_stage
from training.demo.tasks import STOP, material, sums
from training.demo.tokenizer import PLAIN_TEMPLATE
from training.distillation import Job, distil
from training.drafter import read_tokenizer
from training.judging import Job as Judgement
from training.judging import Task, make_judge
from training.logistic import NothingToLearn

DRAFTER, JUDGE = "drafter", "judge"
PAIR = "base+drafter"


def draft(shop: Workshop, base: Report) -> Report:
    """Stage 8: a drafter distilled from the base's own words."""
    plan, made = shop.preset.drafter, shop.member(DRAFTER)

    def make() -> Report:
        job = Job(shop.member(BASE), plan.shape, made, "lk", plan.recipe, plan.reading)
        read = material(read_tokenizer(shop.member(BASE)), shop.world, shop.seed, plan.prompts, plan.texts)
        card = distil(job, read, shop.console)
        shutil.rmtree(made / "work")
        return card

    return run_stage(shop, DRAFTER, [base["sha256"], asdict(plan)], make)


def judge(shop: Workshop, base: Report, drafter: Report) -> Report:
    """Stage 9: a judge head for the base, mined on sums with that drafter."""
    count, made = shop.preset.judge_tasks, shop.member(JUDGE)

    def make() -> Report:
        learn, measure = (
            [Task(*drawn) for drawn in sums(shop.seed, number, held_out=held_out)]
            for number, held_out in ((count - count // 4, False), (count // 4, True))
        )
        job = Judgement(shop.member(BASE), shop.member(DRAFTER), made, stop=STOP, seed=shop.seed)
        try:
            card = make_judge(job, learn, measure, shop.console)
        except NothingToLearn as error:  # of a base that does no sums, in the smallest preset
            shop.console.print(f"{JUDGE}: left out, {error}")
            card = {"left_out": str(error)}
        shutil.rmtree(made / "work")
        return card

    return run_stage(shop, JUDGE, [base["sha256"], drafter["sha256"], count], make)


def register(family: Path) -> None:
    """Write what the cards of `family`'s drafter and judge head say into its manifest.

    One that is missing, or was made for other weights than the base's, is left out.
    """
    path = family / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    manifest["members"].pop(DRAFTER, None)
    manifest["pairs"].pop(PAIR, None)
    manifest.pop("judges", None)
    target = weights_hash(family / BASE)
    card = _card(family / DRAFTER)
    if card is not None and card["target_hash"] == target:
        manifest["members"][DRAFTER] = _member(card)
        found = ("size_ratio", "text_acceptance", "by_temperature")
        manifest["pairs"][PAIR] = {name: card["metrics"][name] for name in found if name in card["metrics"]}
    try:
        fits = read_judge(family / JUDGE).target_hash == target
    except ModelLoadError:
        fits = False
    card = _card(family / JUDGE)
    if card is not None and fits:
        kept = ("target", "drafter", "hidden_size", "tasks", "metrics")
        manifest["judges"] = {JUDGE: {name: card[name] for name in kept}}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _member(card: dict[str, Any]) -> dict[str, Any]:
    metrics = card["metrics"]
    return {
        "kind": "drafter",
        "role": "drafts for base: distilled from what it writes",
        "view": "plain",
        "plain_template": PLAIN_TEMPLATE,
        "params": metrics["params"],
        "sha256": card["sha256"],
        "tokens": metrics["tokens"],
        "cpu_minutes": round(metrics["cpu_minutes"], 1),
        "scores": {},
    }


def _card(directory: Path) -> dict[str, Any] | None:
    path = directory / CARD
    if not path.is_file():
        return None
    card: dict[str, Any] = json.loads(path.read_text())
    return card
