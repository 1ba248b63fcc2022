"""The engine without a server: load models, collect completions.

engine = Engine(load_models({"base": "models/base", "expert": "models/expert", "small": "models/small"}))
program = STRATEGIES["proxy_tuning"].build(ProxyTuning(expert="expert", anti="small"), "base")
for completion in engine.generate(["Once upon a time"], program): print(completion.text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from decoding.admit import Hosted
from decoding.core import BadRequest, EngineFailure, FinishReason, ModelLoadError, ModelSpec, Request
from decoding.events import Delta, Done, Event, Failed, PromptLogprobs, TokenLogprob, TokenTrace, Usage
from decoding.judge import JudgeHead, local_directory, read_judge, weights_hash


@dataclass(slots=True)
class Completion:
    """One finished choice. Log-probs are filled if the sampling asked for them, `trace` if the program did."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    trace: list[TokenTrace] = field(default_factory=list)
    usage: Usage | None = None


def load_models(
    models: Mapping[str, str] | Iterable[ModelSpec],
    *,
    compile: bool = True,
    self_check: bool = True,
    adapters: bool = False,
) -> dict[str, Hosted]:
    """Load every model. `models`: id to Hugging Face directory or hub id, or full specs. Raises ModelLoadError.

    An adapter is a spec of its own: `ModelSpec("tuned", DIR, kind="adapter", of="base")`, served as a model `tuned`.
    `adapters`: more may come by `Engine.load_adapter`, and compiling for them should not wait until then.
    """
    from decoding.models import load_model  # transformers takes seconds to import; fakes and tests need none of it
    from decoding.texts import PARTS, base_specs, load_texts

    specs = [ModelSpec(id, path) for id, path in models.items()] if isinstance(models, Mapping) else list(models)
    bases = base_specs(specs)
    options = {"compile": compile, "self_check": self_check, "adapters": adapters}
    runners = {id: load_model(spec, **options) for id, spec in bases.items()}
    texts = load_texts(specs)
    hosted = {}
    for spec in specs:
        if spec.kind == "judge":
            continue
        runner = runners[spec.of or "" if spec.kind in PARTS else spec.id]
        adapter = runner.load_adapter(spec.id, spec.path) if spec.kind == "adapter" else None
        kind = "causal" if spec.kind == "adapter" else spec.kind
        hosted[spec.id] = Hosted(runner, texts[spec.id], spec.kv_memory, adapter, kind, spec)
    return hosted


def host(
    id: str,
    model: Any,
    tokenizer: Any,
    *,
    max_model_len: int | None = None,
    compile: bool = True,
    self_check: bool = True,
) -> Hosted:
    """A causal LM that is in memory, served where and as it is: `Engine({"base": host("base", model, tokenizer)})`.

    model: a transformers PreTrainedModel, which the engine takes over; tokenizer: a transformers tokenizer. Raises
    ModelLoadError for a model that would not be served exactly, as `load_models` does.
    """
    from decoding.host_gate import causal_class, context_limit
    from decoding.models import host_model
    from decoding.selfcheck import check_twin
    from decoding.text import TextModel

    kind, length = causal_class(model.config), context_limit(model.config, max_model_len)
    if self_check:
        check_twin(kind, model.config)
    runner = host_model(model, id, length, compile=compile, self_check=self_check)
    eos = model.config.eos_token_id
    eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    text = TextModel(id, tokenizer, eos_ids=eos_ids, max_length=runner.max_model_len)
    return Hosted(runner, text)


def load_judges(specs: Iterable[ModelSpec], hosted: Mapping[str, Hosted]) -> dict[str, JudgeHead]:
    """The judge heads among `specs`, by the model that each is of, for `Engine(models, judges=...)`.

    Raises ModelLoadError for one that was trained on other weights, does not fit, or is the second of its model.
    """
    specs = list(specs)
    paths = {spec.id: spec.path for spec in specs}
    found: dict[str, JudgeHead] = {}
    for spec in specs:
        if spec.kind != "judge":
            continue
        of = spec.of or ""
        if of not in hosted or hosted[of].adapter is not None:
            raise ModelLoadError(f"The judge '{spec.id}' is of '{of}', which is no model that is served.")
        if of in found:
            raise ModelLoadError(f"The judge '{spec.id}' is the second one of '{of}'; a model has one.")
        head = read_judge(spec.path)
        size = getattr(hosted[of].runner, "hidden_size", head.weight.shape[0])
        if head.weight.shape[0] != size:
            message = f"The judge '{spec.id}' reads {head.weight.shape[0]} numbers; '{of}' has {size} a token."
            raise ModelLoadError(message)
        if head.target_hash != weights_hash(local_directory(paths[of])):
            raise ModelLoadError(f"The judge '{spec.id}' was trained on other weights than those of '{of}'.")
        found[of] = head
    return found


def collect(step: Callable[[], list[Event]], requests: Seq[Request]) -> list[Completion]:
    """Step until all `requests` have ended; their choices in order. Raises what made one of them fail."""
    choices = {request.id: [Completion() for _ in range(request.n)] for request in requests}
    open_ids = set(choices)
    while open_ids:
        for event in step():
            mine = choices.get(event.request_id)
            if mine is None:
                continue
            if isinstance(event, Delta):
                choice = mine[event.index]
                choice.text += event.text
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs
                choice.trace += event.trace
                choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
            elif isinstance(event, PromptLogprobs):
                for choice in mine:
                    choice.prompt_logprobs = event.logprobs
            elif isinstance(event, Done):
                for choice in mine:
                    choice.usage = event.usage
                open_ids.discard(event.request_id)
            elif isinstance(event, Failed):
                if event.kind in ("BadRequest", "UnknownModel"):
                    raise BadRequest(event.message, event.param, event.code)
                raise EngineFailure(event.message)
    return [choice for request in requests for choice in choices[request.id]]
