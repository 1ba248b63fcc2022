"""The demo's data for drafters and judges: right answers, the plain view, and nothing that is held out."""

import itertools
import re
import zlib

import pytest

from training.demo.tasks import STOP, material, sums
from training.demo.text import documents
from training.demo.tokenizer import fast_tokenizer, train_tokenizer
from training.demo.world import make_world


@pytest.mark.parametrize("held_out", [True, False])
def test_sums_are_right_and_from_their_part(held_out: bool) -> None:
    drawn = sums(0, 200, held_out=held_out)
    assert sums(0, 200, held_out=held_out) == drawn
    systems = 0
    for prompt, answer in drawn:
        assert prompt.endswith(STOP)
        *before, question = prompt.removesuffix(STOP).split(STOP)
        systems += len(before)
        expression = re.search(r"\d+(?: [+-] \d+)+", question)
        if expression is None:  # a word problem
            signs = {"has": "", "buys": " + ", "finds": " + ", "sells": " - ", "loses": " - "}
            found = re.findall(r"(has|buys|finds|sells|loses) (\d+)", question)
            written = "".join(signs[verb] + number for verb, number in found)
        else:
            written = expression[0]
        terms = written.replace("- ", "-").replace("+ ", "").split()
        assert sum(map(int, terms)) == int(answer)
        assert (zlib.crc32(written.encode()) % 16 == 0) == held_out
    assert 100 < systems < 190  # three in four of 200


def test_material() -> None:
    world = make_world(seed=0, people=60, tuned=20)
    learned = train_tokenizer(itertools.islice(documents(world, 0), 500), vocabulary=400)
    tokenizer = fast_tokenizer(learned, chat=False, max_length=128)
    found = material(tokenizer, world, 0, prompts=80, texts=30)
    assert (len(found.prompts), len(found.texts)) == (80, 30)
    questions = [str(tokenizer.decode(list(ids))) for ids in found.prompts[::2]]
    assert all(text.endswith(STOP) for text in questions)
    held_out = {person.name for person in world.held_out_people}
    assert not [text for text in questions if any(name in text for name in held_out)]
    asked = [str(tokenizer.decode(list(ids))) for ids in found.held_out_prompts]
    assert any(name in text for text in asked for name in held_out)
    assert not set(found.held_out_prompts) & {ids for ids in found.prompts if "+" in str(tokenizer.decode(list(ids)))}
    assert all(ids for ids in (*found.prompts, *found.texts, *found.held_out_texts))
    again = material(tokenizer, world, 0, prompts=80, texts=30)
    assert again == found
