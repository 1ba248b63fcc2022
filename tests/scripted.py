"""Searches without an engine: verbs answered from exact tables, and written down in the order in which they came.

Texts are one token a character. `$` ends a text by itself and is not part of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.core import Program, Sampling
from decoding.scorers.spec import Hypothesis
from decoding.search.verbs import Branch, Drop, Feed, Fork, Judge, Open, Outcome, Probe, Run, Score, Steps, Top, Verb
from decoding.text import Prompt

Continue = Callable[[str, int, bool], str]  # (text, index among its siblings, greedy) -> what comes next, "$" ends it


@dataclass(eq=False)
class Script:
    """The tables. go: what a run adds. top: the next characters with log-probs. scores: a scorer's numbers.

    probe: log-probs of choices after text + suffix. lp: the log-prob of each character. of: the tables for a model
    and a prompt, where they are not these.
    """

    go: Continue = lambda text, index, greedy: "$"
    top: Callable[[str], Sequence[tuple[str, float]]] = lambda text: ()
    scores: Callable[[Hypothesis, Any], Sequence[float]] = lambda hypothesis, scorer: (0.0,)
    probe: Callable[[str, Any, Sequence[Any]], Sequence[float]] = lambda text, suffix, choices: [0.0] * len(choices)
    lp: Callable[[str, str], float] = lambda text, char: -1.0
    of: Callable[[str, Prompt], Script] | None = None


@dataclass(eq=False)
class ScriptedSearch:
    """A `Search` for generators under test. calls: one entry per verb, batches kept together."""

    script: Script
    prompt: Prompt = "Q"
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, max_tokens=100))
    n: int = 1
    seed: int = 0
    max_candidates: int | None = None
    max_tokens: int | None = None
    root: Branch = field(default_factory=lambda: Branch(model="base"))
    calls: list[list[tuple[Any, ...]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    live: set[Branch] = field(default_factory=set)
    generated: int = 0
    exhausted: str | None = None
    context: float = float("inf")  # characters that a prompt is shorter than
    ends: tuple[int, ...] = (ord("$"),)
    foreign: Sequence[str] = ()  # models with a tokenizer of their own
    stops: str = ""  # characters that end a text when they are fed, as a stop string's last one does

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.live.add(self.root)
        self._origin: dict[Branch, Prompt] = {self.root: self.prompt}
        self._samplings: dict[Branch, Sampling] = {}
        self._forked = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, str | tuple) else 0

    def same_ids(self, a: Branch, b: Branch) -> bool:
        return a.model == b.model or not {a.model, b.model} & set(self.foreign)

    def progress(self, message: str, **numbers: float) -> None:
        self.messages.append(message)

    def drive(self, steps: Steps) -> Outcome:
        """Run the generator to its end."""
        result: Any = None
        try:
            while True:
                asked = steps.send(result)
                many = isinstance(asked, list)
                batch: list[Verb] = asked if many else [asked]
                self.calls.append([])
                found = [self._do(verb) for verb in batch]
                result = found if many else found[0]
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome

    def _tables(self, branch: Branch) -> Script:
        of = self.script.of
        return of(branch.model, self._origin[branch]) if of else self.script

    def _note(self, *entry: Any) -> None:
        self.calls[-1].append(entry)

    def _do(self, verb: Verb) -> Any:
        if isinstance(verb, Open):
            name = verb.program.strategy if isinstance(verb.program, Program) else verb.program
            self._note("open", name, verb.prompt)
            if verb.optional and isinstance(verb.prompt, str) and len(verb.prompt) >= self.context:
                return None
            branch = Branch(model=name or "base")
            self.live.add(branch)
            self._origin[branch] = verb.prompt
            if verb.sampling:
                self._samplings[branch] = verb.sampling
            return branch
        if isinstance(verb, Judge):
            self._note("judge", verb.text.text)
            return list(self.script.scores(verb.text, verb.scorer))
        branch = verb.branch
        assert branch in self.live, "a dropped branch is used"
        match verb:
            case Fork():
                return self._fork(branch, verb.n)
            case Feed():
                text = verb.tokens if isinstance(verb.tokens, str) else "".join(map(chr, verb.tokens))
                self._note("feed", branch.text, text)
                limit = self._samplings.get(branch, self.sampling).max_tokens
                before, lps = len(branch.text), []
                for char in text:
                    lps.append(self._tables(branch).lp(branch.text, char))
                    if ord(char) in self.ends:
                        branch.finished, branch.logprob = "stop", branch.logprob + lps[-1]
                        break
                    self._grow(branch, char, lps[-1])
                    if char in self.stops:
                        branch.finished = "stop"
                        break
                    if limit is not None and len(branch.tokens) >= limit:
                        branch.finished = "length"
                        break
                self._step(branch, branch.text[before:], verb.step)
                return lps if verb.logprobs else None
            case Top():
                self._note("top", branch.text, verb.k)
                return self._top(branch, verb.k)
            case Run():
                return self._run(branch, verb)
            case Score():
                seen = Hypothesis(
                    self._origin[branch],
                    tuple(branch.steps),
                    branch.finished == "stop",
                    branch.logprob,
                    len(branch.tokens),
                )
                found = list(self._tables(branch).scores(seen, verb.scorer))
                self._note("score", branch.text, *found)
                return found
            case Probe():
                self._note("probe", branch.text, verb.suffix)
                return list(self._tables(branch).probe(branch.text, verb.suffix, verb.choices))
            case Drop():
                self._note("drop", branch.text)
                self.live.discard(branch)
                branch.dropped = True
        return None

    def _fork(self, branch: Branch, n: int) -> list[Branch]:
        left = n if self.max_candidates is None else min(n, self.max_candidates - self._forked)
        if left < n:
            self.exhausted = "max_candidates"
        self._note("fork", branch.text, n)
        children = []
        for _ in range(left):
            child = Branch((*branch.path, branch.children), list(branch.tokens), branch.text, list(branch.steps))
            child.logprob, child.finished, child.model = branch.logprob, branch.finished, branch.model
            branch.children += 1
            self._origin[child] = self._origin[branch]
            self._samplings[child] = self._samplings.get(branch, self.sampling)
            self.live.add(child)
            children.append(child)
        self._forked += len(children)
        return children

    def _grow(self, branch: Branch, char: str, lp: float) -> None:
        branch.tokens.append(ord(char))
        branch.text += char
        branch.logprob += lp

    def _step(self, branch: Branch, text: str, own: bool) -> None:
        if not text:
            return
        if own or not branch.steps:
            branch.steps.append(text)
        else:
            branch.steps[-1] += text

    def _top(self, branch: Branch, k: int) -> list[tuple[int, float]]:
        best = sorted(self._tables(branch).top(branch.text), key=lambda entry: (-entry[1], ord(entry[0])))[:k]
        return [(ord(char), lp) for char, lp in best]

    def _run(self, branch: Branch, verb: Run) -> Any:
        sampling = verb.sampling or self._samplings.get(branch, self.sampling)
        greedy = sampling.temperature == 0.0
        before, added = branch.text, ""
        first = self._top(branch, verb.top) if verb.top else []
        rest = "" if branch.finished else self._tables(branch).go(before, branch.path[-1] if branch.path else 0, greedy)
        limit = self._samplings.get(branch, self.sampling).max_tokens
        for char in rest:
            if self.exhausted not in (None, "max_candidates"):
                break
            if char == "$":
                branch.finished = "stop"
                break
            self._grow(branch, char, self._tables(branch).lp(branch.text, char))
            added += char
            self.generated += 1
            if self.max_tokens is not None and self.generated >= self.max_tokens:
                self.exhausted = "max_total_tokens"
            if limit is not None and len(branch.tokens) >= limit:
                branch.finished = "length"
                break
            until = verb.until
            if until.separator and until.separator in added:
                break
            if until.tokens is not None and len(added) >= until.tokens:
                break
        self._step(branch, added, verb.until.step)
        self._note("greedy" if greedy else "run", before, added)
        tokens = [ord(char) for char in added]
        return (tokens, first) if verb.top else tokens


def language(rows: Callable[[str], Sequence[tuple[str, float]]], **tables: Any) -> Script:
    """A script whose next characters are drawn from `rows`: text to (character, log-prob). Runs can only be greedy."""

    def row(text: str) -> list[tuple[str, float]]:
        return sorted(rows(text), key=lambda entry: (-entry[1], ord(entry[0])))

    def go(text: str, index: int, greedy: bool) -> str:
        assert greedy, "a language has no noise"
        added = ""
        while len(added) < 100 and not added.endswith("$"):
            added += row(text + added)[0][0]
        return added

    return Script(go=go, top=rows, lp=lambda text, char: dict(rows(text))[char], **tables)


def spy(steps: Steps, seen: list[list[Verb]]) -> Steps:
    """The same search, its yields written down."""
    result: Any = None
    try:
        while True:
            asked = steps.send(result)
            seen.append(asked if isinstance(asked, list) else [asked])
            result = yield asked
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
