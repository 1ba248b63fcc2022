"""`POST /v1/score`: what scorers say of given texts: rewards, steps, guards, judges, likelihood, rules."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from decoding.core import SCORERS, BadRequest, Policy, Program, Role, Sampling, SearchPlan, Term, UnknownModel
from decoding.core import Request as EngineRequest
from decoding.events import Done, Failed, SearchReport
from decoding.scorers.spec import ScorerParams
from decoding.search import score_texts
from decoding.text import Chat, Prompt
from server.answers import number
from server.errors import from_failed
from server.routes.body import GONE, documented, parse
from server.routes.generate import unless_gone
from server.schema import ScoreBody
from server.searching import check_scorers
from server.state import Services, Shared

router = APIRouter()
SEPARATOR = "\n\n"
Text = tuple[Prompt, tuple[str, ...]]


@router.post("/v1/score", **documented(ScoreBody, "Scores texts."))
@router.post("/score", include_in_schema=False)
async def score(request: Request, services: Shared) -> Any:
    """One score per pair, in order; of step scorers also every step's."""
    try:
        raw = await request.body()
    except ClientDisconnect:
        return GONE
    body = parse(raw, ScoreBody)
    asked = _engine_request(body, services, getattr(request.state, "key", ""))
    channel = services.bridge.submit([asked])

    async def gather() -> SearchReport:
        while True:
            for event in await channel.events():
                if isinstance(event, Failed):
                    raise from_failed(event)
                if isinstance(event, Done) and event.usage.search is not None:
                    return event.usage.search

    try:
        report = await unless_gone(request, gather())
    finally:
        channel.close()
    return GONE if report is None else JSONResponse(_answer(asked, body.model or services.served.names[0], report))


def _engine_request(body: ScoreBody, services: Services, key: str) -> EngineRequest:
    """The request whose search scores the texts. Nothing is computed but what scorers read."""
    served = services.served
    name = body.model or next((id for id, each in served.catalog.items() if each.info.kind in SCORERS), None)
    if name is None:
        raise BadRequest("No scorer is served by default here: name a 'model'.", "model")
    model = served.presets[name].model if name in served.presets else name
    if model not in served.catalog and model not in served.remotes:
        raise UnknownModel(name, (*served.names, *served.remotes))
    writers = [id for id, each in served.catalog.items() if each.info.kind not in SCORERS]
    writer = model if model in writers else next(iter(writers), next(iter(served.catalog)))
    scorer: Any = body.scorer or model
    if isinstance(scorer, ScorerParams) and _needs_model(scorer):
        scorer = replace(scorer, model=model)
    texts = _texts(body)
    if len(texts) > services.config.max_scored_texts:
        limit = services.config.max_scored_texts
        raise BadRequest(f"At most {limit} texts are scored at a time, not {len(texts)}.", "input")
    plan = SearchPlan(
        score_texts.KIND.name,
        score_texts.ScoreTexts(texts, scorer, body.aggregate or "last", writer),
        candidates=True,
    )
    try:
        check_scorers(plan, served.catalog, served.remotes, "")
    except BadRequest as error:
        param = (error.param or "").strip(".")
        raise BadRequest(error.message, param if body.scorer else "model", error.code) from error
    program = Program("score", Policy((Term("base", Role(writer)),)), search=plan)
    salt = f"{key}:{body.cache_salt or ''}"
    id = f"score-{uuid.uuid4().hex}"
    return EngineRequest(id, program, ((0,),), Sampling(max_tokens=1), writer, 1, salt=salt, prompt="")


def _needs_model(scorer: ScorerParams) -> bool:
    """Whether it says how a model is asked, but not which."""
    rules = (scorer.model, scorer.remote, scorer.rule, scorer.regex, scorer.min_words, scorer.max_words)
    return all(each is None for each in rules) and not (scorer.keywords or scorer.json or scorer.parts)


def _texts(body: ScoreBody) -> tuple[Text, ...]:
    separator = body.separator or SEPARATOR
    pairs: list[tuple[Prompt, str]] = []
    for pair in body.input or ():
        messages = tuple(message.plain() for message in pair.messages or ())
        pairs.append((Chat(messages) if pair.prompt is None else pair.prompt, pair.response))
    if body.input is None:
        first, second = ([each] if isinstance(each, str) else list(each) for each in (body.text_1, body.text_2))
        if len(first) not in (1, len(second)) or not second:
            message = f"text_1 must be one text or as many as text_2; they are {len(first)} and {len(second)}."
            raise BadRequest(message, "text_1")
        pairs = list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))
    return tuple((prompt, _steps(response, separator)) for prompt, response in pairs)


def _steps(text: str, separator: str) -> tuple[str, ...]:
    """The text in steps that each end with the separator, the last one perhaps without."""
    parts = text.split(separator)
    steps = [part + separator for part in parts[:-1]] + parts[-1:]
    return tuple(step for step in steps if step)


def _answer(request: EngineRequest, model: str, report: SearchReport) -> dict[str, Any]:
    scored = sum(tokens for _, tokens in report.scored) + report.generated
    return {
        "id": request.id,
        "object": "list",
        "model": model,
        "data": [
            {
                "index": i,
                "object": "score",
                "score": number(each.score),
                "scores": [number(value) for value in each.scores],
            }
            for i, each in enumerate(report.candidates)
        ],
        "usage": {"prompt_tokens": scored, "completion_tokens": 0, "total_tokens": scored},
    }
