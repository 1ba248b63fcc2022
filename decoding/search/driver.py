"""Runs one search: its generator's verbs become goals of hypotheses, in the same batch as everything else.

After every tick the engine calls `advance`. Each verb is work that is asked once a tick whether it is done; when all of
a yield is, the search is resumed with the results. What needs no forward (forks of a computed text, feeding, rules)
takes no tick.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from decoding.core import AcceptKind, BadRequest, Sampling, Speculation
from decoding.draft import MAX_DRAFTS
from decoding.events import Delta, TokenLogprob
from decoding.lookup import Lookup, Source
from decoding.scorers.spec import Hypothesis
from decoding.search.common import spent
from decoding.search.host import Host
from decoding.search.scoring import Scoring, Streams, Work, together
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Drop, Feed, Fork, Judge, Open, Outcome, Probe, Run, Score, Top, Verb
from decoding.state import Budget, Draft, Goal, Group, Stream
from decoding.state import Sequence as State
from decoding.text import Prompt

MAX_BRANCHES = 1024  # at a time, of a search without a bound on all that it ever forks and opens
REALIGN = 3  # tokens that must agree for a text to go on with drafts after it has left them
Emit = Callable[[str, dict[str, float]], None]


@dataclass(slots=True, eq=False)
class Node:
    """A branch's side in the engine.

    within: the bound on branches had room for it. streams: what scorers have read of it. told: its deltas, for the
    winner's. nexts: after how many tokens the next ones were last asked for, and their log-probs.
    """

    branch: Branch
    state: State
    prompt: Prompt
    within: bool = True
    streams: Streams = field(default_factory=dict)
    told: list[Delta] = field(default_factory=list)
    nexts: tuple[int, dict[int, float]] = (-1, {})


class Driver:
    """One running search; to its generator it is the `Search` of `decoding.search.verbs`."""

    def __init__(self, group: Group, kind: SearchKind, host: Host, emit: Emit) -> None:
        request, plan = group.request, group.request.program.search
        assert plan is not None, "the engine has looked"
        self.group, self.kind, self.plan = group, kind, plan
        self.prompt: Prompt = request.prompt
        self.sampling, self.n = request.sampling, request.n
        self.rng = random.Random(os.urandom(16) if request.sampling.seed is None else request.sampling.seed)
        self.exhausted: str | None = None
        self.outcome: Outcome | None = None
        self.branches = 0
        self.scored: dict[str, int] = {}  # tokens that scorers' models computed, by model
        self.nodes: dict[Branch, Node] = {}
        self.scoring = Scoring(group, host)
        self._host, self._emit = host, emit
        self._of: dict[State, Node] = {}
        self._tokens = Budget(plan.max_total_tokens)
        self._left = Budget(MAX_BRANCHES if plan.max_candidates is None else plan.max_candidates)
        self._deadline = None if plan.max_seconds is None else time.monotonic() + plan.max_seconds
        self._opened = 0
        self._root: Branch | None = None
        self._steps = kind.run(self, plan.params)
        self._work: Work | None = None
        self._batch = False

    # -- what the generator sees ----------------------------------------------------------------------------------

    @property
    def root(self) -> Branch:
        """The branch of the request's own prompt and program; made when it is first asked for."""
        if self._root is None:
            (state,) = self.group.sequences
            self._host.rest(state)
            self._root = self._register(state, self.prompt, Branch(model=self.group.request.text_model))
        return self._root

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text."""
        request = self.group.request
        own = () if request.sampling.ignore_eos else request.eos_ids
        return frozenset((*own, *request.sampling.stop_token_ids))

    @property
    def prompt_tokens(self) -> int:
        """How long the root's prompt is, as its main role reads it."""
        return len(self.group.request.prompts[0])

    def same_ids(self, a: Branch, b: Branch) -> bool:
        """Whether both branches' models have one tokenizer, so that tokens of one may be fed to the other."""
        return self._host.same_ids(a.model, b.model)

    def progress(self, message: str, **numbers: float) -> None:
        """Told to clients that asked for it."""
        if self.plan.progress:
            self._emit(message, numbers)

    # -- what the engine calls ------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Go as far as is possible without another tick. Raises what the search, a scorer or a constraint raises."""
        self._look_at_budgets()
        answer: Any = None
        while self.outcome is None:
            if self._work is not None:
                try:
                    next(self._work)
                    return
                except StopIteration as end:
                    answer = end.value if self._batch else end.value[0]
            try:
                asked = self._steps.send(answer)
            except StopIteration as end:
                self.outcome = end.value
                return
            self._batch = isinstance(asked, list)
            self._work = together([self._start(verb) for verb in (asked if isinstance(asked, list) else [asked])])

    def saw(self, state: State, delta: Delta) -> None:
        """A hypothesis has become longer."""
        node = self._of[state]
        branch, text = node.branch, delta.text
        if delta.finish_reason is not None:
            if not state.text.stopped():
                text += state.text.finish()
            if state.text.stopped():
                delta = replace(delta, finish_reason="stop", stop_reason=state.text.matched)
            branch.finished, branch.stop_reason = delta.finish_reason, delta.stop_reason
        branch.tokens += delta.token_ids
        branch.text += text
        branch.logprob += sum(entry.logprob for entry in delta.logprobs)
        node.told.append(delta)

    def read(self, stream: Stream, marks: Sequence[int], rows: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """Rows [m, W] of a scorer's text at `marks`, and hidden states [m, H] if they were asked for."""
        for i, mark in enumerate(marks):
            stream.read[mark] = (rows[i].float(), None if hidden is None else hidden[i].float())
        stream.marks = [mark for mark in stream.marks if mark not in stream.read]

    def states(self) -> list[State]:
        """Everything that it has in the engine."""
        return [state for node in self.nodes.values() for state in (node.state, *node.streams.values())]

    @property
    def generated(self) -> int:
        """Tokens of all hypotheses."""
        return self.group.completion_tokens

    def close(self) -> None:
        """Give everything up; the search's own clean-up may run."""
        self._steps.close()
        if self._work is not None:
            self._work.close()
        for node in list(self.nodes.values()):
            self._forget(node)

    def text_of(self, branch: Branch) -> str:
        """The branch's text as its tokens decode, bytes of an unfinished character included."""
        node = self.nodes.get(branch)
        return branch.text if branch.finished or node is None else branch.text + node.state.text.fork().finish()

    def told_of(self, branch: Branch) -> list[Delta]:
        """The deltas of the branch, if it was not dropped."""
        node = self.nodes.get(branch)
        return [] if node is None else node.told

    # -- verbs ----------------------------------------------------------------------------------------------------

    def _start(self, verb: Verb) -> Work:
        if isinstance(verb, Open):
            return self._open(verb)
        if isinstance(verb, Judge):
            return self._judge(verb)
        node = self.nodes[verb.branch]
        match verb:
            case Fork():
                return self._fork(node, verb.n)
            case Feed():
                return self._feed(node, verb)
            case Top():
                return self._top(node, verb.k)
            case Run():
                return self._run(node, verb)
            case Score():
                return self.scoring.score(verb.scorer, _seen(node), node.streams)
            case Probe():
                return self._probe(node, verb)
            case Drop():
                return self._drop(node)

    def _open(self, verb: Open) -> Work:
        yield from ()
        try:
            state = self._host.open(self.group, verb.prompt, verb.program, verb.sampling or self.sampling)
        except BadRequest as error:
            if verb.optional and error.code == "context_length_exceeded":
                return None
            raise
        within = bool(self._left.take())
        self._opened += 1
        state.path = (-self._opened,)
        branch = Branch(state.path, model=state.group.request.text_model)
        made = self._register(state, verb.prompt, branch, within)
        if not within:
            self.exhausted = self.exhausted or "max_candidates"
            branch.finished = "length"  # it is there to be asked, and nothing is ever written on it
        return made

    def _fork(self, node: Node, n: int) -> Work:
        state, branch = node.state, node.branch
        count = self._left.take(n)
        if count < n:
            self.exhausted = self.exhausted or "max_candidates"
        if count > 1 and any(state.target(track) - track.num_computed > 1 for track in state.tracks):
            yield from self._reach(node, Goal())  # once, for all of them
        children = []
        for _ in range(count):
            child = replace(
                branch,
                path=(*branch.path, branch.children),
                tokens=list(branch.tokens),
                steps=list(branch.steps),
                children=0,
            )
            branch.children += 1
            made = self._register(self._host.copy(state, child.path), node.prompt, child)
            mine = self.nodes[made]
            mine.told, mine.nexts = list(node.told), node.nexts
            mine.streams = {key: self._host.copy_stream(stream) for key, stream in node.streams.items()}
            children.append(made)
        return children

    def _feed(self, node: Node, verb: Feed) -> Work:
        state, branch = node.state, node.branch
        tokens: Sequence[int] = self._host.encode(branch.model, verb.tokens, first=not state.output)
        if branch.finished or not tokens:
            return [] if verb.logprobs else None
        before, text = len(state.output), branch.text
        state.goal = Goal(budget=self._tokens)
        delta = self._host.feed(state, tokens)
        at, known = node.nexts
        if delta.token_ids and not verb.logprobs:
            first = delta.token_ids[0]
            here = known if at == before else {}
            lp = here.get(first, verb.lp)
            best = tuple(here.items())[: self.sampling.logprobs or 0]
            delta = delta if lp is None else replace(delta, logprobs=(TokenLogprob(first, lp, best),))
        self.group.completion_tokens += len(delta.token_ids)
        self.saw(state, delta)
        self._step(branch, branch.text[len(text) :], verb.step)
        if not verb.logprobs:
            return None
        state.next_row = before - 1
        yield from self._reach(node, goal := Goal())
        branch.logprob += sum(goal.fed)
        return goal.fed

    def _top(self, node: Node, k: int) -> Work:
        if node.branch.finished:
            return []
        told = max(k, self.sampling.logprobs or 0)  # what is fed then may have to be told with the best beside it
        yield from self._reach(node, goal := Goal(row=True, top=told))
        assert goal.told is not None, "its row was mixed"
        node.nexts = (len(node.state.output), dict(goal.told.top))
        return goal.told.top[:k]

    def _run(self, node: Node, verb: Run) -> Work:
        state, branch = node.state, node.branch
        start, text = len(branch.tokens), branch.text
        goal = Goal(draws=True, separator=verb.until.separator, budget=self._tokens, top=verb.top)
        goal.length = None if verb.until.tokens is None else start + max(1, verb.until.tokens)
        if not branch.finished and not spent(self):
            state.sampling = _drawn_as(state.group.request.sampling, verb.sampling)
            drafter = state.draft
            if verb.drafts:
                self._host.rest_drafter(state)
                state.draft = _drafts(state, verb.drafts)
            yield from self._reach(node, goal)
            state.draft, state.sampling = drafter, state.group.request.sampling
            if verb.drafts:
                self._host.tell_drafter(state, branch.tokens[start:])
            self._step(branch, branch.text[len(text) :], verb.until.step)
        tokens = branch.tokens[start:]
        return (tokens, goal.told.top if goal.told else []) if verb.top else tokens

    def _probe(self, node: Node, verb: Probe) -> Work:
        model = node.branch.model
        choices = tuple(self._host.first_token(model, choice) for choice in verb.choices)
        child = self._host.copy(node.state, node.branch.path)
        try:
            request = child.group.request
            if node.branch.finished == "stop" and child.output and child.output[-1] in request.eos_ids:
                child.output.pop()
            child.output += self._host.encode(model, verb.suffix)
            self._host.check_length(child)
            child.next_row = len(child.output) - 1
            mine = Node(node.branch, child, node.prompt)
            yield from self._reach(mine, goal := Goal(row=True, choices=choices))
            assert goal.told is not None, "its row was mixed"
            return goal.told.choices
        finally:
            self._host.remove(child)

    def _judge(self, verb: Judge) -> Work:
        streams: Streams = {}
        try:
            return (yield from self.scoring.score(verb.scorer, verb.text, streams))
        finally:
            for stream in streams.values():
                self._host.remove(stream)

    def _drop(self, node: Node) -> Work:
        yield from ()
        self._forget(node)

    # -- helpers --------------------------------------------------------------------------------------------------

    def _reach(self, node: Node, goal: Goal) -> Work:
        """Work on a resting hypothesis until its goal is reached; runs end early when a budget is used up."""
        state = node.state
        state.goal = goal
        self._host.resume(state)
        yield
        while not self._reached(state, goal):
            yield
        self._host.rest(state)
        state.next_row = len(state.output) - 1

    def _reached(self, state: State, goal: Goal) -> bool:
        if goal.draws:
            return goal.ended or spent(self)
        return state.rows_wanted <= 0 and all(track.num_computed >= state.target(track) for track in state.tracks)

    def _register(self, state: State, prompt: Prompt, branch: Branch, within: bool = True) -> Branch:
        node = Node(branch, state, prompt, within)
        if state.group.max_output == 0:
            branch.finished = "length"
        self.nodes[branch] = self._of[state] = node
        self.branches += within
        return branch

    def _forget(self, node: Node) -> None:
        if self.nodes.pop(node.branch, None) is None:
            return
        del self._of[node.state]
        if self.plan.max_candidates is None and self._left.left is not None and node.within:
            self._left.left += 1
        node.branch.dropped = True
        for state in (node.state, *node.streams.values()):
            self._host.remove(state)

    def _step(self, branch: Branch, text: str, own: bool) -> None:
        """`text` was added, as a step of its own or to the last one."""
        if not text:
            return
        if own or not branch.steps:
            branch.steps.append(text)
        else:
            branch.steps[-1] += text

    def _look_at_budgets(self) -> None:
        if not spent(self) and self._tokens.left == 0:
            self.exhausted = "max_total_tokens"
        if not spent(self) and self._deadline is not None and time.monotonic() >= self._deadline:
            self.exhausted = "max_seconds"


def _seen(node: Node) -> Hypothesis:
    branch = node.branch
    done = branch.finished == "stop"
    return Hypothesis(node.prompt, tuple(branch.steps), done, branch.logprob, len(branch.tokens))


def _drawn_as(own: Sampling, other: Sampling | None) -> Sampling:
    """`own`, its tokens drawn as `other` says."""
    if other is None:
        return own
    return replace(own, temperature=other.temperature, top_k=other.top_k, top_p=other.top_p, min_p=other.min_p)


def _drafts(state: State, tokens: Sequence[int]) -> Draft:
    """Drafts for one run that change no result: `tokens`, and what stands in them when the text comes back to them."""
    accept: AcceptKind = "rejection" if state.group.seed is None else "coupled"
    spec = Speculation("prediction", tokens=min(len(tokens), MAX_DRAFTS), accept=accept)
    context = [*state.group.request.prompts[0][-REALIGN:], *state.output[-REALIGN:]]
    lookup = Lookup(context, Source(list(tokens)), REALIGN, predicted=True)
    return Draft(spec, lookup=lookup)
