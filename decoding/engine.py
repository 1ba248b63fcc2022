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
from typing import Literal

import torch

from decoding.admit import Hosted, make_group
from decoding.core import (
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
from decoding.state import Group, Plan, Sample, Sequence
from decoding.text import Chat, Prompt, TextModel

logger = logging.getLogger("trimtab.engine")


class Engine:
    """Many models, one batch: `Engine(load_models({"base": DIR, ...})).generate(prompts, program)`.

    Takes over the runners: it divides the KV memory between them. Raises ModelLoadError if that is too little.
    """

    def __init__(self, models: Mapping[str, Hosted], config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
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
            for sequence in group.sequences:
                self._finish(sequence, "length", None, (), "", ())
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
        if plan.samples:
            mixed = mix(plan.samples, rows, self._allowed, self._starts)
            z = mixed.z  # [S, W] fp32
            self._prompt_logprobs(plan, z)
            drawing, index = self._drawing(plan)
            drawn = verify(z if len(index) == len(z) else z[index], drawing, self._generator) if drawing else []
            self._advance_solvers(drawing, drawn, [mixed.weights.get(row) for row in index])
            self._commit(plan, dict(zip(drawing, drawn, strict=True)))
        else:
            self._commit(plan, {})
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
        """Stop serving an adapter. Raises UnknownModel, and ModelLoadError while requests use it."""
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
            raise ModelLoadError(f"The adapter '{id}' is in use by {len(users)} requests; wait for them or abort them.")

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
        for model, spans in plan.spans.items():
            inputs = [
                SpanInput(
                    span.sequence.ids(span.track, span.start, span.start + span.count),
                    span.start,
                    span.track.blocks,
                    range(span.count - span.rows, span.count),
                    span.track.adapter,
                )
                for span in spans
            ]
            began = time.perf_counter()
            try:
                rows[model] = self.runners[model].forward(inputs)
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

    def _drawing(self, plan: Plan) -> tuple[list[Sequence], list[int]]:
        """Sequences that draw a token in this tick, and their rows of the mix."""
        drawing: list[Sequence] = []
        index: list[int] = []
        row = 0
        for sample in plan.samples:
            row += sample.count
            if sample.first + sample.count == len(sample.sequence.output) and sample.sequence.group.max_output:
                drawing.append(sample.sequence)
                index.append(row - 1)
        return drawing, index

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

    @staticmethod
    def _advance_solvers(drawing: list[Sequence], drawn: list[Drawn], weights: list[list[float] | None]) -> None:
        for sequence, each, chosen in zip(drawing, drawn, weights, strict=True):
            solver = sequence.group.policy.solver
            if solver is not None and chosen is not None and each.token is not None:
                sequence.solver_state = solver.advance(sequence.solver_state, chosen, each.token)

    def _prompt_logprobs(self, plan: Plan, z: torch.Tensor) -> None:
        """Score the prompt ids of requests that ask for it; z: [S, W]."""
        row = 0
        for sample in plan.samples:
            group, k = sample.sequence.group, sample.sequence.group.request.sampling.prompt_logprobs
            track = sample.sequence.tracks[0]
            scored = min(sample.count, -1 - sample.first)  # rows that predict a prompt id
            if k is not None and scored > 0:
                at = len(track.prompt) + sample.first + 1
                lp = log_softmax_rows(z, list(range(row, row + scored)))
                group.prompt_logprobs += token_logprobs(lp, track.prompt[at : at + scored], k)
            row += sample.count

    def _commit(self, plan: Plan, drawn: Mapping[Sequence, Drawn]) -> None:
        self.scheduler.commit(plan)
        for sample in plan.samples:
            sequence, group = sample.sequence, sample.sequence.group
            if group.request.id not in self._groups:
                continue  # another choice of the request failed in this very loop
            sequence.next_row = sample.first + sample.count
            self._send_prompt_logprobs(group, sequence)
            if sequence in drawn:
                self._append(sequence, drawn[sequence])
            elif group.max_output == 0 and sequence.next_row >= -1:
                for each in group.sequences:
                    self._finish(each, "length", None, (), "", ())

    def _send_prompt_logprobs(self, group: Group, sequence: Sequence) -> None:
        if group.request.sampling.prompt_logprobs is not None and not sequence.output and sequence.next_row >= -1:
            entries: list[TokenLogprob | None] = [None, *group.prompt_logprobs]
            if len(entries) == len(sequence.tracks[0].prompt) and sequence.index == 0:
                self._events.append(PromptLogprobs(group.request.id, tuple(entries)))

    def _append(self, sequence: Sequence, drawn: Drawn) -> None:
        group, sampling = sequence.group, sequence.group.request.sampling
        if drawn.token is None:
            self._fail(group, "No token is allowed at this point: the request's masks leave none.", "BadRequest")
            return
        token = drawn.token
        sequence.output.append(token)
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
        group.completion_tokens += 1
        if group.unforked and sequence is group.sequences[0]:
            self._fork_children(group)
        logprobs = (drawn.logprob,) if drawn.logprob is not None else ()
        length = len(sequence.output)
        text = sequence.text
        if length > sampling.min_tokens or not sampling.min_tokens:
            if token in sampling.stop_token_ids:
                shown = text.push(token, True) if sampling.include_stop_str_in_output else ""
                self._finish(sequence, "stop", token, (token,), shown, logprobs)
                return
            if token in group.request.eos_ids and not sampling.ignore_eos:
                self._finish(sequence, "stop", None, (token,), text.push(token, True), logprobs)
                return
        shown = text.push(token, length >= sampling.min_tokens)
        if text.stopped():
            self._finish(sequence, "stop", text.matched, (token,), shown, logprobs)
        elif length >= group.max_output:
            self._finish(sequence, "length", None, (token,), shown, logprobs)
        else:
            self._events.append(Delta(group.request.id, sequence.index, (token,), shown, logprobs))

    def _fork_children(self, group: Group) -> None:
        """The root's prompt is computed: its siblings start on the same blocks."""
        children, group.unforked = group.unforked, []
        for child in children:
            for model, source, target in self.scheduler.fork(group.sequences[0], child):
                self.runners[model].copy_blocks([(source, target)])

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None,
        tokens: tuple[int, ...],
        shown: str,
        logprobs: tuple[TokenLogprob, ...],
    ) -> None:
        group, text = sequence.group, sequence.text
        if text.matched is None:
            shown += text.finish()
            if text.stopped():
                reason, stop_reason = "stop", text.matched
        sequence.finished = True
        self.scheduler.remove(sequence)
        request = group.request
        self._events.append(Delta(request.id, sequence.index, tokens, shown, logprobs, reason, stop_reason))
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
