"""`POST /v1/score`: what scorers say of given texts: rewards, steps, guards, judges, likelihood, rules."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from decoding.core import (
    SCORERS,
    BadRequest,
    Policy,
    Program,
    Sampling,
    SearchPlan,
    TrimtabError,
    UnknownModel,
)
from decoding.core import Request as EngineRequest
from decoding.events import Done, Failed, SearchReport
from decoding.prepare import Catalog
from decoding.scorers.build import what_is_set
from decoding.scorers.spec import ScorerParams, ScorerSpec
from decoding.search import score_texts
from decoding.text import Chat, Prompt
from server.answers import number
from server.errors import ApiError, from_failed, from_trimtab
from server.routes.body import GONE, documented, parse
from server.routes.generate import unless_gone
from server.schema import ScoreBody
from server.searching import check_scorers, leaves, scorer_in_full
from server.state import Services, Shared

router = APIRouter()
SEPARATOR = "\n\n"
Text = tuple[Prompt, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One HTTP request, ready to run. name: the scorer's. texts_param: the field that the texts came in."""

    name: str
    request: EngineRequest
    texts_param: str


@router.post("/v1/score", **documented(ScoreBody, "Scores texts."))
@router.post("/score", include_in_schema=False)
async def score(request: Request, services: Shared) -> Any:
    """One score per pair, in order; of step scorers also every step's."""
    try:
        raw = await request.body()
        body = parse(raw, ScoreBody)
        # In a thread: long texts are tokenized, which would hold up every stream.
        job = await asyncio.to_thread(_job, body, services, getattr(request.state, "key", ""))
        channel = services.bridge.submit([job.request])
    except ClientDisconnect:
        return GONE
    except (ApiError, TrimtabError) as error:
        refusal = error if isinstance(error, ApiError) else from_trimtab(error)
        services.metrics.refused.labels(str(refusal.status)).inc()
        raise refusal from error
    outcome = "abort"

    async def gather() -> SearchReport:
        while True:
            for event in await channel.events():
                if isinstance(event, Failed):
                    raise _about_texts(from_failed(event), job.texts_param)
                if isinstance(event, Done) and event.usage.search is not None:
                    return event.usage.search

    try:
        report = await unless_gone(request, gather())
        if report is None:
            return GONE
        outcome = "ok"
        services.metrics.searched(job.name, report)
        return JSONResponse(_answer(job, report))
    except ApiError:
        outcome = "error"
        raise
    finally:
        services.metrics.requests.labels(job.name, score_texts.KIND.name, outcome).inc()
        channel.close()


def _job(body: ScoreBody, services: Services, key: str) -> ScoreJob:
    """The request whose search scores the texts. Nothing is computed but what scorers read."""
    served = services.served
    asked = None if body.scorer is None else scorer_in_full(body.scorer, "scorer")
    name = body.model or _by_default(asked, services)
    if name is None:
        raise BadRequest("No scorer is served by default here: name a 'model'.", "model")
    model = served.presets[name].model if name in served.presets else name
    if model not in served.catalog and model not in served.remotes:
        raise UnknownModel(name, (*served.names, *served.remotes))
    writers = [id for id, each in served.catalog.items() if each.info.kind not in SCORERS]
    writer = model if model in writers else next(iter(writers), next(iter(served.catalog)))
    scorer: ScorerSpec = model
    if asked is not None:
        scorer = replace(asked, model=model) if not what_is_set(asked) else asked
    param = "input" if body.input is not None else "text_2"
    texts = _texts(body)
    limit = services.config.max_scored_texts
    if len(texts) > limit:
        raise BadRequest(f"At most {limit} texts are scored at a time, not {len(texts)}.", param)
    params = score_texts.ScoreTexts(texts, scorer, body.aggregate or "last", writer)
    plan = SearchPlan(score_texts.KIND.name, params, candidates=True)
    try:
        check_scorers(plan, served.catalog, served.remotes, "")
    except BadRequest as error:
        raise BadRequest(error.message, error.param if body.scorer is not None else "model", error.code) from error
    readers = _readers(scorer, writer)
    if name in served.presets and model in readers and served.resolve(name, None).program.policy != _alone(model):
        message = f"'{name}' is a policy, and texts are scored by one model alone: name that, such as '{model}'."
        raise BadRequest(message, "model")
    _check_lengths(texts, readers, served.catalog, param)
    program = Program(score_texts.KIND.name, _alone(writer), search=plan)
    salt = f"{key}:{body.cache_salt or ''}"
    id = f"score-{uuid.uuid4().hex}"
    made = EngineRequest(id, program, ((0,),), Sampling(max_tokens=1), writer, 1, salt=salt, prompt="")
    return ScoreJob(name, made, param)


