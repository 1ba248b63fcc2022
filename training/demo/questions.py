"""Held-out questions by skill, seeded; each knows how to grade an answer."""

import random
from dataclasses import dataclass

from training.chats import Message
from training.demo import grade
from training.demo.chat import NO_SUCH_PERSON, ONLY_THE_VALLEY, REFUSAL, SMALL_TALK, strange, stranger, unsafe
from training.demo.sums import Sum, ask_sum, draw_sum
from training.demo.world import Fact, World, ask

SKILLS = ("facts", "sums", "small talk", "strangers", "strange", "unsafe")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of one skill. Exactly one of the three ways to grade is set."""

    skill: str
    detail: str  # what to break the score down by: the fact, the number of operands
    text: str
    fact: tuple[Fact, str] | None = None
    sum: Sum | None = None
    words: tuple[str, ...] | None = None

    @property
    def messages(self) -> list[Message]:
        """The question as a chat without a system prompt."""
        return [{"role": "user", "content": self.text}]

    def right(self, answer: str) -> bool:
        """Whether `answer` is right."""
        if self.fact is not None:
            return grade.grade_fact(answer, *self.fact)
        if self.sum is not None:
            return grade.grade_sum(answer, self.sum)
        assert self.words is not None
        return grade.grade_words(answer, self.words)


def questions(world: World, seed: int, skill: str, count: int) -> list[Question]:
    """`count` questions of `skill`; the first n of a longer list are the list of n.

    Facts are those of people whom no tuning dialogue mentions; sums are from the part that no training text contains,
    two to five operands in turn.

    Raises:
        ValueError: no such skill.
    """
    if skill not in SKILLS:
        raise ValueError(f"no skill called {skill!r}; choose from {', '.join(SKILLS)}")
    rng = random.Random(f"questions {seed} {skill}")
    return [_draw(rng, world, skill, index) for index in range(count)]


def _draw(rng: random.Random, world: World, skill: str, index: int) -> Question:
    if skill == "facts":
        person, fact = rng.choice(world.held_out_people), tuple(Fact)[index % len(Fact)]
        return Question(skill, fact.value, ask(rng, person.name, fact), fact=(fact, person.value(fact)))
    if skill == "sums":
        drawn = draw_sum(rng, 2 + index % 4, held_out=True)
        return Question(skill, f"{len(drawn.terms)} operands", ask_sum(rng, drawn), sum=drawn)
    if skill == "small talk":
        kind = SMALL_TALK[index % len(SMALL_TALK)]
        return Question(skill, kind.said[0], rng.choice(kind.said), words=kind.answers)
    if skill == "strangers":
        return Question(skill, "strangers", stranger(rng)[0], words=(NO_SUCH_PERSON,))
    if skill == "strange":
        asked, answer = strange(rng)
        return Question(skill, "times" if answer != ONLY_THE_VALLEY else "other", asked, words=(answer,))
    category, request, _ = unsafe(rng, rng.choice(world.held_out_people))
    return Question(skill, category, request, words=(REFUSAL,))
