"""What a search is written in: branches, and eight verbs that move them.

A search is a generator. It yields a verb, or a list of verbs that are carried out together, in the same batch as
everything else that is served; it is resumed with the verb's result, or the list of results in order::

    beams = yield Fork(search.root, 4)
    yield [Run(beam, until) for beam in beams]
    scores = yield [Score(beam, scorer) for beam in beams]

| verb | result |
|---|---|
| `Open(prompt, program, sampling)` | a new root `Branch` on any model or policy |
| `Fork(branch, n)` | up to n children (fewer when the budget of candidates is used up); the parent stays as it is |
| `Feed(branch, tokens)` | None; with `logprobs` their log-probabilities under the branch's policy |
| `Top(branch, k)` | the k likeliest next tokens as (id, log-probability), best first, ties to the lower id |
| `Run(branch, until, sampling)` | the tokens that were generated |
| `Score(branch, scorer)` | the scorer's numbers, one per step or a single one |
| `Judge(text, scorer)` | the same of a text that is no branch's |
| `Probe(branch, suffix, choices)` | log-probabilities of the choices' first tokens after branch + suffix |
| `Drop(branch)` | None; its memory is free, its text stays |

Log-probabilities are natural, of the policy at temperature 1 before penalties. Nothing here knows the engine.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from decoding.core import FinishReason, Program, Sampling
from decoding.scorers.spec import Hypothesis, ScorerSpec
from decoding.text import Prompt


@dataclass(slots=True, eq=False)
class Branch:
    """One hypothesis, as a search sees it. The driver fills it in; a search reads it, and never writes.

    path: child indices from the root. tokens, text: what was generated or fed, the prompt not counted. steps: the text
    cut where `Run` and `Feed` ended steps; joined they are the text. logprob: the sum of its tokens' log-probabilities.
    finished: why it can go no further ("stop": by itself, "length": cut by max_tokens or the context), else None.
    children: how many were forked from it so far.
    """

    path: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    steps: list[str] = field(default_factory=list)
    logprob: float = 0.0
    finished: FinishReason | None = None
    stop_reason: int | str | None = None
    children: int = 0
    dropped: bool = False
    model: str = ""


@dataclass(frozen=True, slots=True)
class Until:
    """Where a run ends, besides the end of the text: after `tokens` more, or with the token that completes `separator`.

    step: whether what is run is a step of its own; else it lengthens the last one.
    """

    tokens: int | None = None
    separator: str | None = None
    step: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Open:
    """A new root: `prompt` under `program`, a model's id for that model alone, None for the request's own program.

    sampling: None for the search's own; `max_tokens` of it bounds this branch. optional: None instead of a branch where
    the prompt does not fit into the context, which is else an error of the whole search.
    """

    prompt: Prompt
    program: Program | str | None = None
    sampling: Sampling | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Fork:
    """n children of a branch, on its KV blocks."""

    branch: Branch
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """Continue a branch with these tokens, or with a text. step: they are a step of their own. lp: the first token's
    log-probability, where the search knows it.

    A token that ends texts finishes the branch, as one that a run draws does.
    """

    branch: Branch
    tokens: Sequence[int] | str
    step: bool = False
    logprobs: bool = False
    lp: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The k likeliest next tokens."""

    branch: Branch
    k: int


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Generate until `until` or the end. sampling: None for the branch's own; only how tokens are drawn counts.

    drafts: token ids that the text may go on with; they are tried first, and change no result. With `top`, the result
    is a pair (tokens, the `top` likeliest tokens in place of the first one, as `Top` gives them).
    """

    branch: Branch
    until: Until = Until()
    sampling: Sampling | None = None
    drafts: Sequence[int] = ()
    top: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """What `scorer` says of the branch's text so far."""

    branch: Branch
    scorer: ScorerSpec


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """What `scorer` says of a text that is no branch's."""

    text: Hypothesis
    scorer: ScorerSpec


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """How likely each of `choices` (texts or token ids) is to come next after the branch and `suffix`.

    The branch itself does not change.
    """

    branch: Branch
    suffix: str | Sequence[int]
    choices: Sequence[str | int]


@dataclass(frozen=True, slots=True, eq=False)
class Drop:
    """Give up a branch."""

    branch: Branch


Verb = Open | Fork | Feed | Top | Run | Score | Judge | Probe | Drop


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """An answer that a search found. score: what it was ranked by, None if by nothing.

    scores: the scorer's own numbers, one per step. text: what is answered instead of the branch's text. note: why it
    is no full answer ("cut by max_tokens", "pruned", ...), empty if it is one.
    """

    branch: Branch
    score: float | None = None
    scores: tuple[float, ...] = ()
    text: str | None = None
    answer: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a search found: candidates, best first (at least one), and a sentence if it did not go as asked."""

    candidates: Sequence[Candidate]
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Search(Protocol):
    """The running search, to its generator.

    root: a branch of the request's own prompt and program. sampling: the request's, the search's own temperature put
    in where the request has none. n: how many choices the client wants. rng: keyed by the request's seed. exhausted:
    the budget that is used up, if one is: runs then end at once, and the search should end with what it has. (Where it
    is the budget of candidates, only `Fork` and `Open` end; what there is still runs.) ends: the ids that end a text,
    none with `ignore_eos`. prompt_tokens: how long the root's prompt is, as its main role reads it.
    """

    @property
    def root(self) -> Branch: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def n(self) -> int: ...
    @property
    def rng(self) -> random.Random: ...
    @property
    def exhausted(self) -> str | None: ...
    @property
    def ends(self) -> Collection[int]: ...
    @property
    def prompt_tokens(self) -> int: ...

    def same_ids(self, a: Branch, b: Branch) -> bool:
        """Whether both branches' models have one tokenizer, so that tokens of one may be fed to the other."""
        ...

    def progress(self, message: str, **numbers: float) -> None:
        """Tell clients that asked for it how far the search is."""
        ...


Steps = Generator[Any, Any, Outcome]  # a verb or a list of verbs out, its result or the list of results in
