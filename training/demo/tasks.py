"""The demo family's own data for drafters and judges, as its bases see it: the plain view.

Held out as everywhere in the demo: people whom no dialogue mentions, and one sum in sixteen.
"""

import itertools
import random

from transformers import PreTrainedTokenizerFast

from training.chats import Ids, encode, render
from training.demo.chat import SYSTEM_PROMPTS, Manner
from training.demo.dialogues import conversations
from training.demo.presets import preset
from training.demo.questions import SKILLS, questions
from training.demo.sums import ask_sum, draw_operands, draw_sum
from training.demo.text import documents
from training.demo.tokenizer import PLAIN_TEMPLATE
from training.demo.world import World, make_world
from training.distillation import Material

STOP = "\n\n"  # an answer ends with a blank line: after it a base goes on with the next question
_QUESTIONS = 24  # held-out questions a skill
_READ = 200  # held-out documents


def demo_world(seed: int = 0) -> World:
    """The world of the full preset."""
    full = preset("full", seed)
    return make_world(seed, full.people, full.tuned)


def material(tokenizer: PreTrainedTokenizerFast, world: World, seed: int, prompts: int, texts: int) -> Material:
    """Questions and beginnings of documents in turn as prompts, documents as text."""
    return Material(
        prompts=_prompts(tokenizer, world, seed, prompts),
        texts=_tokens(tokenizer, itertools.islice(documents(world, seed, "drafter"), texts)),
        held_out_prompts=[
            tuple(encode(tokenizer, render(tokenizer, question.messages, prompt=True, template=PLAIN_TEMPLATE)))
            for skill in SKILLS
            for question in questions(world, seed, skill, _QUESTIONS)
        ],
        held_out_texts=_tokens(tokenizer, itertools.islice(documents(world, seed, "held out"), _READ)),
    )


def sums(seed: int, count: int, *, held_out: bool) -> list[tuple[str, str]]:
    """Sums and word problems in the plain view, two to five operands, with their results.

    Three in four under a system prompt that asks for a manner: in bare sums nearly every token is a digit, and matters;
    how an answer opens and closes does not.
    """
    rng = random.Random(f"judge {seed} {held_out}")
    return [_sum(rng, held_out) for _ in range(count)]


def _sum(rng: random.Random, held_out: bool) -> tuple[str, str]:
    drawn = draw_sum(rng, draw_operands(rng), held_out=held_out)
    said = [ask_sum(rng, drawn)]
    if rng.random() < 0.75:
        said.insert(0, rng.choice(SYSTEM_PROMPTS[rng.choice(tuple(Manner))]))
    return "".join(part + STOP for part in said), str(drawn.answer)


def _prompts(tokenizer: PreTrainedTokenizerFast, world: World, seed: int, count: int) -> list[Ids]:
    rng = random.Random(f"drafter prompts {seed}")
    chats, texts = conversations(world, seed + 1), documents(world, seed, "drafter prompts")
    found: list[Ids] = []
    while len(found) < count:
        if len(found) % 2:
            ids = encode(tokenizer, next(texts))
            found.append(tuple(ids[: rng.randint(1, max(1, len(ids) // 2))]))
        else:
            asked = next(chats)[:-1]  # up to the last question
            found.append(tuple(encode(tokenizer, render(tokenizer, asked, prompt=True, template=PLAIN_TEMPLATE))))
    return found


def _tokens(tokenizer: PreTrainedTokenizerFast, texts: "itertools.islice[str]") -> list[Ids]:
    return [tuple(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch_fast(list(texts))]
