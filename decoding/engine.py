"""The engine: requests in, one tick at a time, events out.

    plan   = scheduler.plan()           which positions of which tracks
    propose(plan)                       draft steps, batched over sequences
    rows   = forward(plan)              one packed forward per model
    tokens = decide(plan, rows)         the mix; drafts verified, tokens drawn
    commit(plan, tokens)                append, stop, roll back, fork, free, emit events

Single-threaded: whoever owns the engine calls `submit`, `abort` and `step` in turn.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import torch

from decoding.admit import Hosted, make_group
from decoding.append import append
from decoding.core import (
    AdapterInUse,
    BadRequest,
    Constraint,
    EngineConfig,
    EngineFailure,
    ModelSpec,
    Overloaded,
    Program,
    Request,
    Sampling,
    UnknownModel,
)
from decoding.decide import Decider, Decision
from decoding.events import (
    Delta,
    Done,
    Event,
    Failed,
    Progress,
    PromptLogprobs,
    SearchReport,
    Stats,
    TokenLogprob,
    Usage,
)
from decoding.forwards import Forwards
from decoding.generate import Completion, collect
from decoding.hosting import Rows
from decoding.judge import JudgeHead
from decoding.pace import Clock, Pace
from decoding.plan import Plan, Sample
from decoding.prepare import Entry, prepare
from decoding.propose import Proposer
from decoding.sampling import Drawn, Position, hard_mask
from decoding.scheduler import Scheduler
from decoding.scorers.spec import Remote
from decoding.search import known_searches
from decoding.search.desk import Desk
from decoding.search.host import Host
from decoding.served import Served
from decoding.state import Group, Sequence
from decoding.streams import use_device
from decoding.text import Chat, Prompt, TextModel

logger = logging.getLogger("trimtab.engine")

SEARCH_TOKENS = {"cpu": 32, "cuda": 512}  # of `max_search_tokens`: a CPU pays for every row, a GPU for few


class Engine:
    """Many models, one batch: `Engine(load_models({"base": DIR, ...})).generate(prompts, program)`.

    Takes over the runners: it divides the KV memory between them. `judges`: judge heads by the model that they are
    of; `remotes`: scorers elsewhere, by id. Raises ModelLoadError if the memory is too little, or a model cannot score
    as it is said to.
    """

    def __init__(
        self,
        models: Mapping[str, Hosted],
        config: EngineConfig | None = None,
        judges: Mapping[str, JudgeHead] | None = None,
        remotes: Mapping[str, Remote] | None = None,
    ) -> None:
        config = config or EngineConfig()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.served = served = Served(models, config, judges, remotes)
        self.hosted, self.runners, self.pools = served.hosted, served.runners, served.pools
        self.models = served.models
        self._device = served.device
        if config.max_search_tokens is None:
            config = replace(config, max_search_tokens=SEARCH_TOKENS["cuda" if self._device.type == "cuda" else "cpu"])
        self.config = config
        costs = {id: max(runner.cost, 1e-9) for id, runner in self.runners.items()}
        limits = {id: runner.max_model_len for id, runner in self.runners.items()}
        self.scheduler = Scheduler(self.pools, costs, config, limits)
        self._groups: dict[str, Group] = {}
        self._events: list[Event] = []
        self._serials = itertools.count()
        self._aborts = 0
        generator = torch.Generator(self._device)
        generator.manual_seed(int.from_bytes(os.urandom(7), "little"))
        self._clock = Clock()
        self._pace = Pace(self._clock)
        self._forwards = Forwards(self.runners, self.scheduler, self._clock, self._fail, config.side_streams)
        kernel = _kernel(config, self._device)
        self._proposer = Proposer(self._forwards.run, generator, self._clock, self._pace, kernel)
        self.judges = served.judges
        self._decider = Decider(self._device, generator, lambda id: self.hosted[id].text, self.judges, kernel)
        self._host = Host(
            self.hosted, self.runners, self.scheduler, self.judges, self.catalog, served.make_scorer, self._serials
        )
        self._desk = Desk(self._host)

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises BadRequest if it can never be served, Overloaded if the queue is full."""
        if request.id in self._groups:
            raise BadRequest(f"The request id '{request.id}' is in use.")
        if self.waiting + request.sequences > self.config.max_queue:
            raise Overloaded(f"The queue is full ({self.waiting} sequences wait).", retry_after=1)
        group = make_group(request, next(self._serials), self.hosted, self.pools, self.judges)
        self._groups[request.id] = group
        plan = request.program.search
        if plan is not None:
            emit = functools.partial(self._tell_progress, request.id)
            self._desk.begin(group, known_searches()[plan.kind], emit)
            return
        root, *others = group.sequences
        if root.rows_wanted <= 0:  # nothing to compute: max_tokens 0 and no prompt rows
            self._finish_empty(group)
            return
        group.unforked = others
        self.scheduler.add(root)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory, at any moment; unknown ids are ignored. No event follows."""
        group = self._groups.pop(request_id, None)
        if group is not None:
            self._aborts += 1
            self._drop(group)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._groups or self._events)

    @property
    def waiting(self) -> int:
        """Sequences that are queued, those that wait for their root's prefill included."""
        return len(self.scheduler.waiting) + sum(len(group.unforked) for group in self._groups.values())

    def step(self) -> list[Event]:
        """One tick. Returns what happened, in order."""
        use_device(self._device)  # a step may be another thread's than the one before
        self.scheduler.admit()
        plan = self.scheduler.plan(drafts=self._pace.assign(self.scheduler.running))
        self._proposer.propose(plan)
        rows = self._forwards.run_plan(plan)
        decision = self._decide(plan, rows) if plan.samples else Decision()
        self._commit(plan, decision, rows)
        events, self._events = self._events, []
        return events

    def catalog(self) -> dict[str, Entry]:
        """What is served now, as `prepare` wants it."""
        return self.served.catalog()

    def load_adapter(self, spec: ModelSpec, text: TextModel | None = None) -> None:
        """Serve the adapter `spec` from the next request on, in place of an earlier one with its id.

        `text` is its own text side, by default the model's. Raises ModelLoadError; then nothing has changed.
        """
        self.served.check_adapter(spec)
        self._refuse_while_used(spec.id)
        self.served.load_adapter(spec, text)
        self.models = self.served.models
        self._decider.forget(spec.id)

    def unload_adapter(self, id: str) -> None:
        """Stop serving an adapter. Raises UnknownModel, and AdapterInUse while requests use it."""
        self.served.known_adapter(id)
        self._refuse_while_used(id)
        self.served.unload_adapter(id)
        self.models = self.served.models

    def _refuse_while_used(self, id: str) -> None:
        users = [g for g in self._groups.values() if id in _adapters(g) | self._desk.adapters(g)]
        if users:
            raise AdapterInUse(f"The adapter '{id}' is in use by {len(users)} requests; wait for them or abort them.")

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.scheduler.check()

    def stats(self) -> Stats:
        """A snapshot for metrics."""
        s, models = self.scheduler, self._forwards.stats(self.pools)
        return Stats(len(s.running), self.waiting, s.tick, s.preemptions, self._aborts, models, self._pace.stats())

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        program: Program | str | None = None,
        sampling: Sampling | None = None,
        *,
        n: int = 1,
        prediction: str | None = None,
        constraint: Callable[[], Constraint] | None = None,
    ) -> list[Completion]:
        """Complete all prompts in one batch; returns n completions per prompt, in order.

        prompts: texts, `Chat`s or tuples of token ids. program: of `decoding.strategies`, or a model's id for that
        model alone; by default the first model. Raises BadRequest as the server would answer 400.
        """
        if isinstance(prompts, str | Chat) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        if not isinstance(program, Program):
            program = Program.plain(program or next(iter(self.hosted)))
        catalog = self.catalog()
        extra: dict[str, Any] = {"n": n, "prediction": prediction, "constraint": constraint}
        requests = [prepare(program, p, sampling or Sampling(), catalog, **extra) for p in prompts]  # type: ignore[arg-type]
        for request in requests:
            self.submit(request)
        return collect(self.step, requests)

    # -- the tick's stages --------------------------------------------------------------------------------------

    def _decide(self, plan: Plan, rows: Mapping[str, Rows]) -> Decision:
        """Tokens for the sequences that are due. If a batch fails, its requests are tried one by one."""
        began = time.perf_counter()
        try:
            decision = self._decider.decide(plan.samples, rows)
        except Exception:
            logger.exception("a batch could not be sampled; its requests are tried one by one")
            decision = Decision()
            for sample in plan.samples:
                self._decide_alone(sample, rows, decision)
        else:
            if self._device.type != "cuda":  # there it waits for the forwards, which have been timed
                self._clock.saw("decide", sum(sample.count for sample in plan.samples), time.perf_counter() - began)
        return decision

    def _decide_alone(self, sample: Sample, rows: Mapping[str, Rows], decision: Decision) -> None:
        """Decide for one sequence; if that fails, its request does."""
        if sample.sequence.finished:
            return
        try:
            own = self._decider.decide([sample], rows)
        except Exception as error:
            logger.exception("request %s could not be sampled", sample.sequence.group.request.id)
            self._fail(sample.sequence.group, f"Sampling failed: {type(error).__name__}.")
            return
        decision.tokens |= own.tokens
        decision.weights |= own.weights
        decision.scored += own.scored
        decision.told |= own.told
        decision.fed |= own.fed

    def _commit(self, plan: Plan, decision: Decision, rows: Mapping[str, Rows]) -> None:
        """Append tokens, move the tracks on, then end and fork: what is full is published before it is freed."""
        for model, found in rows.items():
            self._desk.read(plan.spans[model], found)
        for group, entries in decision.scored:
            self._add_prompt_logprobs(group, entries)
        deltas: list[tuple[Sequence, Delta]] = []
        for sample in plan.samples:
            sequence = sample.sequence
            if sequence.finished:
                continue
            sequence.next_row = sample.first + sample.count - sample.drafts
            if sequence.goal is not None:
                sequence.goal.told = decision.told.get(sequence, sequence.goal.told)
                sequence.goal.fed += decision.fed.get(sequence, ())
            if sequence in decision.tokens:
                delta = self._append(sequence, decision.tokens[sequence], decision.weights.get(sequence))
                if delta is not None:
                    deltas.append((sequence, delta))
        self.scheduler.commit(plan)
        for sequence, delta in deltas:
            if sequence.finished:
                continue  # another choice of the request has failed in this very tick
            group = sequence.group
            if group in self._desk:
                self._desk.saw(sequence, delta)
                continue
            if group.unforked and sequence is group.sequences[0]:
                self._fork_children(group)
            if delta.finish_reason is None:
                self._events.append(delta)
            else:
                self._finish(sequence, delta)
        self._go_on(plan)
        for sample in plan.samples:
            group = sample.sequence.group
            if group.max_output == 0 and sample.sequence.next_row >= -1 and not sample.sequence.finished:
                self._finish_empty(group)

    def _add_prompt_logprobs(self, group: Group, entries: list[TokenLogprob]) -> None:
        """Keep them until the prompt is complete, then send them, once."""
        if group.prompt_logprobs is None or group.request.id not in self._groups:
            return
        group.prompt_logprobs += entries
        if len(group.prompt_logprobs) == len(group.request.prompts[0]):
            self._events.append(PromptLogprobs(group.request.id, tuple(group.prompt_logprobs)))
            group.prompt_logprobs = None

    def _append(self, sequence: Sequence, drawn: Seq[Drawn], weights: Seq[Seq[float]] | None) -> Delta | None:
        """Append what was drawn, up to the first stop; what is told of it, None if the request failed."""
        group = sequence.group
        if any(each.token is None for each in drawn):
            self._fail_empty(Position(sequence, tuple(each.token for each in drawn if each.token is not None)))
            return None
        drafted = len(sequence.draft.tokens) if sequence.draft else 0
        try:
            delta = append(sequence, drawn, weights)
        except Exception as error:  # of a constraint, which is not ours
            logger.exception("request %s: a token could not be appended", group.request.id)
            self._fail(group, f"The request's constraint failed: {type(error).__name__}.")
            return None
        self._host.tell_drafter(sequence, delta.token_ids)
        group = group.payer
        group.completion_tokens += len(delta.token_ids)
        group.passes += 1
        if drafted:
            self._pace.learn(sequence, drafted, sum(each.accepted is not None for each in drawn))
            group.drafted += drafted
            group.accepted += sum(each.accepted is not None for each in drawn[: len(delta.token_ids)])
        return delta

    def _fail_empty(self, at: Position) -> None:
        """Nothing may come at this place."""
        group = at.sequence.group
        if hard_mask(at, group.width, self._device) is None:
            models = ", ".join(group.request.program.models)
            self._fail(group, f"The logits of {models} hold no finite number here.")
        else:
            self._fail(group, "No token is allowed at this point: the request's masks leave none.", "BadRequest")

    def _fork_children(self, group: Group) -> None:
        """The root's prompt is computed: its siblings start on the same blocks."""
        children, group.unforked = group.unforked, []
        for child in children:
            for model, source, target in self.scheduler.fork(group.sequences[0], child):
                self.runners[model].copy_blocks([(source, target)])

    def _finish_empty(self, group: Group) -> None:
        """Nothing was to be generated: every choice ends without a token."""
        for sequence in group.sequences:
            self._finish(sequence, Delta(group.request.id, sequence.index, (), "", finish_reason="length"))

    def _finish(self, sequence: Sequence, delta: Delta) -> None:
        """The sequence's last delta, with the text that was held back; the request's end if it was the last one."""
        group, text = sequence.group, sequence.text
        if text.matched is None:
            delta = replace(delta, text=delta.text + text.finish())
            if text.stopped():
                delta = replace(delta, finish_reason="stop", stop_reason=text.matched)
        sequence.finished = True
        self.scheduler.remove(sequence)
        self._events.append(delta)
        if all(each.finished for each in group.sequences):
            self._end(group)

    def _end(self, group: Group, search: SearchReport | None = None) -> None:
        """Everything has been told of the request but what it cost."""
        usage = Usage(
            len(group.request.prompts[0]),
            group.completion_tokens,
            group.cached_tokens,
            group.preemptions,
            tuple(group.forwards.items()),
            group.drafted,
            group.accepted,
            group.passes,
            search,
        )
        self._events.append(Done(group.request.id, usage))
        del self._groups[group.request.id]

    def _fail(
        self,
        group: Group,
        message: str,
        kind: Literal["BadRequest", "UnknownModel", "EngineFailure"] = "EngineFailure",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        group = group.payer
        if self._groups.pop(group.request.id, None) is not None:
            self._drop(group)
            self._events.append(Failed(group.request.id, kind, message, param, code))

    def _drop(self, group: Group) -> None:
        try:
            self._desk.drop(group)
        except Exception:
            logger.exception("request %s: its search did not end cleanly", group.request.id)
        group.unforked = []
        for sequence in group.sequences:
            sequence.finished = True
            self.scheduler.remove(sequence)

    # -- searches -----------------------------------------------------------------------------------------------

    def _tell_progress(self, request_id: str, message: str, numbers: Mapping[str, float]) -> None:
        self._events.append(Progress(request_id, message, tuple(numbers.items())))

    def _go_on(self, plan: Plan) -> None:
        """Searches go on, in a fixed order, some to their end."""
        for group, found in self._desk.go_on(idle=not plan.spans):
            if isinstance(found, BadRequest):
                kind: Any = "UnknownModel" if isinstance(found, UnknownModel) else "BadRequest"
                self._fail(group, found.message, kind, found.param, found.code)
            elif isinstance(found, EngineFailure):
                self._fail(group, str(found))
            elif isinstance(found, Exception):
                logger.error("request %s: its search failed", group.request.id, exc_info=found)
                self._fail(group, f"The search failed: {type(found).__name__}.")
            else:
                self._drop(group)
                deltas, report = found
                self._events += deltas
                self._end(group, report)


def _kernel(config: EngineConfig, device: torch.device) -> bool | None:
    """What mixes and samples, as `decoding.mix.mix` takes it."""
    if config.kernels == "auto":
        return True if device.type == "cuda" and find_spec("triton") is not None else None
    return {"host": None, "triton": True, "reference": False}[config.kernels]


def _adapters(group: Group) -> set[str | None]:
    """Adapters that the request uses, to draft too."""
    drafting = {s.draft.own.adapter for s in group.sequences if s.draft is not None and s.draft.own is not None}
    return drafting | {term.role.adapter for term in group.policy.terms}
