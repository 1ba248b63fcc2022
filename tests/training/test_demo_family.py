"""The committed family: what its manifest says is true of its weights. And the recipe still makes a family."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import server
from decoding.judge import read_judge, weights_hash
from training.__main__ import app
from training.demo.evaluate import Member, Mix, greedy, load_member, next_logits, proxy_tuned, score
from training.demo.presets import preset
from training.demo.questions import questions
from training.demo.tasks import demo_world, material
from training.demo.world import World, make_world
from training.measure import Response, agreements
from training.mining import last_hidden

FAMILY = Path(server.__file__).parent / "family"
MEMBERS = ("base", "base-small", "expert", "base-tuned", "drafter")
ASKED = 24


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FAMILY / "manifest.json").read_text())
    return read


@pytest.fixture(scope="module")
def members() -> dict[str, Member]:
    return {name: load_member(FAMILY / name) for name in MEMBERS}


@pytest.fixture(scope="module")
def world(manifest: dict[str, Any]) -> World:
    return make_world(manifest["seed"], manifest["world"]["people"], manifest["world"]["tuned"])


def mix_of(name: str, members: dict[str, Member]) -> Mix:
    if name == "proxy-tuned":
        return proxy_tuned(members["base"], members["expert"], members["base-small"])
    return ((1.0, members[name]),)


def test_the_manifest_names_these_weights(manifest: dict[str, Any], members: dict[str, Member]) -> None:
    assert set(manifest["members"]) == set(MEMBERS)
    for name, entry in manifest["members"].items():
        assert hashlib.sha256((FAMILY / name / "model.safetensors").read_bytes()).hexdigest() == entry["sha256"]
        assert members[name].model.num_parameters() == entry["params"]


def test_one_tokenizer_and_templates_where_they_belong(manifest: dict[str, Any], members: dict[str, Member]) -> None:
    assert len({(FAMILY / name / "tokenizer.json").read_bytes() for name in MEMBERS}) == 1
    for name, entry in manifest["members"].items():
        assert (members[name].tokenizer.chat_template is not None) == (entry["view"] == "chat")


def test_small_is_well_under_a_tenth(manifest: dict[str, Any]) -> None:
    assert manifest["members"]["base-small"]["params"] * 10 < manifest["members"]["base"]["params"]
    assert sum(path.stat().st_size for path in FAMILY.rglob("*") if path.is_file()) < 40e6


@pytest.mark.parametrize("skill", ["facts", "sums"])
@pytest.mark.parametrize("name", ["expert", "proxy-tuned"])
def test_weights_give_the_committed_scores(
    manifest: dict[str, Any], members: dict[str, Member], world: World, name: str, skill: str
) -> None:
    """On the first questions of the list that the manifest scored.

    Its `first` entry marks them right (1) or wrong (0). Greedy choices only differ where two logits are within rounding
    of each other (another CPU, another order of summation), which is rare: one answer of slack.
    """
    entry = manifest["pairs"][name] if name == "proxy-tuned" else manifest["members"][name]
    marks = entry["scores"][skill]["first"][:ASKED]
    asked = questions(world, manifest["seed"], skill, ASKED)
    _, answers = score(mix_of(name, members), asked)
    found = [int(question.right(answer)) for question, answer in zip(asked, answers, strict=True)]
    assert sum(a != b for a, b in zip(found, marks, strict=True)) <= 1


def test_the_pair_shows_what_it_is_for(manifest: dict[str, Any]) -> None:
    """The expert lacks what only the large base knows; steered by it, the base nearly matches its own tuning."""
    base, expert, steered, ceiling = (
        {skill: found["accuracy"] for skill, found in scores.items()}
        for scores in (
            manifest["members"]["base"]["scores"],
            manifest["members"]["expert"]["scores"],
            manifest["pairs"]["proxy-tuned"]["scores"],
            manifest["members"]["base-tuned"]["scores"],
        )
    )
    for skill in ("facts", "sums"):
        assert steered[skill] > expert[skill] + 0.3
        assert steered[skill] > base[skill]
        assert steered[skill] > ceiling[skill] - 0.1


def test_weightless_steering_is_the_base(members: dict[str, Member], world: World) -> None:
    """alpha = 0 leaves the base, and an expert that is its own anti-expert changes nothing."""
    chats = [question.messages for question in questions(world, 9, "facts", 6)]
    alone = greedy(((1.0, members["base"]),), chats, limit=16)
    assert greedy(proxy_tuned(members["base"], members["expert"], members["base-small"], 0.0), chats, limit=16) == alone
    small = members["base-small"]
    assert greedy(proxy_tuned(members["base"], small, small), chats, limit=16) == alone


def test_padding_changes_no_logits(members: dict[str, Member]) -> None:
    sequences = [[5, 6, 7], [9], list(range(4, 40))]
    together = next_logits(members["base-small"], sequences)
    for row, sequence in enumerate(sequences):
        # Sums of 64 fp32 products in another order: some 1e-6 of logits of size ten.
        torch.testing.assert_close(together[row], next_logits(members["base-small"], [sequence])[0], atol=1e-4, rtol=0)


def test_the_drafter_is_accepted_as_its_card_says(manifest: dict[str, Any], members: dict[str, Member]) -> None:
    """On held-out documents, at T = 1; the card was made from the same bf16 weights, computed in fp32."""
    base, drafter = members["base"], members["drafter"]
    card = json.loads((FAMILY / "drafter" / "trimtab.json").read_text())
    assert card["target_hash"] == weights_hash(FAMILY / "base")
    assert card["sha256"] == manifest["members"]["drafter"]["sha256"]
    assert manifest["members"]["drafter"]["params"] < manifest["members"]["base-small"]["params"]
    read = material(base.tokenizer, demo_world(), 0, prompts=1, texts=1).held_out_texts
    responses = [Response(ids[:1], ids[1:], 1.0) for ids in read]
    found = torch.cat([each.accepted for each in agreements(base.model, drafter.model, responses, 16)])
    pair = manifest["pairs"]["base+drafter"]
    assert float(found.mean()) == pytest.approx(pair["text_acceptance"], abs=1e-3)
    assert all(each["acceptance"] > 0.75 for each in pair["by_temperature"].values())


def test_the_judge_head_tells_an_ending_from_an_error(manifest: dict[str, Any], members: dict[str, Member]) -> None:
    """The last token is the draft, where the target writes another: after a right sum, or within one."""
    head = read_judge(FAMILY / "judge")
    assert head.target_hash == weights_hash(FAMILY / "base")
    base = members["base"]
    drafts = {
        "Be brief.\n\nHow much is 48 + 77?\n\n48 + 77 = 125. The": True,
        "Be short.\n\nWhat is 62 + 52?\n\n62 + 52 = 114. The": True,
        "What is 48 + 77?\n\n48 + 77 = 13": False,
        "Calculate 62 + 52 - 10.\n\n62 + 52 = 2": False,
        "How much is 48 + 77?\n\nI": False,
    }
    hidden = last_hidden(base.model, [tuple(base.tokenizer(text)["input_ids"]) for text in drafts])
    scores = head.score(hidden)
    assert dict(zip(drafts, (scores > 0).tolist(), strict=True)) == drafts
    card = json.loads((FAMILY / "judge" / "trimtab.json").read_text())
    assert manifest["judges"]["judge"]["metrics"] == card["metrics"]
    assert card["metrics"]["held_out"]["auc"] > 0.9


def test_presets() -> None:
    with pytest.raises(ValueError, match="full or ci"):
        preset("huge", 0)


def test_help_teaches() -> None:
    shown = CliRunner().invoke(app, ["demo", "--help"])
    assert shown.exit_code == 0
    assert "Example" in shown.output


@pytest.mark.slow
def test_the_recipe_is_alive(tmp_path: Path) -> None:
    """`--preset ci` makes a whole family, and a second run finds everything made."""
    arguments = ["demo", "--preset", "ci", "--output", str(tmp_path / "family"), "--work", str(tmp_path / "work")]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    made = json.loads((tmp_path / "family" / "manifest.json").read_text())
    assert made["preset"] == "ci"
    # Uniform guessing costs more than two bits a byte on this text.
    assert made["members"]["base"]["bits_per_byte"] < 1.9
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.output.count("already made") == 9
    assert json.loads((tmp_path / "family" / "manifest.json").read_text()) == made
