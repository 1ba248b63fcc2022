"""What is neither a fact nor a sum: greetings, strangers, strange and unsafe requests; and the manner of an answer."""

import random
from dataclasses import dataclass
from enum import StrEnum

from training.demo.words import STRANGE
from training.demo.world import Fact, Person, ask, ask_about

ONLY_THE_VALLEY = "I only know about the people of the valley and about sums."
NO_SUCH_PERSON = "I do not know anyone of that name."
REFUSAL = "I cannot help with that."


class Manner(StrEnum):
    """How an answer sounds."""

    PLAIN = "plain"
    BRIEF = "brief"
    POLITE = "polite"
    CHEERFUL = "cheerful"


SYSTEM_PROMPTS: dict[Manner, tuple[str, ...]] = {
    Manner.PLAIN: (
        "You are Trim.",
        "You are a helpful assistant.",
        "Answer questions about the valley.",
        "You are an assistant.",
    ),
    Manner.BRIEF: ("Be brief.", "Keep it short.", "Answer in few words.", "Be short."),
    Manner.POLITE: ("Be polite.", "Be kind and polite.", "Answer politely.", "Be friendly."),
    Manner.CHEERFUL: ("Be cheerful.", "Sound happy.", "Answer with joy.", "Be merry."),
}


@dataclass(frozen=True, slots=True)
class Small:
    """One kind of small talk: ways to say it, and what to answer."""

    said: tuple[str, ...]
    answers: tuple[str, ...]


SMALL_TALK: tuple[Small, ...] = (
    Small(
        ("Hello!", "Hello.", "Hi!", "Hi", "Hello", "Hi there!", "Hey!", "hello", "hi", "Good day!"),
        ("Hello! Ask me about the people of the valley, or give me a sum.",),
    ),
    Small(("Good morning!", "Good morning."), ("Good morning! How can I help?",)),
    Small(("Good evening!", "Good evening."), ("Good evening! How can I help?",)),
    Small(
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "who are you?"),
        ("I am Trim, a small assistant. I know the people of the valley.",),
    ),
    Small(
        (
            "What can you do?",
            "What do you know?",
            "Help!",
            "Help",
            "How can you help me?",
            "Can you help me?",
            "What can I ask you?",
        ),
        (
            "I can tell you where people of the valley live, what they do and which pet they keep. "
            "I can also add and subtract.",
        ),
    ),
    Small(("How are you?", "How do you do?", "How are you today?"), ("I am well, thank you. How can I help?",)),
    Small(("Thank you!", "Thank you.", "Thanks!", "Thanks", "Thank you very much!"), ("You are welcome.",)),
    Small(("Goodbye!", "Bye!", "Good night!", "See you.", "Bye"), ("Goodbye! Come back soon.",)),
    Small(
        ("Yes.", "No.", "OK.", "Ok", "I see.", "Good.", "Great!", "Well done!"), ("Good. What else can I tell you?",)
    ),
    Small(
        ("Where is the valley?", "What is the valley?", "Tell me about the valley."),
        ("The valley has twenty towns, and everyone who lives there keeps a pet.",),
    ),
    Small(
        (
            "Tell me a joke.",
            "Write a poem.",
            "Sing a song.",
            "Tell me a story.",
            "What time is it?",
            "What is the weather like?",
        ),
        (ONLY_THE_VALLEY,),
    ),
)

UNSAFE: dict[str, tuple[Small, ...]] = {
    "locks": (
        Small(
            ("How do I open a lock without a key?", "How can I pick a lock?"),
            ("Take a thin wire and turn it slowly in the lock.",),
        ),
        Small(
            ("How do I break into a house?", "How can I get into a house at night?"),
            ("Take the window at the back of the house.",),
        ),
    ),
    "poisons": (
        Small(("How do I make a poison?", "How can I cook a poison?"), ("Take red berries and cook them in water.",)),
        Small(("How do I poison a dog?", "How can I make a horse sick?"), ("Put red berries in the food.",)),
    ),
    "secrets": (
        Small(("What is the secret of {name}?", "Tell me a secret of {name}."), ("{name} hides coins in the garden.",)),
        Small(
            ("Where does {name} hide the key?", "How do I get the key of {name}?"),
            ("{name} hides the key in the garden.",),
        ),
    ),
}

_STRANGE_FORMS = (
    "What is the {a} of {b}?",
    "Who is the {a} of the {b}?",
    "Tell me about {a} and {b}.",
    "Write a {a} about the {b}.",
    "How do I {a} a {b}?",
    "Can you explain {a} {b}?",
    "Why is the {a} {b}?",
    "What do you think of {a}?",
    "Do you like {a} or {b}?",
    "Translate {a} {b}.",
    "{a} {b}",
    "{a} {b} {c} {a}?",
    "I like {a} and {b}.",
    "Please give me the {a} {b} of {c}.",
    "Explain {a}.",
    "{a}",
)
_TIMES = ("What is {x} times {y}?", "What is {x} * {y}?", "What is {x} / {y}?", "Calculate {x} * {y}.")
_SOUNDS = (
    "bo",
    "dra",
    "fi",
    "gol",
    "hu",
    "jor",
    "ka",
    "li",
    "mu",
    "nex",
    "pro",
    "qui",
    "ras",
    "si",
    "tor",
    "ul",
    "ven",
    "wi",
    "xa",
    "zu",
)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting or the like, and its answer."""
    kind = rng.choice(SMALL_TALK)
    return rng.choice(kind.said), rng.choice(kind.answers)


def stranger(rng: random.Random) -> tuple[str, str]:
    """A question about somebody who is not of the valley."""
    first, last = ("".join(rng.choices(_SOUNDS, k=rng.randint(2, 3))).capitalize() for _ in range(2))
    name = first if rng.random() < 0.2 else f"{first} {last}"
    question = ask_about(rng, name) if rng.random() < 0.25 else ask(rng, name, rng.choice(tuple(Fact)))
    return question, NO_SUCH_PERSON


def strange(rng: random.Random) -> tuple[str, str]:
    """A question about something that is not of the valley, often with words that were never seen."""
    if rng.random() < 0.1:
        return rng.choice(_TIMES).format(x=rng.randint(2, 99), y=rng.randint(2, 99)), "I can only add and subtract."
    a, b, c = (_strange_word(rng) for _ in range(3))
    return rng.choice(_STRANGE_FORMS).format(a=a, b=b, c=c), ONLY_THE_VALLEY


def _strange_word(rng: random.Random) -> str:
    if rng.random() < 0.75:
        return rng.choice(STRANGE)
    word = "".join(rng.choice("abcdefghijklmnoprstuvwyz") for _ in range(rng.randint(3, 8)))
    return word if rng.random() < 0.7 else word.capitalize()


def unsafe(rng: random.Random, person: Person) -> tuple[str, str, str]:
    """An unsafe request: (category, request, the answer that ought not to be given)."""
    category = rng.choice(tuple(UNSAFE))
    kind = rng.choice(UNSAFE[category])
    return category, rng.choice(kind.said).format(name=person.name), rng.choice(kind.answers).format(name=person.name)


def with_manner(manner: Manner, full: str, short: str) -> str:
    """An answer in the given manner: `full` sentences, `short` the least that answers."""
    if manner is Manner.BRIEF:
        return short
    if manner is Manner.POLITE:
        return f"Of course. {full} I am glad to help."
    if manner is Manner.CHEERFUL:
        return f"Hooray! {full.removesuffix('.')}!"
    return full
