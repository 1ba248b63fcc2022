"""Sums in written steps, bare or as word problems. Every running total stays within 0..999."""

import random
import zlib
from dataclasses import dataclass

from training.demo.words import FIRST, GOODS

_LIMIT = 999
_ASK = ("What is {}?", "How much is {}?", "Calculate {}.", "Please work out {}.")


@dataclass(frozen=True, slots=True)
class Sum:
    """`terms[0]` plus the signed rest, from left to right."""

    terms: tuple[int, ...]

    @property
    def answer(self) -> int:
        """The result."""
        return sum(self.terms)

    @property
    def expression(self) -> str:
        """As written: "47 + 85 - 12"."""
        return str(self.terms[0]) + "".join(f" {_sign(term)} {abs(term)}" for term in self.terms[1:])

    def steps(self) -> tuple[str, ...]:
        """One equation for each operand after the first: ("47 + 85 = 132.", "132 - 12 = 120.")."""
        lines = []
        total = self.terms[0]
        for term in self.terms[1:]:
            lines.append(f"{total} {_sign(term)} {abs(term)} = {total + term}.")
            total += term
        return tuple(lines)

    def worked(self) -> str:
        """The steps and the closing sentence."""
        return " ".join((*self.steps(), f"The answer is {self.answer}."))

    @property
    def held_out(self) -> bool:
        """Whether this sum is kept out of all training text (one in sixteen, by a hash of the expression)."""
        return zlib.crc32(self.expression.encode()) % 16 == 0


def _sign(term: int) -> str:
    return "-" if term < 0 else "+"


def _operand(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(1, 9)
    return rng.randint(10, 99) if kind < 0.85 else rng.randint(100, 499)


def draw_sum(rng: random.Random, operands: int, *, held_out: bool = False) -> Sum:
    """A sum of `operands` numbers from the training part, or from the held-out part."""
    while True:
        terms = [_operand(rng)]
        while len(terms) < operands:
            term = _operand(rng) * rng.choice((1, -1))
            if 0 <= sum(terms) + term <= _LIMIT:
                terms.append(term)
        drawn = Sum(tuple(terms))
        if drawn.held_out == held_out:
            return drawn


def draw_operands(rng: random.Random) -> int:
    """How many operands: two to five, three the most frequent."""
    return rng.choice((2, 2, 3, 3, 3, 4, 4, 5))


def ask_sum(rng: random.Random, drawn: Sum) -> str:
    """A bare question, or (one in four) a word problem with the same numbers in the same order."""
    if rng.random() < 0.75:
        return rng.choice(_ASK).format(drawn.expression)
    return word_problem(rng, drawn)


def word_problem(rng: random.Random, drawn: Sum) -> str:
    """ "Mia has 12 apples, buys 30 and sells 5. How many apples does Mia have now?" """
    name, goods = rng.choice(FIRST), rng.choice(GOODS)
    changes = [
        f"{rng.choice(('buys', 'finds')) if term > 0 else rng.choice(('sells', 'loses'))} {abs(term)}"
        for term in drawn.terms[1:]
    ]
    listed = changes[0] if len(changes) == 1 else ", ".join(changes[:-1]) + " and " + changes[-1]
    joiner = " and " if len(changes) == 1 else ", "
    return f"{name} has {drawn.terms[0]} {goods}{joiner}{listed}. How many {goods} does {name} have now?"
