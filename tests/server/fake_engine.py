"""A scripted engine with the interface of the real one: no weights, no torch, the same answer every time.

Each tick gives every running choice one token of `ANSWER`, and EOS after it. Words in the prompt change what happens:
`[forever]` never ends, `[fail]` fails after three tokens, `[raise]` makes one tick raise, `[refuse]` and `[broken]`
fail when submitted, `[exit]` ends the process, `[wait]` gives nothing at all, `[slow]` takes 10 ms a tick.

A search takes two ticks: one with two pieces of progress if they are wanted, one with the whole answers and the report
`searched`; `[fail]` fails it in between, `[late]` gives it one tick more.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from decoding.core import AdapterInUse, BadRequest, FinishReason, ModelLoadError, ModelSpec, Request
from decoding.detokenizer import Detokenizer
from decoding.events import (
    CandidateReport,
    Delta,
    Done,
    Event,
    Failed,
    ModelInfo,
    ModelStats,
    Progress,
    PromptLogprobs,
    RoleTrace,
    SearchReport,
    Stats,
    TokenLogprob,
    TokenTrace,
    Usage,
)
from decoding.text import StopStrings, TextModel
from server.engine_process import EngineLike
from tests.decoding.test_text import CHATML, byte_level

ANSWER = " Hello, 中文 and 😀 world."
MODELS = ("base", "expert", "base-small")
WIDTH = 330


def text_models() -> dict[str, TextModel]:
    """Fresh tokenizers; `expert` has a chat template."""
    templates = {"base": None, "expert": CHATML, "base-small": None}
    return {name: TextModel(name, byte_level(chat_template=template)) for name, template in templates.items()}


@dataclass
class _Choice:
    detokenizer: Detokenizer
    stops: StopStrings
    sent: int = 0
    done: bool = False


@dataclass
class _Group:
    request: Request
    prompt: str
    choices: list[_Choice] = field(default_factory=list)
    begun: bool = False
    completion_tokens: int = 0


class FakeEngine:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.text = text_models()["base"]
        self.answer = [*self.text.encode(ANSWER, bos=False), self.text.eos_ids[0]]
        self.models = tuple(ModelInfo(name, 128, WIDTH, 4096, 1000, "float32", "cpu") for name in MODELS)
        self.groups: dict[str, _Group] = {}
        self.ticks = self.aborts = 0

    def submit(self, request: Request) -> None:
        prompt = self.text.decode(request.prompts[0])
        if "[refuse]" in prompt:
            raise BadRequest("The engine refuses.", "prompt", "refused")
        if "[broken]" in prompt:
            raise RuntimeError("broken")
        group = _Group(request, prompt)
        sampling = request.sampling
        for _ in range(request.n):
            detokenizer = Detokenizer(self.text.vocabulary, sampling.skip_special_tokens)
            stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
            group.choices.append(_Choice(detokenizer, stops))
        self.groups[request.id] = group

    def abort(self, request_id: str) -> None:
        self.aborts += self.groups.pop(request_id, None) is not None

    def load_adapter(self, spec: ModelSpec, text: TextModel | None = None) -> None:
        """Paths that end in `bad` cannot be loaded, `broken` is a bug of the engine's, `exit` ends the process."""
        if spec.path.endswith("bad"):
            raise ModelLoadError(f"Adapter '{spec.id}' of '{spec.of}': {spec.path} has no adapter_config.json.")
        if spec.path.endswith("broken"):
            raise RuntimeError("broken")
        if spec.path.endswith("exit"):
            os._exit(3)
        self._refuse_while_used(spec.id)
        rest = [info for info in self.models if info.id != spec.id]
        self.models = (*rest, ModelInfo(spec.id, 128, WIDTH, 4096, 10, "float32", "cpu", spec.of))

    def unload_adapter(self, id: str) -> None:
        self._refuse_while_used(id)
        self.models = tuple(info for info in self.models if info.id != id)

    def _refuse_while_used(self, id: str) -> None:
        if any(id in group.request.program.models for group in self.groups.values()):
            raise AdapterInUse(f"The adapter '{id}' is in use by 1 requests.")

    def has_work(self) -> bool:
        return bool(self.groups)

    def stats(self) -> Stats:
        models = tuple(ModelStats(name, self.ticks, self.ticks, 0.5, 0.25, 3, 4) for name in MODELS)
        return Stats(len(self.groups), 0, self.ticks, 0, self.aborts, models)

    def step(self) -> list[Event]:
        self.ticks += 1
        events: list[Event] = []
        for group in list(self.groups.values()):
            if "[raise]" in group.prompt:
                raise RuntimeError("this tick fails")
            if "[exit]" in group.prompt:
                os._exit(3)
            if "[slow]" in group.prompt:
                time.sleep(0.01)
            if "[wait]" in group.prompt:
                time.sleep(0.001)
            elif group.request.program.search is not None:
                events += self._search(group)
            else:
                events += self._advance(group)
        return events

    def _advance(self, group: _Group) -> list[Event]:
        request, events = group.request, []  # type: Request, list[Event]
        if not group.begun and request.sampling.prompt_logprobs is not None:
            k, ids = request.sampling.prompt_logprobs, request.prompts[0]
            events.append(PromptLogprobs(request.id, (None, *(_logprob(i, k) for i in ids[1:]))))
        group.begun = True
        for index, choice in enumerate(group.choices):
            if not choice.done:
                events.append(self._token(group, index, choice))
        if "[fail]" in group.prompt and group.choices[0].sent == 3:
            del self.groups[request.id]
            return [*events, Failed(request.id, "EngineFailure", "It failed half-way.")]
        if all(choice.done for choice in group.choices):
            del self.groups[request.id]
            forwards = tuple((model, group.completion_tokens) for model in request.program.models)
            events.append(Done(request.id, Usage(len(request.prompts[0]), group.completion_tokens, 2, 0, forwards)))
        return events

    def _search(self, group: _Group) -> list[Event]:
        request, plan = group.request, group.request.program.search
        assert plan is not None
        if not group.begun:
            group.begun = True
            told = (("step", 1.0), ("score", float("inf")))
            messages = [("two samples", (("samples", 2.0),)), ("step 1", told)] if plan.progress else []
            return [Progress(request.id, message, numbers) for message, numbers in messages]
        late = "[late]" in group.prompt
        if late and not group.completion_tokens:
            group.completion_tokens = 1
            return []
        del self.groups[request.id]
        if "[fail]" in group.prompt:
            return [Failed(request.id, "BadRequest", "The search cannot go on.", "decoding.search.scorer")]
        ids = tuple(self.answer[:-1])
        events: list[Event] = [
            Delta(request.id, index, ids, ANSWER, finish_reason="stop") for index in range(request.n)
        ]
        usage = Usage(len(request.prompts[0]), 40, 2, 0, (("base", 9), ("expert", 3)), search=searched(request, late))
        return [*events, Done(request.id, usage)]

    def _token(self, group: _Group, index: int, choice: _Choice) -> Delta:
        request, sampling = group.request, group.request.sampling
        assert sampling.max_tokens is not None
        if sampling.max_tokens == 0:
            choice.done = True
            return Delta(request.id, index, (), "", (), "length")
        token = self.answer[choice.sent % len(self.answer)]
        choice.sent += 1
        group.completion_tokens += 1
        logprobs = () if sampling.logprobs is None else (_logprob(token, sampling.logprobs),)
        ended = token in request.eos_ids and not sampling.ignore_eos and "[forever]" not in group.prompt
        reason: FinishReason | None = "stop" if ended or token in sampling.stop_token_ids else None
        if reason is None and choice.sent >= sampling.max_tokens and "[forever]" not in group.prompt:
            reason = "length"
        text = choice.stops.push(choice.detokenizer.push((token,)))
        if reason is not None:
            text += choice.stops.push(choice.detokenizer.finish()) + choice.stops.finish()
        stop: int | str | None = token if token in sampling.stop_token_ids else None
        if choice.stops.matched is not None:
            reason, stop = "stop", choice.stops.matched
        choice.done = reason is not None
        trace: tuple[TokenTrace, ...] = ()
        if request.program.trace:
            roles = tuple(RoleTrace(t.name, -float("inf"), t.weight) for t in request.program.policy.terms)
            trace = (TokenTrace(token, -0.75, 1, roles),)
        return Delta(request.id, index, (token,), text, logprobs, reason, stop, trace)


