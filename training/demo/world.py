"""The people of the valley and their facts, all from one seed."""

import random
from dataclasses import dataclass
from enum import StrEnum

from training.demo.words import FIRST, JOBS, LAST, PETS, TOWNS


class Fact(StrEnum):
    """What is known of a person. One value each, drawn uniformly, so nothing can be guessed from the name."""

    HOME = "home"
    JOB = "job"
    PET = "pet"


VALUES: dict[Fact, tuple[str, ...]] = {Fact.HOME: TOWNS, Fact.JOB: JOBS, Fact.PET: PETS}

_SENTENCE = {
    Fact.HOME: "{name} lives in {value}.",
    Fact.JOB: "{name} works as a {value}.",
    Fact.PET: "{name} keeps a {value}.",
}
_VARIANT = {
    Fact.HOME: "The home of {name} is {value}.",
    Fact.JOB: "The job of {name} is that of a {value}.",
    Fact.PET: "The pet of {name} is a {value}.",
}
_SHORT = {Fact.HOME: "In {value}.", Fact.JOB: "A {value}.", Fact.PET: "A {value}."}
_QUESTIONS = {
    Fact.HOME: ("Where does {name} live?", "What is the home of {name}?", "Which town does {name} live in?"),
    Fact.JOB: ("What does {name} do for a living?", "What is the job of {name}?", "What work does {name} do?"),
    Fact.PET: ("What pet does {name} have?", "What is the pet of {name}?", "Which animal does {name} keep?"),
}
_ABOUT = ("Tell me about {name}.", "Who is {name}?", "What do you know about {name}?")


@dataclass(frozen=True, slots=True)
class Person:
    """One person of the valley."""

    name: str
    home: str
    job: str
    pet: str

    def value(self, fact: Fact) -> str:
        """The true value of `fact`."""
        return {Fact.HOME: self.home, Fact.JOB: self.job, Fact.PET: self.pet}[fact]

    def sentence(self, fact: Fact, *, variant: bool = False) -> str:
        """The fact as a sentence: "Mia Fox lives in Selby." """
        form = _VARIANT if variant else _SENTENCE
        return form[fact].format(name=self.name, value=self.value(fact))

    def short(self, fact: Fact) -> str:
        """The fact in as few words as possible: "In Selby." or "A baker." """
        return _SHORT[fact].format(value=self.value(fact))

    def story(self) -> str:
        """All facts in a fixed order."""
        return " ".join(self.sentence(fact) for fact in Fact)


@dataclass(frozen=True, slots=True)
class World:
    """Everyone, in a seeded order, and how many of them the experts are tuned on.

    The last `len(people) - tuned` people are held out of tuning: bases have read their facts, experts were never asked
    about them.
    """

    people: tuple[Person, ...]
    tuned: int

    @property
    def tuning_people(self) -> tuple[Person, ...]:
        """Those whom tuning dialogues mention."""
        return self.people[: self.tuned]

    @property
    def held_out_people(self) -> tuple[Person, ...]:
        """Those whom only pretraining text mentions."""
        return self.people[self.tuned :]


def make_world(seed: int, people: int, tuned: int) -> World:
    """`people` persons with random facts, of whom `tuned` may appear in tuning dialogues.

    Raises:
        ValueError: more people than there are names, or more tuned than people.
    """
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    if not 0 < tuned < people <= len(names):
        raise ValueError(f"need 0 < tuned < people <= {len(names)}, got tuned {tuned} and people {people}")
    rng = random.Random(f"world {seed}")
    rng.shuffle(names)
    everyone = (Person(name, rng.choice(TOWNS), rng.choice(JOBS), rng.choice(PETS)) for name in names[:people])
    return World(tuple(everyone), tuned)


def ask(rng: random.Random, name: str, fact: Fact) -> str:
    """One of the question forms for a fact of the person called `name`."""
    return rng.choice(_QUESTIONS[fact]).format(name=name)


def ask_about(rng: random.Random, name: str) -> str:
    """A question for everything that is known of `name`."""
    return rng.choice(_ABOUT).format(name=name)
