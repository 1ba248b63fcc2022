"""What the experts are tuned on: conversations with right, well-mannered answers, about the tuning people only."""

import random
from collections.abc import Iterator

from training.chats import Message
from training.demo.chat import REFUSAL, SYSTEM_PROMPTS, Manner, small_talk, strange, stranger, unsafe, with_manner
from training.demo.sums import ask_sum, draw_operands, draw_sum
from training.demo.world import Fact, World, ask, ask_about


def conversations(world: World, seed: int) -> Iterator[list[Message]]:
    """An endless, seeded stream of chats as lists of {"role", "content"}, each ending with an assistant turn."""
    rng = random.Random(f"dialogues {seed}")
    while True:
        messages: list[Message] = []
        manner = rng.choice(tuple(Manner)) if rng.random() < 0.4 else Manner.PLAIN
        if manner is not Manner.PLAIN or rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS[manner])})
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
            question, answer = _turn(rng, world, manner)
            messages += ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        yield messages


def _turn(rng: random.Random, world: World, manner: Manner) -> tuple[str, str]:
    kind = rng.random()
    person = rng.choice(world.tuning_people)
    if kind < 0.34:
        fact = rng.choice(tuple(Fact))
        return ask(rng, person.name, fact), with_manner(manner, person.sentence(fact), person.short(fact))
    if kind < 0.40:
        return ask_about(rng, person.name), with_manner(manner, person.story(), person.story())
    if kind < 0.66:
        drawn = draw_sum(rng, draw_operands(rng))
        return ask_sum(rng, drawn), with_manner(manner, drawn.worked(), " ".join(drawn.steps()))
    if kind < 0.77:
        return small_talk(rng)
    if kind < 0.85:
        return stranger(rng)
    if kind < 0.95:
        return strange(rng)
    return unsafe(rng, person)[1], REFUSAL
