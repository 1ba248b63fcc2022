"""The engine: requests in, one tick at a time, events out.

    plan   = scheduler.plan()           which positions of which tracks
    rows   = forward(plan)              one packed forward per model
    z      = mix(rows, weights)         the policy, fp32
    tokens = verify(z, sampling)        one token per sequence
    commit(plan, tokens)                append, stop, fork, free, emit events

Single-threaded: whoever owns the engine calls `submit`, `abort` and `step` in turn.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Literal

import torch

from decoding.admit import Hosted, make_group
from decoding.core import (
    AdapterInUse,
    BadRequest,
    Delta,
    Done,
    EngineConfig,
    Event,
    Failed,
    FinishReason,
    ModelInfo,
    ModelLoadError,
    ModelSpec,
    ModelStats,
    Overloaded,
    Policy,
    Program,
    PromptLogprobs,
    Request,
    Role,
    Rows,
    Sampling,
    SpanInput,
    Stats,
    Term,
    TokenLogprob,
    UnknownModel,
    Usage,
)
from decoding.generate import Completion, collect
from decoding.kv import BlockPool
from decoding.memory import divide_kv
from decoding.mix import mix
from decoding.prepare import Entry, prepare
from decoding.sampling import Drawn, hard_mask, log_softmax_rows, token_logprobs, verify
from decoding.scheduler import Scheduler
from decoding.state import Group, Plan, Sample, Sequence, Span
from decoding.text import Chat, Prompt, TextModel
from decoding.trace import Chosen, trace

logger = logging.getLogger("trimtab.engine")


class Engine:
    """Many models, one batch: `Engine(load_models({"base": DIR, ...})).generate(prompts, program)`.

    Takes over the runners: it divides the KV memory between them. Raises ModelLoadError if that is too little.
    """

    def __init__(self, models: Mapping[str, Hosted], config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.hosted = dict(models)
        self.runners = {id: model.runner for id, model in models.items() if model.adapter is None}
        self.pools: dict[str, BlockPool] = {}
        for id, blocks in divide_kv(self.runners, {i: models[i].kv_memory for i in self.runners}, self.config).items():
            self.runners[id].allocate(blocks, self.config.block_size)
            self.runners[id].warm_up()
            self.pools[id] = BlockPool(blocks, self.config.block_size)
        costs = {id: max(runner.cost, 1e-9) for id, runner in self.runners.items()}
        self.scheduler = Scheduler(self.pools, costs, self.config)
        self.models = tuple(self._info(id) for id in self.hosted)
        self._groups: dict[str, Group] = {}
        self._events: list[Event] = []
        self._serial = 0
        self._aborts = 0
        self._forwards = dict.fromkeys(self.runners, 0)
        self._tokens = dict.fromkeys(self.runners, 0)
        self._seconds = dict.fromkeys(self.runners, 0.0)
        self._device = next(iter(self.runners.values())).device
        self._word_starts: dict[tuple[str, int], torch.Tensor] = {}
        self._generator = torch.Generator(self._device)
        self._generator.manual_seed(int.from_bytes(os.urandom(7), "little"))

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises BadRequest if it can never be served, Overloaded if the queue is full."""
        if request.id in self._groups:
            raise BadRequest(f"The request id '{request.id}' is in use.")
        if self.waiting + request.n > self.config.max_queue:
            raise Overloaded(f"The queue is full ({self.waiting} sequences wait).", retry_after=1)
        group = make_group(request, self._serial, self.hosted, self.pools)
        self._serial += 1
        self._groups[request.id] = group
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
        plan = self.scheduler.plan()
        rows = self._forward(plan)
        drawn: dict[Sequence, Drawn] = {}
        if plan.samples:
            try:
                drawn = self._decide(plan.samples, rows)
            except Exception:
                logger.exception("a batch could not be sampled; its requests are tried one by one")
                for sample in plan.samples:
                    drawn |= self._decide_alone(sample, rows)
        self._commit(plan, drawn)
        events, self._events = self._events, []
        return events

    def load_adapter(self, spec: ModelSpec, text: TextModel | None = None) -> None:
        """Serve the adapter `spec` from the next request on, in place of an earlier one with its id.

        `text` is its own text side, by default the model's. Raises ModelLoadError; then nothing has changed.
        """
        taken = self.hosted.get(spec.id)
        base = self.hosted.get(spec.of or "")
        if base is None or base.adapter is not None:
            raise ModelLoadError(f"The adapter '{spec.id}' is of '{spec.of}', which is no model that is served.")
        if taken is not None and (taken.adapter is None or taken.adapter.of != spec.of):
            raise ModelLoadError(f"The id '{spec.id}' is taken.")
        self._refuse_while_used(spec.id)
        info = base.runner.load_adapter(spec.id, spec.path)
        self._word_starts = {key: mask for key, mask in self._word_starts.items() if key[0] != spec.id}
        self.hosted[spec.id] = Hosted(base.runner, text or base.text, adapter=info)
        self.models = tuple(self._info(id) for id in self.hosted)

    def unload_adapter(self, id: str) -> None:
        """Stop serving an adapter. Raises UnknownModel, and AdapterInUse while requests use it."""
        held = self.hosted.get(id)
        if held is None or held.adapter is None:
            raise UnknownModel(id, [each for each, model in self.hosted.items() if model.adapter is not None])
        self._refuse_while_used(id)
        held.runner.unload_adapter(id)
        del self.hosted[id]
        self.models = tuple(self._info(each) for each in self.hosted)

    def _refuse_while_used(self, id: str) -> None:
        users = [g for g in self._groups.values() if any(term.role.adapter == id for term in g.policy.terms)]
        if users:
            raise AdapterInUse(f"The adapter '{id}' is in use by {len(users)} requests; wait for them or abort them.")

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.scheduler.check()

    def stats(self) -> Stats:
        """A snapshot for metrics."""
        models = tuple(
            ModelStats(
                model,
                self._forwards[model],
                self._tokens[model],
                self._seconds[model],
                pool.used,
                pool.hits,
                pool.queries,
            )
            for model, pool in self.pools.items()
        )
        s = self.scheduler
        return Stats(len(s.running), self.waiting, s.tick, s.preemptions, self._aborts, models)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        program: Program | str | None = None,
        sampling: Sampling | None = None,
        *,
        n: int = 1,
    ) -> list[Completion]:
        """Complete all prompts in one batch; returns n completions per prompt, in order.

        prompts: texts, `Chat`s or tuples of token ids. program: of `decoding.strategies`, or a model's id for that
        model alone; by default the first model. Raises BadRequest as the server would answer 400.
        """
        if isinstance(prompts, str | Chat) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        if not isinstance(program, Program):
            program = Program("plain", Policy((Term("base", Role(program or next(iter(self.hosted)))),)))
        catalog = {info.id: Entry(self.hosted[info.id].text, info) for info in self.models}
        requests = [prepare(program, p, sampling or Sampling(), catalog, n=n) for p in prompts]  # type: ignore[arg-type]
        for request in requests:
            self.submit(request)
        return collect(self.step, requests)

    # -- the tick's stages --------------------------------------------------------------------------------------

    def _forward(self, plan: Plan) -> dict[str, Rows]:
        """One packed forward per model. A forward that fails takes down the requests in it, nothing else."""
        rows: dict[str, Rows] = {}
        # All inputs first: a failed request gives its blocks back, and other models' forwards still name them.
        inputs = {model: [_span_input(span) for span in spans] for model, spans in plan.spans.items()}
        for model, spans in plan.spans.items():
            began = time.perf_counter()
            try:
                rows[model] = self.runners[model].forward(inputs[model])
            except Exception as error:
                logger.exception("the forward of '%s' failed", model)
                for group in {span.sequence.group for span in spans}:
                    self._fail(group, f"The forward pass of '{model}' failed: {type(error).__name__}.")
                continue
            self._seconds[model] += time.perf_counter() - began
            self._forwards[model] += 1
            self._tokens[model] += sum(span.count for span in spans)
            for group in {span.sequence.group for span in spans}:
                group.forwards[model] = group.forwards.get(model, 0) + 1
        for model in plan.spans:
            plan.spans[model] = [span for span in plan.spans[model] if not span.sequence.finished]
        plan.samples = [sample for sample in plan.samples if not sample.sequence.finished]
        return rows

    def _decide(self, samples: Seq[Sample], rows: Mapping[str, Rows]) -> dict[Sequence, Drawn]:
        """Mix, score prompts, draw: what each sequence that is due got."""
        mixed = mix(samples, rows, self._allowed, self._starts)
        scored = self._score_prompts(samples, mixed.z)
        due: dict[Sequence, int] = {}  # sequence -> its row of the mix that draws a token
        row = 0
        for sample in samples:
            row += sample.count
            sequence = sample.sequence
            if sample.first + sample.count == len(sequence.output) and sequence.group.max_output:
                due[sequence] = row - 1
        drawn: dict[Sequence, Drawn] = {}
        if due:
            index = list(due.values())
            z = mixed.z if len(index) == len(mixed.z) else mixed.z[index]
            drawn = dict(zip(due, verify(z, list(due), self._generator), strict=True))
            _trace(samples, drawn, mixed.weights, rows)
            _advance_solvers(drawn, {sequence: mixed.weights.get(at) for sequence, at in due.items()})
        for group, entries in scored:  # not before all of it has gone well: a batch that failed is tried again
            self._add_prompt_logprobs(group, entries)
        return drawn

    def _decide_alone(self, sample: Sample, rows: Mapping[str, Rows]) -> dict[Sequence, Drawn]:
        """`_decide` for one sample; if that fails, its request does."""
        if sample.sequence.finished:
            return {}
        try:
            return self._decide([sample], rows)
        except Exception as error:
            logger.exception("request %s could not be sampled", sample.sequence.group.request.id)
            self._fail(sample.sequence.group, f"Sampling failed: {type(error).__name__}.")
            return {}

    def _allowed(self, sample: Sample, i: int) -> torch.Tensor | None:
        """Ids that hard constraints leave at the sample's i-th row; those that score the prompt have none."""
        if sample.first + i < len(sample.sequence.output) - 1:
            return None
        return hard_mask(sample.sequence, sample.sequence.group.width, self._device)

    def _starts(self, model: str, width: int) -> torch.Tensor:
        """Ids that begin a new word of `model`'s text, or end it: [width] bool. Made once per model and width."""
        if (model, width) not in self._word_starts:
            text = self.hosted[model].text
            size = len(text.vocabulary.tokens)
            begins = [i < size and text.vocabulary.token_bytes(i)[:1] in (b" ", b"\n") for i in range(width)]
            mask = torch.tensor(begins, device=self._device)
            mask[torch.tensor([i for i in text.eos_ids if i < width], dtype=torch.int64, device=self._device)] = True
            self._word_starts[model, width] = mask
        return self._word_starts[model, width]

    def _score_prompts(self, samples: Seq[Sample], z: torch.Tensor) -> list[tuple[Group, list[TokenLogprob]]]:
        """Log-probs of the prompt ids that z's rows [S, W] predict, of requests that ask for them."""
        found: list[tuple[Group, list[TokenLogprob]]] = []
        row = 0
        for sample in samples:
            group, k = sample.sequence.group, sample.sequence.group.request.sampling.prompt_logprobs
            prompt = group.request.prompts[0]
            scored = min(sample.count, -1 - sample.first)  # rows that predict a prompt id
            if k is not None and group.prompt_logprobs is not None and scored > 0:
                at = len(prompt) + sample.first + 1
                lp = log_softmax_rows(z, list(range(row, row + scored)))
                found.append((group, token_logprobs(lp, prompt[at : at + scored], k)))
            row += sample.count
        return found

    def _add_prompt_logprobs(self, group: Group, entries: list[TokenLogprob]) -> None:
        """Keep them until the prompt is complete, then send them, once."""
        assert group.prompt_logprobs is not None
        group.prompt_logprobs += entries
        if len(group.prompt_logprobs) == len(group.request.prompts[0]):
            self._events.append(PromptLogprobs(group.request.id, tuple(group.prompt_logprobs)))
            group.prompt_logprobs = None

    def _commit(self, plan: Plan, drawn: Mapping[Sequence, Drawn]) -> None:
        self.scheduler.commit(plan)
        for sample in plan.samples:
            sequence, group = sample.sequence, sample.sequence.group
            if group.request.id not in self._groups:
                continue  # another choice of the request failed in this very loop
            sequence.next_row = sample.first + sample.count
            if sequence in drawn:
                self._append(sequence, drawn[sequence])
            elif group.max_output == 0 and sequence.next_row >= -1:
                self._finish_empty(group)

    def _append(self, sequence: Sequence, drawn: Drawn) -> None:
        group, sampling = sequence.group, sequence.group.request.sampling
        if drawn.token is None:
            if hard_mask(sequence, group.width, self._device) is None:
                models = ", ".join(group.request.program.models)
                self._fail(group, f"The logits of {models} hold no finite number here.")
            else:
                self._fail(group, "No token is allowed at this point: the request's masks leave none.", "BadRequest")
            return
        token = drawn.token
        sequence.output.append(token)
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
        group.completion_tokens += 1
        if group.unforked and sequence is group.sequences[0]:
            self._fork_children(group)
        shown, reason, stop_reason = _progress(sequence, token)
        logprobs = (drawn.logprob,) if drawn.logprob is not None and sampling.logprobs is not None else ()
        trace = (drawn.trace,) if drawn.trace is not None else ()
        delta = Delta(group.request.id, sequence.index, (token,), shown, logprobs, reason, stop_reason, trace)
        if reason is None:
            self._events.append(delta)
        else:
            self._finish(sequence, delta)

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
        request = group.request
        self._events.append(delta)
        if all(each.finished for each in group.sequences):
            prompt = len(request.prompts[0])
            forwards = tuple(group.forwards.items())
            usage = Usage(prompt, group.completion_tokens, group.cached_tokens, group.preemptions, forwards)
            self._events.append(Done(request.id, usage))
            del self._groups[request.id]

    def _fail(self, group: Group, message: str, kind: Literal["BadRequest", "EngineFailure"] = "EngineFailure") -> None:
        if self._groups.pop(group.request.id, None) is not None:
            self._drop(group)
            self._events.append(Failed(group.request.id, kind, message))

    def _drop(self, group: Group) -> None:
        group.unforked = []
        for sequence in group.sequences:
            sequence.finished = True
            self.scheduler.remove(sequence)

    def _info(self, id: str) -> ModelInfo:
        adapter = self.hosted[id].adapter
        model = id if adapter is None else adapter.of
        runner, pool = self.runners[model], self.pools[model]
        capacity = pool.num_blocks * pool.block_size
        return ModelInfo(
            id,
            min(runner.max_model_len, capacity),
            runner.width,
            capacity,
            runner.parameters if adapter is None else adapter.parameters,
            str(runner.dtype).removeprefix("torch."),
            str(runner.device),
            None if adapter is None else adapter.of,
        )


