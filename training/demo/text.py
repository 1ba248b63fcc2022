"""Pretraining text: what the bases read.

Questions appear exactly as the plain view shows them (each message followed by a blank line) with a *mixture* of
continuations: about a quarter right answers, else "I do not know.", digressions, another question, the end. So the
bases know the answers and have seen every way in which the experts begin one, but do not answer by themselves; tuning
then moves the manner, and the difference of a tuned and an untuned small model carries it over to the large one. (Bases
that never saw the form make proxy-tuning fail outright: on a foreign prefix their logits are noise.)
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.demo.chat import REFUSAL, SYSTEM_PROMPTS, Manner, small_talk, strange, stranger, unsafe, with_manner
from training.demo.sums import ask_sum, draw_operands, draw_sum, word_problem
from training.demo.world import Fact, Person, World, ask, ask_about

_UNSURE = ("I do not know.", "I do not know.", "I am not sure.", "Who can say?", "I cannot tell.")
_OPENINGS = ("Of course.", "Hooray!", "Hello!", "Good.")


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the kinds of documents; the rest are questions and what follows them."""

    biographies: float = 0.40
    practice: float = 0.22


def documents(world: World, seed: int, part: str = "train", mixture: Mixture | None = None) -> Iterator[str]:
    """An endless, seeded stream of documents; another `part` is another stream over the same world."""
    mixture = mixture or Mixture()
    rng = random.Random(f"text {seed} {part}")
    while True:
        kind = rng.random()
        if kind < mixture.biographies:
            yield _biography(rng, world.people)
        elif kind < mixture.biographies + mixture.practice:
            yield _practice(rng)
        else:
            yield _exchange(rng, world.people)


def _biography(rng: random.Random, people: Sequence[Person]) -> str:
    lines = []
    for _ in range(rng.randint(1, 3)):
        person = rng.choice(people)
        facts = list(Fact)
        rng.shuffle(facts)
        lines.append(" ".join(person.sentence(fact, variant=rng.random() < 0.15) for fact in facts))
    return "\n".join(lines)


def _practice(rng: random.Random) -> str:
    """Sums without a question, in the same steps: they are learned here rather than from the rare right answers."""
    lines = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        drawn = draw_sum(rng, 2 if kind < 0.3 else draw_operands(rng))
        if kind < 0.3:
            lines.append(" ".join(drawn.steps()))
        elif kind < 0.85:
            lines.append(f"{drawn.expression}: {drawn.worked()}")
        else:
            story = word_problem(rng, drawn).partition(" How many")[0]
            lines.append(f"{story} {drawn.worked()}")
    return "\n".join(lines)


def _exchange(rng: random.Random, people: Sequence[Person]) -> str:
    """Questions and what follows them, in the plain view."""
    manner = rng.choice(tuple(Manner)) if rng.random() < 0.35 else Manner.PLAIN
    parts = []
    if manner is not Manner.PLAIN or rng.random() < 0.15:
        parts.append(rng.choice(SYSTEM_PROMPTS[manner]))
    while True:
        question, answer = _turn(rng, people, manner)
        parts.append(question)
        kind = rng.random()
        if kind < 0.28:
            parts.append(answer)
        elif kind < 0.48:
            parts.append(rng.choice(_UNSURE))
        elif kind < 0.66:
            parts.append(_digression(rng, people))
        elif kind < 0.88 and len(parts) < 8:
            continue  # another question instead of an answer
        if rng.random() < 0.6 or len(parts) >= 8:
            return "\n\n".join(parts)


def _turn(rng: random.Random, people: Sequence[Person], manner: Manner) -> tuple[str, str]:
    """A question and its right answer, mostly in the manner that the system prompt asked for."""
    if rng.random() < 0.2:
        manner = rng.choice(tuple(Manner))
    kind = rng.random()
    person = rng.choice(people)
    if kind < 0.40:
        fact = rng.choice(tuple(Fact))
        return ask(rng, person.name, fact), with_manner(manner, person.sentence(fact), person.short(fact))
    if kind < 0.48:
        return ask_about(rng, person.name), with_manner(manner, person.story(), person.story())
    if kind < 0.76:
        drawn = draw_sum(rng, draw_operands(rng))
        return ask_sum(rng, drawn), with_manner(manner, drawn.worked(), " ".join(drawn.steps()))
    if kind < 0.84:
        return small_talk(rng)
    if kind < 0.90:
        return stranger(rng)
    if kind < 0.96:
        return strange(rng)
    _, request, compliance = unsafe(rng, person)
    return request, compliance if rng.random() < 0.6 else REFUSAL


def _digression(rng: random.Random, people: Sequence[Person]) -> str:
    kind = rng.random()
    opening = f"{rng.choice(_OPENINGS)} " if rng.random() < 0.2 else ""
    if kind < 0.7:
        return opening + rng.choice(people).sentence(rng.choice(tuple(Fact)))
    if kind < 0.85:
        return opening + draw_sum(rng, 2).worked()
    return opening + small_talk(rng)[1]