def searched(request: Request, late: bool = False) -> SearchReport:
    """What the fake's searches report: two candidates, or one per text that is to be scored."""
    plan = request.program.search
    assert plan is not None
    shown = (
        CandidateReport(ANSWER, 10, "stop", 0.5, (0.25, 0.5), "42"),
        CandidateReport(" Hel", 3, "length", None, (float("nan"),), None, "cut by max_tokens"),
    )
    if hasattr(plan.params, "texts"):
        shown = (CandidateReport("", 0, None, 0.5, (0.5,)),) * len(plan.params.texts)
    details = (("votes", {"42": 1.5, "none": float("-inf")}), ("rows", (1, [None, True])), ("kind", {1}))
    reason = f"It ended {'late' if late else 'early'}."
    exhausted = "max_total_tokens" if plan.max_total_tokens else None
    shown = shown if plan.candidates else ()
    return SearchReport(plan.kind, reason, exhausted, 3, 40, (("expert", 12),), shown, details, 14, 2)


def _logprob(token: int, k: int) -> TokenLogprob:
    """The actual token is the second best; the fourth is masked; ids 3 to 5 stand for the others."""
    others = [(3, -0.25), (4, -2.0), (5, -float("inf"))]
    top = [pair for pair in [others[0], (token, -0.75), *others[1:]] if pair[0] != token or pair[1] == -0.75]
    return TokenLogprob(token, -0.75, tuple(top[:k]))


def fake_engine() -> EngineLike:
    """A picklable engine factory."""
    return FakeEngine()


def failing_engine() -> EngineLike:
    """A factory that cannot load its models."""
    from decoding.core import ModelLoadError

    raise ModelLoadError("Model 'base': the directory has no config.json.")


def crashing_engine() -> EngineLike:
    """A factory that takes its process down."""
    os._exit(4)