def _by_default(scorer: ScorerParams | None, services: Services) -> str | None:
    """The model that a request without one means: its scorer's, or the first that scores; for a rule, the default's."""
    served = services.served
    if scorer is None or not what_is_set(scorer):
        return next((id for id, each in served.catalog.items() if each.info.kind in SCORERS), None)
    named = (leaf.model or leaf.remote for leaf in leaves(scorer))
    default = served.names[0]
    writer = served.presets[default].model if default in served.presets else default
    return next((name for name in named if name in served.catalog or name in served.remotes), writer)


def _alone(model: str) -> Policy:
    """The policy that is the model by itself."""
    return Program.plain(model).policy


def _readers(scorer: ScorerSpec, writer: str) -> set[str]:
    """The models that will read the texts."""
    found = {leaf.model for leaf in leaves(scorer) if leaf.model is not None}
    asks = any(leaf.model is None and leaf.question is not None for leaf in leaves(scorer))
    return found | {writer} if asks or score_texts.weighs(scorer) else found


def _texts(body: ScoreBody) -> tuple[Text, ...]:
    separator = body.separator or SEPARATOR
    pairs: list[tuple[Prompt, str]] = []
    for pair in body.input or ():
        messages = tuple(message.plain() for message in pair.messages or ())
        pairs.append((Chat(messages) if pair.prompt is None else pair.prompt, pair.response))
    if body.input is None:
        first, second = ([each] if isinstance(each, str) else list(each) for each in (body.text_1, body.text_2))
        if not second:
            raise BadRequest("text_2 must be one text or more.", "text_2")
        if len(first) not in (1, len(second)):
            message = f"text_1 must be one text or as many as text_2; they are {len(first)} and {len(second)}."
            raise BadRequest(message, "text_1")
        pairs = list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))
    return tuple((prompt, _steps(response, separator)) for prompt, response in pairs)


def _steps(text: str, separator: str) -> tuple[str, ...]:
    """The text in steps that each end with the separator, the last one perhaps without."""
    parts = text.split(separator)
    steps = [part + separator for part in parts[:-1]] + parts[-1:]
    return tuple(step for step in steps if step)


def _check_lengths(texts: Iterable[Text], models: Iterable[str], catalog: Catalog, param: str) -> None:
    """Raises BadRequest for a text that alone is too long for a model: the engine need not tokenize it to say so."""
    for model in models:
        if model not in catalog:
            continue
        text, limit = catalog[model].text, catalog[model].info.max_model_len
        for prompt, steps in texts:
            answer = "".join(steps)
            for part in (prompt, answer) if isinstance(prompt, str) else (answer,):
                if len(part) > limit and len(ids := text.encode(part, bos=False)) > limit:
                    raise BadRequest(
                        f"A text of {len(ids)} tokens was to be scored; '{model}' takes {limit}.",
                        param,
                        "context_length_exceeded",
                    )


def _about_texts(error: ApiError, param: str) -> ApiError:
    """The error with the field that this endpoint's texts come in, where it is about a text."""
    if error.param in ("prompt", "messages"):
        error.param = "text_1" if param == "text_2" else param
    elif error.param == "max_tokens":
        error.param = param
    return error


def _answer(job: ScoreJob, report: SearchReport) -> dict[str, Any]:
    tokens = report.read + report.generated  # the latter are answers, fed to what tells their likelihood
    return {
        "id": job.request.id,
        "object": "list",
        "model": job.name,
        "data": [
            {
                "index": i,
                "object": "score",
                "score": number(each.score),
                "scores": [number(value) for value in each.scores],
            }
            for i, each in enumerate(report.candidates)
        ],
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": 0,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": report.cached},
        },
    }