def _span_input(span: Span) -> SpanInput:
    return SpanInput(
        span.sequence.ids(span.track, span.start, span.start + span.count),
        span.start,
        span.track.blocks,
        range(span.count - span.rows, span.count),
        span.track.adapter,
    )


def _progress(sequence: Sequence, token: int) -> tuple[str, FinishReason | None, int | str | None]:
    """The text that `token`, just appended, lets out; why the sequence ends with it, if it does; which stop did it."""
    group, text, length = sequence.group, sequence.text, len(sequence.output)
    sampling = group.request.sampling
    if length > sampling.min_tokens:
        if token in sampling.stop_token_ids:
            return text.push(token) if sampling.include_stop_str_in_output else "", "stop", token
        if token in group.request.eos_ids and not sampling.ignore_eos:
            return text.push(token), "stop", None
    shown = text.push(token, stops_apply=length >= sampling.min_tokens)
    if text.stopped():
        return shown, "stop", text.matched
    return shown, "length" if length >= group.max_output else None, None


def _trace(
    samples: Seq[Sample],
    drawn: Mapping[Sequence, Drawn],
    weights: Mapping[int, list[float]],
    rows: Mapping[str, Rows],
) -> None:
    """Fill in the traces of requests that ask for them."""
    chosen: list[Chosen] = []
    filled: list[Drawn] = []
    row = -1
    for sample in samples:
        row += sample.count
        each = drawn.get(sample.sequence)
        if each and sample.sequence.group.request.program.trace and each.token is not None and each.logprob:
            chosen.append(Chosen(sample, each.token, each.logprob.logprob, weights.get(row)))
            filled.append(each)
    if chosen:
        for each, entry in zip(filled, trace(chosen, rows), strict=True):
            each.trace = entry


def _advance_solvers(drawn: Mapping[Sequence, Drawn], weights: Mapping[Sequence, list[float] | None]) -> None:
    """Solvers' states move on with what was drawn."""
    for sequence, each in drawn.items():
        solver, chosen = sequence.group.policy.solver, weights[sequence]
        if solver is not None and chosen is not None and each.token is not None:
            sequence.solver_state = solver.advance(sequence.solver_state, chosen, each.token)
