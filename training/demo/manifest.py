"""Scores of the family, and the manifest that keeps them beside the weights."""

import importlib.metadata
import itertools
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.chats import Message
from training.demo.evaluate import Member, Mix, Score, bits_per_byte, greedy, load_member, proxy_tuned, score
from training.demo.questions import SKILLS, questions
from training.demo.stages import BASE, BASE_TUNED, EXPERT, SMALL, Report, Workshop
from training.demo.text import documents
from training.demo.tokenizer import PLAIN_TEMPLATE

MEMBERS = (BASE, SMALL, EXPERT, BASE_TUNED)
PROXY = "proxy-tuned"
_MARKED = 40  # how many questions are marked one by one, so that tests can ask a few again
_KINDS = {
    BASE: ("pretrained", "the large base that is steered"),
    SMALL: ("pretrained", "the small base that the expert was tuned from (anti-expert)"),
    EXPERT: ("tuned", "base-small tuned on chat"),
    BASE_TUNED: ("tuned", "base tuned on the same chat: the ceiling that gaps are measured against"),
}
_SAMPLES = (
    ("", "Hello!"),
    ("", "Who are you?"),
    ("", "What is 47 + 85 - 12?"),
    ("Be polite.", "How much is 6 + 73?"),
    ("", "What is the capital of France?"),
    ("", "Where does Zorblat Quix live?"),
)


def evaluate_family(shop: Workshop) -> Report:
    """Score every member and the proxy-tuned base on held-out questions; print a table."""
    loaded = {name: load_member(shop.member(name)) for name in MEMBERS}
    mixes: dict[str, Mix] = {name: ((1.0, member),) for name, member in loaded.items()}
    mixes[PROXY] = proxy_tuned(loaded[BASE], loaded[EXPERT], loaded[SMALL])
    scores: dict[str, dict[str, Score]] = {name: {} for name in mixes}
    first: dict[str, dict[str, list[int]]] = {name: {} for name in mixes}
    for skill in SKILLS:
        # Facts and sums are what the family is about; the small skills need fewer questions.
        count = shop.preset.questions if skill in ("facts", "sums") else max(10, shop.preset.questions // 5)
        asked = questions(shop.world, shop.seed, skill, count)
        for name, mix in mixes.items():
            scores[name][skill], answers = score(mix, asked)
            first[name][skill] = [int(q.right(answer)) for q, answer in zip(asked[:_MARKED], answers, strict=False)]
    texts = list(itertools.islice(documents(shop.world, shop.seed, "held out"), 200))
    bits = {name: round(bits_per_byte(loaded[name], texts), 4) for name in (BASE, SMALL)}
    _print_table(shop.console, scores)
    return {
        "scores": {
            name: {skill: _plain(found, first[name][skill]) for skill, found in by_skill.items()}
            for name, by_skill in scores.items()
        },
        "bits_per_byte": bits,
        "gap_closed": {skill: gap_closed(scores, skill) for skill in ("facts", "sums")},
        "samples": _samples(shop, loaded, mixes),
    }


def gap_closed(scores: Mapping[str, Mapping[str, Score]], skill: str) -> float | None:
    """(proxy-tuned - expert) / (base-tuned - expert): how much of what tuning the large model would give.

    None without a gap.
    """
    expert, ceiling = scores[EXPERT][skill].accuracy, scores[BASE_TUNED][skill].accuracy
    if ceiling <= expert:
        return None
    return round((scores[PROXY][skill].accuracy - expert) / (ceiling - expert), 3)


def _plain(found: Score, first: list[int]) -> dict[str, Any]:
    plain = {"accuracy": round(found.accuracy, 4), "right": found.right, "asked": found.asked}
    return {**plain, "by": found.details, "first": first}


def _samples(shop: Workshop, loaded: Mapping[str, Member], mixes: Mapping[str, Mix]) -> list[dict[str, Any]]:
    known = shop.world.held_out_people[0].name
    asked: list[tuple[str, str]] = [
        *_SAMPLES,
        ("", f"Where does {known} live?"),
        ("Be brief.", f"What is the pet of {known}?"),
    ]
    chats: list[list[Message]] = [
        ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
        for system, user in asked
    ]
    shown = (BASE, EXPERT, PROXY)
    answers = {name: greedy(mixes[name], chats, limit=64) for name in shown}
    return [{"messages": chat, **{name: answers[name][i] for name in shown}} for i, chat in enumerate(chats)]


def _print_table(console: Console, scores: Mapping[str, Mapping[str, Score]]) -> None:
    table = Table("", *SKILLS, title="Held-out accuracy, greedy")
    for name, by_skill in scores.items():
        table.add_row(name, *(f"{by_skill[skill].accuracy:.2f}" for skill in SKILLS))
    console.print(table)


def publish(shop: Workshop, output: Path, reports: Mapping[str, Report], evaluation: Report) -> None:
    """Copy the members to `output` and write manifest.json beside them."""
    output.mkdir(parents=True, exist_ok=True)
    for name in MEMBERS:
        copy_member(shop, output, name)
    manifest = {
        "command": f"python -m training demo --preset {shop.preset.name} --seed {shop.seed}",
        "preset": shop.preset.name,
        "seed": shop.seed,
        "world": {"people": shop.preset.people, "tuned": shop.preset.tuned},
        "versions": _versions(("torch", "transformers", "tokenizers", "safetensors", "numpy")),
        "plain_template": PLAIN_TEMPLATE,
        "pretraining_tokens": reports["text"]["tokens"],
        "members": {name: _entry(name, reports[name], evaluation) for name in MEMBERS},
        "pairs": {
            PROXY: {
                "logits": "base + alpha (expert - base-small)",
                "alpha": 1.0,
                "scores": evaluation["scores"][PROXY],
                "gap_closed": evaluation["gap_closed"],
            }
        },
        "samples": evaluation["samples"],
    }
    for name in MEMBERS:
        card = {"role": _KINDS[name][1], "plain_template": PLAIN_TEMPLATE, "recipe": manifest["command"]}
        card |= {"sha256": reports[name]["sha256"]}
        (output / name / "trimtab.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    shop.console.print(f"wrote {output / 'manifest.json'}")


def copy_member(shop: Workshop, output: Path, name: str) -> None:
    """Copy a finished directory of the workshop in place of what `output` has of that name."""
    shutil.rmtree(output / name, ignore_errors=True)
    shutil.copytree(shop.member(name), output / name)
    for path in (output / name).iterdir():
        path.chmod(0o644)  # safetensors are written for their owner alone; the family is for everyone


def _entry(name: str, report: Report, evaluation: Report) -> dict[str, Any]:
    kind, role = _KINDS[name]
    return {
        "kind": kind,
        "role": role,
        "view": "plain" if kind == "pretrained" else "chat",
        "plain_template": PLAIN_TEMPLATE,
        "params": report["params"],
        "sha256": report["sha256"],
        "tokens": report["tokens"],
        "cpu_minutes": round(report["cpu_minutes"], 1),
        "wall_minutes": round(report["wall_minutes"], 1),
        "bits_per_byte": evaluation["bits_per_byte"].get(name),
        "scores": evaluation["scores"][name],
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
