"""The seeded world: same seed, same text; what must be kept apart is."""

import itertools

import pytest

from training.demo.dialogues import conversations
from training.demo.questions import SKILLS, questions
from training.demo.sums import draw_sum
from training.demo.text import documents
from training.demo.words import FIRST, JOBS, LAST, PETS, TOWNS
from training.demo.world import Fact, World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(seed=3, people=200, tuned=50)


def test_same_seed_same_text(world: World) -> None:
    again = make_world(seed=3, people=200, tuned=50)
    assert again == world
    assert list(itertools.islice(documents(again, 5), 300)) == list(itertools.islice(documents(world, 5), 300))
    assert list(itertools.islice(conversations(again, 5), 100)) == list(itertools.islice(conversations(world, 5), 100))
    for skill in SKILLS:
        assert questions(again, 5, skill, 20) == questions(world, 5, skill, 20)


def test_other_seed_or_part_other_text(world: World) -> None:
    first = list(itertools.islice(documents(world, 5), 20))
    assert list(itertools.islice(documents(world, 6), 20)) != first
    assert list(itertools.islice(documents(world, 5, "held out"), 20)) != first
    assert make_world(seed=4, people=200, tuned=50).people != world.people


def test_fewer_questions_are_the_first_of_more(world: World) -> None:
    for skill in SKILLS:
        assert questions(world, 0, skill, 40)[:10] == questions(world, 0, skill, 10)


def test_words_are_distinct() -> None:
    for words in (FIRST, LAST, TOWNS, JOBS, PETS):
        assert len(set(words)) == len(words)


def test_full_world_uses_every_pair_of_names() -> None:
    assert len({person.name for person in make_world(0, len(FIRST) * len(LAST), 10).people}) == len(FIRST) * len(LAST)


def test_too_many_people_are_refused() -> None:
    with pytest.raises(ValueError, match="people"):
        make_world(0, len(FIRST) * len(LAST) + 1, 10)


def test_dialogues_never_mention_held_out_people(world: World) -> None:
    held_out = [person.name for person in world.held_out_people]
    said = " ".join(message["content"] for chat in itertools.islice(conversations(world, 0), 500) for message in chat)
    assert not [name for name in held_out if name in said]
    assert any(person.name in said for person in world.tuning_people)


def test_held_out_sums_are_in_no_training_text(world: World) -> None:
    text = "\n".join(itertools.islice(documents(world, 0), 3000))
    asked = [question.sum for question in questions(world, 0, "sums", 200)]
    assert all(found is not None and found.held_out for found in asked)
    # Two operands also occur as a step of a longer sum, which the hash does not cover; three or more never do.
    assert not [
        found.expression for found in asked if found and len(found.terms) > 2 and f"{found.expression}?" in text
    ]


def test_steps_lead_to_the_answer() -> None:
    import random

    rng = random.Random(0)
    for operands in (2, 3, 4, 5):
        for _ in range(100):
            drawn = draw_sum(rng, operands)
            steps = drawn.steps()
            assert len(steps) == operands - 1
            for step in steps:
                left, _, right = step.removesuffix(".").partition(" = ")
                a, sign, b = left.split()
                assert int(a) + (int(b) if sign == "+" else -int(b)) == int(right)
            assert steps[-1].endswith(f"= {drawn.answer}.")
            assert 0 <= drawn.answer <= 999


def test_bases_see_questions_with_mostly_other_continuations(world: World) -> None:
    """About a quarter right answers: enough to know, too few to answer by habit."""
    text = "\n\n".join(itertools.islice(documents(world, 1), 20_000)).split("\n\n")
    right = total = 0
    by_name = {person.name: person for person in world.people}
    for asked, then in itertools.pairwise(text):
        if asked.startswith("Where does ") and asked.endswith(" live?"):
            person = by_name.get(asked[len("Where does ") : -len(" live?")])
            if person is not None:
                total += 1
                right += person.home in then and "I do not know" not in then
    assert total > 200
    assert 0.15 < right / total < 0.40


def test_every_fact_is_read(world: World) -> None:
    text = "\n".join(itertools.islice(documents(world, 2), 8000))
    missing = [person for person in world.people for fact in Fact if person.sentence(fact) not in text]
    assert not missing
