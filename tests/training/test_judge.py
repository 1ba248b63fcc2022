"""`judge`: what it writes, that its labels are true of the target, that a kill costs nothing, what it refuses."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from decoding.judge import read_judge, weights_hash
from tests.fakes import byte_tokenizer
from tests.training.small import invoke, lines, refused, texts
from training import judging
from training.__main__ import app
from training.chats import Ids
from training.mining import GRADERS, Answers

LONGEST = 16


class Judged(NamedTuple):
    """A drafter, tasks, and the judge head made of both."""

    drafter: Path
    tasks: Path
    output: Path


@pytest.fixture(scope="module")
def judged(target: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    directory = tmp_path_factory.mktemp("judge")
    tasks = lines(directory / "tasks.jsonl", [{"prompt": text[:9], "answer": "1"} for text in texts(5, 40)])
    made = Judged(other, tasks, directory / "made")
    assert "labels" in invoke(*command(target, made))
    return made


def command(target: Path, made: Judged, longest: int = LONGEST) -> tuple[object, ...]:
    return (
        "judge", "--target", target, "--drafter", made.drafter, "--data", made.tasks, "--output", made.output,
        "--max-tokens", longest,
    )  # fmt: skip


def test_judge_from_the_command_line(target: Path, judged: Judged) -> None:
    head = read_judge(judged.output)
    assert head.weight.shape == (32,)
    assert head.target_hash == weights_hash(target)
    card = json.loads((judged.output / "trimtab.json").read_text())
    assert card["hidden_size"] == 32
    assert card["drafter_hash"] == weights_hash(judged.drafter)
    assert card["tasks"] == {"training": 30, "held_out": 10}
    assert 0 < card["metrics"]["important"]["held_out"] < card["metrics"]["labels"]["held_out"]
    # What was drafted, a digit or a letter, is plain to see in the hidden state.
    assert card["metrics"]["held_out"]["auc"] > 0.95
    assert card["metrics"]["held_out"]["recall_important"] > 0.9
    assert 0 < card["metrics"]["target_accuracy"] < 1  # answers of sixteen tokens end with any digit


def test_digits_matter_and_letters_do_not(judged: Judged) -> None:
    labels = [
        (chr(context[-1]), accept)
        for line in (judged.output / "work" / "labels-training.jsonl").read_text().splitlines()[1:]
        for context, accept in json.loads(line)["labels"]
    ]
    assert {token for token, _ in labels} >= set("0123b")
    assert sum(token.isdigit() != accept for token, accept in labels) > 0.95 * len(labels)


def test_every_label_is_true_of_the_target(target: Path, judged: Judged) -> None:
    """Labels again, by plain greedy decoding of the target."""
    model = LlamaForCausalLM.from_pretrained(target, dtype="auto").eval()
    tokenizer = byte_tokenizer()
    answers = Answers(
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        GRADERS["last-number"],
        frozenset({256}),
        max_tokens=LONGEST,
    )

    def finished(prompt: Ids, answer: Ids) -> str | None:
        while not answers.over(answer):
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]
            answer = (*answer, int(logits.argmax()))
        return answers.final(answer)

    asked = [json.loads(line)["prompt"] for line in judged.tasks.read_text().splitlines()]
    stored = (judged.output / "work" / "labels-training.jsonl").read_text().splitlines()[1:]
    checked = wrong = 0
    for text, line in zip(asked[10:], stored, strict=True):  # the first quarter is held out
        prompt = tuple(tokenizer(text)["input_ids"])
        wanted = finished(prompt, ())
        for context, accept in json.loads(line)["labels"][:3]:
            assert tuple(context[: len(prompt)]) == prompt
            wrong += (finished(prompt, tuple(context[len(prompt) :])) == wanted) != accept
            checked += 1
    assert checked > 20
    assert wrong <= checked // 20  # bf16 logits tie now and then, and two orders of summation break ties differently


def test_a_killed_judge_goes_on(target: Path, judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = judged._replace(output=tmp_path)
    mine, calls = judging.mine, []

    def twice(*arguments: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return mine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "mine", twice)
        patch.setattr(judging, "_AT_ONCE", 8)
        assert CliRunner().invoke(app, [str(each) for each in command(target, made)]).exit_code != 0
    assert len((tmp_path / "work" / "labels-training.jsonl").read_text().splitlines()) == 1 + 16
    invoke(*command(target, made))
    for name in ("judge.safetensors", "work/labels-training.jsonl", "work/labels-held-out.jsonl"):
        assert (tmp_path / name).read_bytes() == (judged.output / name).read_bytes()
    assert "other settings" in refused(*command(target, made, LONGEST - 1))


def test_what_judge_refuses(target: Path, judged: Judged, tmp_path: Path) -> None:
    common = ("judge", "--target", target, "--output", tmp_path / "out")
    given = (*common, "--drafter", judged.drafter)
    assert "no grader called 'llm'" in refused(*given, "--data", judged.tasks, "--grader", "llm")
    few = lines(tmp_path / "few.jsonl", [{"prompt": "a", "answer": 1}])
    assert "too few" in refused(*given, "--data", few)
    bad = lines(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"question": "b"}])
    assert "line 2" in refused(*given, "--data", bad)
    assert "is no file" in refused(*given, "--data", tmp_path / "none")
    odd = tmp_path / "odd"
    LlamaForCausalLM.from_pretrained(judged.drafter).save_pretrained(odd)
    byte_tokenizer(extra=3).save_pretrained(odd)
    assert "another tokenizer" in refused(*common, "--drafter", odd, "--data", judged.tasks)


@pytest.mark.parametrize("name", ["distill", "judge"])
def test_help_teaches(name: str) -> None:
    shown = invoke(name, "--help")
    assert "Example" in shown
    assert "killed" in shown
