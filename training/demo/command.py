"""`python -m training demo`: make the embedded family."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from decoding.judge import CARD
from training.demo import companions, stages
from training.demo.manifest import copy_member, evaluate_family, publish
from training.demo.presets import preset as find_preset


def demo(
    preset: Annotated[
        str, typer.Option(help="full (about 40 minutes on two cores) or ci (under two minutes).")
    ] = "full",
    output: Annotated[Path, typer.Option(help="Where the members and manifest.json are written.")] = Path(
        "server/family"
    ),
    seed: Annotated[int, typer.Option(help="Seeds the world, the text, the weights and the order of rows.")] = 0,
    work: Annotated[
        Path, typer.Option(help="Text, checkpoints and finished stages; kept, so that a killed run resumes.")
    ] = Path("build/demo"),
) -> None:
    """Make the embedded family: tokenizer, bases, tuned members, a drafter and a judge head for the base, scores.

    Run it again after a kill: finished stages are skipped and the one that was cut off continues from its last
    checkpoint.

    Example: python -m training demo --preset ci --output build/family
    """
    console = Console()
    chosen = find_preset(preset, seed)
    directory = work / f"{preset}-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    shop = stages.Workshop(chosen, seed, directory, console)
    tokenizer = stages.make_tokenizer(shop)
    text = stages.make_text(shop, tokenizer)
    base = stages.pretrain(shop, stages.BASE, chosen.base, chosen.base_recipe, text)
    small = stages.pretrain(shop, stages.SMALL, chosen.small, chosen.small_recipe, text)
    expert = stages.tune(shop, stages.EXPERT, stages.SMALL, chosen.expert_recipe, small, text)
    base_tuned = stages.tune(shop, stages.BASE_TUNED, stages.BASE, chosen.base_tuned_recipe, base, text)
    members = {stages.BASE: base, stages.SMALL: small, stages.EXPERT: expert, stages.BASE_TUNED: base_tuned}
    drafter = companions.draft(shop, base)
    companions.judge(shop, base, drafter)
    weights = [report["sha256"] for report in members.values()]
    evaluation = stages.run_stage(shop, "scores", [weights, chosen.questions], lambda: evaluate_family(shop))
    publish(shop, output, {"text": text, **members}, evaluation)
    for name in (companions.DRAFTER, companions.JUDGE):
        if (shop.member(name) / CARD).is_file():
            copy_member(shop, output, name)
    companions.register(output)
