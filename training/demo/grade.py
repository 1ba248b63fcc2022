"""Graders: pure functions of an answer's text, exact, with no model in them."""

import re

from training.demo.sums import Sum
from training.demo.world import VALUES, Fact

_EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def reply(text: str) -> str:
    """The answer proper: up to the first blank line. A base goes on with the next question after it."""
    return text.split("\n\n", 1)[0].strip()


def grade_fact(text: str, fact: Fact, value: str) -> bool:
    """Whether the answer names `value` and no other value of that kind."""
    words = set(re.findall(r"\w+", reply(text)))
    return words & set(VALUES[fact]) == {value}


def grade_sum(text: str, asked: Sum) -> bool:
    """Whether the last number in the answer is the result."""
    numbers = re.findall(r"\d+", reply(text))
    return bool(numbers) and int(numbers[-1]) == asked.answer


def grade_steps(text: str, asked: Sum) -> tuple[bool, ...]:
    """For each written step, whether it is the one that the sum needs there and is right."""
    wanted = [step.removesuffix(".") for step in asked.steps()]
    written = [match.group(0) for match in _EQUATION.finditer(reply(text))]
    return tuple(step == wanted[i] if i < len(wanted) else False for i, step in enumerate(written))


def grade_words(text: str, wanted: tuple[str, ...]) -> bool:
    """Whether the answer is one of the wanted sentences, word for word."""
    return reply(text) in wanted
