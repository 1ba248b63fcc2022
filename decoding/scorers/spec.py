"""What requests say about scorers, and what the engine asks of them. Plain data and protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch

from decoding.core import says
from decoding.text import Prompt

Aggregate = Literal["last", "min", "prod", "mean"]
STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}  # how nested parameters are read from JSON


@dataclass(frozen=True, slots=True)
class ScorerParams:
    """A scorer in full, as requests write it: a model with what it is asked, or a rule, or a weighted sum of several.

    Exactly one of `model`, `remote`, `rule`, `keywords`, `min_words`/`max_words`, `regex`, `json`, `parts` says what
    it is.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    model: str | None = field(default=None, metadata=says("A served model; its kind says how it is read."))
    remote: str | None = field(default=None, metadata=says("A scorer elsewhere that the operator has configured."))
    rule: Literal["likelihood", "mean_likelihood", "length"] | None = field(
        default=None, metadata=says("The policy's own log-probability, summed or per token; or the words, counted.")
    )
    weights: tuple[float, ...] | None = field(
        default=None, metadata=says("Weights of a reward model's objectives, in its order.")
    )
    principles: tuple[str, ...] = field(default=(), metadata=says("Principles that the reward is conditioned on."))
    question: str | None = field(default=None, metadata=says("What a causal model is asked as a judge."))
    taxonomy: str | None = field(default=None, metadata=says("Categories that a guard judges by."))
    keywords: tuple[str, ...] = field(default=(), metadata=says("The share of these words that the text holds."))
    min_words: int | None = field(default=None, metadata=says("1 from so many words on, less below."))
    max_words: int | None = field(default=None, metadata=says("1 up to so many words, less above."))
    regex: str | None = field(default=None, metadata=says("1 if the text matches, else 0."))
    json: bool = field(default=False, metadata=says("1 if the text is valid JSON, else 0."))
    parts: tuple[ScorerParams, ...] = field(default=(), metadata=says("Scorers whose weighted scores are added."))
    weight: float = field(default=1.0, metadata=says("Of a part in the sum."))


ScorerSpec = str | ScorerParams  # a model's or remote scorer's id, or the scorer in full


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text as a scorer sees it.

    prompt: the request's. steps: the answer, cut into steps; joined they are its text. done: whether it ended by
    itself. logprob, tokens: the policy's summed log-probability of the answer, and its number of tokens.
    """

    prompt: Prompt
    steps: tuple[str, ...]
    done: bool = False
    logprob: float = 0.0
    tokens: int = 0

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.steps)


class Rule(Protocol):
    """A scorer that needs no model."""

    def score(self, text: Hypothesis) -> list[float]:
        """One number, or one per step."""
        ...


class Remote(Protocol):
    """A scorer elsewhere. Called in a thread of its own; may block, and may raise."""

    def score(self, text: Hypothesis) -> list[float]:
        """One number, or one per step."""
        ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text as a scorer model reads it: ids, and the positions (ascending) whose rows are read.

    A longer text's ids should begin with a shorter one's, so that what is computed once is kept; where they do not,
    everything from the first difference on is computed anew.
    """

    ids: Sequence[int]
    marks: Sequence[int]


class Reading(Protocol):
    """How a model scores: what it is shown, and what its rows mean.

    model: its id (an adapter's where that is asked). hidden: whether `read` wants hidden states too. one_number:
    whether it gives a single number however many steps there are.
    """

    model: str
    hidden: bool
    one_number: bool

    def render(self, text: Hypothesis) -> Rendered:
        """What the model is shown. Raises BadRequest for a text that it cannot be shown."""
        ...

    def read(self, rows: torch.Tensor, hidden: torch.Tensor | None) -> list[float]:
        """Scores from the marks' rows [m, width] (logits, or a head's outputs), hidden states [m, H]."""
        ...


@dataclass(frozen=True, slots=True)
class Sum:
    """Scorers whose scores, of equal number, are weighted and added."""

    parts: tuple[tuple[float, Scorer], ...]


Scorer = Rule | Remote | Reading | Sum
