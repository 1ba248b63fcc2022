"""From a checked body to a `Job`: the engine requests of one HTTP request, and how its answer is to look.

Both endpoints meet here; what differs between them is the prompt and the meaning of `logprobs`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from decoding.core import BadRequest, Program, Sampling, Speculation
from decoding.core import Request as EngineRequest
from decoding.prepare import prepare
from decoding.text import Chat, Prompt, TextModel
from server.catalog import Resolved, Served
from server.config import Config
from server.errors import ApiError
from server.schema import ChatBody, CompletionBody, GenerationBody
from server.searching import check_candidates

DEFAULT_TEXT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, ready to run. Choice `position * n + index` answers prompt `position`.

    `name` is the model as the client named it. `echoes` has each prompt's text if it is to be echoed, else nothing.
    `logprobs` is how many alternatives are reported, None for no log-probs.
    """

    id: str
    chat: bool
    created: int
    name: str
    program: Program
    requests: tuple[EngineRequest, ...]
    n: int
    text: TextModel
    logprobs: int | None
    echoes: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    skip_special_tokens: bool

    @property
    def choices(self) -> int:
        """How many choices the answer has."""
        return self.n * len(self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, as the first role sees them."""
        return sum(len(request.prompts[0]) for request in self.requests)


def chat_job(body: ChatBody, served: Served, config: Config, key: str = "") -> Job:
    """The job of a chat completion. Raises ApiError, BadRequest and UnknownModel."""
    resolved = served.resolve(body.model, body.decoding)
    unknown = sorted(set(body.chat_template_kwargs or {}) - set(config.chat_template_kwargs))
    if unknown:
        message = f"chat_template_kwargs: '{unknown[0]}' is not allowed here. Allowed: {config.chat_template_kwargs}."
        raise ApiError(400, message, "chat_template_kwargs")
    continues = bool(body.continue_final_message)
    chat = Chat(
        tuple(message.plain() for message in body.messages),
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        template_kwargs=tuple((body.chat_template_kwargs or {}).items()),
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prediction = body.prediction.text() if body.prediction else None
    asked = body.decoding or {}
    if prediction and resolved.program.speculation is None and asked.get("speculation") is not False:
        resolved = replace(resolved, program=replace(resolved.program, speculation=Speculation("prediction")))
    return _job(
        body, resolved, [chat], served, config, logprobs=logprobs, max_tokens=limit, key=key, prediction=prediction
    )


def completion_job(body: CompletionBody, served: Served, config: Config, key: str = "") -> Job:
    """The job of a text completion. Raises ApiError, BadRequest and UnknownModel."""
    resolved = served.resolve(body.model, body.decoding)
    prompts: list[Prompt]
    if isinstance(body.prompt, str) or isinstance(body.prompt[0], int):
        prompts = [body.prompt if isinstance(body.prompt, str) else tuple(body.prompt)]
    else:
        prompts = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in body.prompt]
    return _job(body, resolved, prompts, served, config, logprobs=body.logprobs, max_tokens=body.max_tokens, key=key)


def _job(
    body: GenerationBody,
    resolved: Resolved,
    prompts: Sequence[Prompt],
    served: Served,
    config: Config,
    *,
    logprobs: int | None,
    max_tokens: int | None,
    key: str,
    prediction: str | None = None,
) -> Job:
    chat = isinstance(body, ChatBody)
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    n = body.n or 1
    _check_limits(body, len(prompts) * (n if resolved.program.search is None else 1), logprobs, config)
    sampling = _sampling(body, logprobs, logprobs if echo else None, max_tokens)
    program = resolved.program
    if program.search is not None:
        if echo:
            raise BadRequest("A search cannot echo the prompt. Leave out echo.", "echo")
        check_candidates(program.search, config.max_candidates, resolved.search_param)
        sampled = body.temperature is not None
        program = replace(program, search=replace(program.search, sampled=sampled))
    text = served.catalog[resolved.program.policy.terms[0].role.model].text
    job_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    requests = tuple(
        prepare(program, prompt, sampling, served.catalog, n=n, salt=f"{key}:{body.cache_salt or ''}",
                request_id=f"{job_id}-{position}", prompt_param="messages" if chat else "prompt",
                search_param=resolved.search_param, prediction=prediction)
        for position, prompt in enumerate(prompts)
    )  # fmt: skip
    if not chat and max_tokens is None:
        requests = tuple(map(_with_default_length, requests))
    if echo:
        _check_prompt_logprobs(requests, logprobs, config)
    skip = sampling.skip_special_tokens
    options = body.stream_options
    return Job(
        id=job_id,
        chat=chat,
        created=int(time.time()),
        name=resolved.name,
        program=requests[0].program,
        requests=requests,
        n=n,
        text=text,
        logprobs=logprobs,
        echoes=tuple(_shown(prompt, text, skip) for prompt in prompts) if echo else (),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        skip_special_tokens=skip,
    )


def _with_default_length(request: EngineRequest) -> EngineRequest:
    """OpenAI's default for text completions, or what fits; chat completions run until the model stops."""
    sampling = request.sampling
    assert sampling.max_tokens is not None, "prepare has filled it"
    limit = min(sampling.max_tokens, max(DEFAULT_TEXT_TOKENS, sampling.min_tokens))
    return replace(request, sampling=replace(sampling, max_tokens=limit))


def _shown(prompt: Prompt, text: TextModel, skip_special_tokens: bool) -> str:
    if isinstance(prompt, str):
        return prompt
    assert not isinstance(prompt, Chat), "only text completions echo"
    return text.decode(prompt, skip_special_tokens)


def _sampling(
    body: GenerationBody, logprobs: int | None, prompt_logprobs: int | None, max_tokens: int | None
) -> Sampling:
    """The engine's sampling; null is the default."""

    def or_default(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Sampling(
        temperature=or_default(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=max(or_default(body.top_p, 1.0), 1e-6),  # OpenAI takes 0: the one most likely token
        min_p=body.min_p or 0.0,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=or_default(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        min_tokens=body.min_tokens or 0,
        max_tokens=max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=or_default(body.skip_special_tokens, True),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 16):
            raise BadRequest(f"The keys of logit_bias are token ids; '{key[:40]}' is not one.", "logit_bias")
    return tuple((int(key), value) for key, value in bias.items())


def _check_limits(body: GenerationBody, sequences: int, logprobs: int | None, config: Config) -> None:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    limits = [
        ("n", body.n or 1, config.max_n, "choices"),
        ("top_logprobs" if isinstance(body, ChatBody) else "logprobs", logprobs or 0, config.max_logprobs, "log-probs"),
        ("logit_bias", len(body.logit_bias or {}), config.max_logit_bias, "entries"),
        ("stop", len(stops), config.max_stop, "stop strings"),
        ("stop", max(map(len, stops), default=0), config.max_stop_length, "characters in a stop string"),
        ("prompt", sequences, config.max_queue, "sequences (prompts times n; a search is one)"),
    ]
    for param, value, limit, what in limits:
        if value > limit:
            raise BadRequest(f"{param}: at most {limit} {what} are allowed, not {value}.", param)


def _check_prompt_logprobs(requests: Sequence[EngineRequest], logprobs: int | None, config: Config) -> None:
    """Prompt log-probs are kept until the whole prompt is scored, so their number is bounded."""
    if logprobs is None:
        return
    entries = sum(len(request.prompts[0]) for request in requests) * max(1, logprobs)
    if entries > config.max_prompt_logprobs:
        raise BadRequest(
            f"echo with logprobs would report {entries} log-probs; at most {config.max_prompt_logprobs} are allowed. "
            "Send fewer prompts or a smaller logprobs.",
            "logprobs",
        )
