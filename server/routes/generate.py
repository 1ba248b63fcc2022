"""`POST /v1/chat/completions`, `/v1/completions`: check, submit, stream or gather, abort when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from decoding.core import TrimtabError
from decoding.events import Event
from decoding.events import Progress as Progressed
from server.answers import Answer, Progress
from server.bridge import Channel
from server.errors import ApiError, from_trimtab
from server.generation import Job, chat_job, completion_job
from server.metrics import Tracker
from server.routes.body import GONE, documented, parse
from server.schema import ChatBody, CompletionBody
from server.state import Services, Shared
from server.stream import Chunks, EventStream, disconnected

router = APIRouter(prefix="/v1")

T = TypeVar("T")

LARGE = 65536  # bytes of a body whose prompt is worth a thread: tokenizing it would hold up every stream


@router.post("/chat/completions", **documented(ChatBody, "Answers a conversation."))
async def chat_completions(request: Request, services: Shared) -> Any:
    """OpenAI's chat completions."""
    return await _serve(request, services, ChatBody, chat_job)


@router.post("/completions", **documented(CompletionBody, "Continues a text."))
async def completions(request: Request, services: Shared) -> Any:
    """OpenAI's text completions."""
    return await _serve(request, services, CompletionBody, completion_job)


async def _serve(request: Request, services: Services, schema: Any, make: Callable[..., Job]) -> Any:
    try:
        raw = await request.body()
        body = parse(raw, schema)
        arguments = (body, services.served, services.config, getattr(request.state, "key", ""))
        job = await asyncio.to_thread(make, *arguments) if len(raw) > LARGE else make(*arguments)
        channel = services.bridge.submit(job.requests)
    except ClientDisconnect:
        return GONE
    except (ApiError, TrimtabError) as error:
        refusal = error if isinstance(error, ApiError) else from_trimtab(error)
        services.metrics.refused.labels(str(refusal.status)).inc()
        raise refusal from error
    run = Run(job, channel, services.metrics.track(job))
    return await (run.stream(request) if job.stream else run.whole(request))


class Run:
    """One job between the engine and its client."""

    def __init__(self, job: Job, channel: Channel, tracker: Tracker) -> None:
        self.job, self.channel, self.tracker = job, channel, tracker
        self.progress = Progress(job, channel.positions)
        self._failed = False

    async def whole(self, request: Request) -> Response:
        """The answer in one piece."""
        answer = Answer(self.job, self.progress)

        async def gather() -> dict[str, Any]:
            while not self.progress.done:
                answer.take(await self._events())
            return answer.body()

        try:
            body = await unless_gone(request, gather())
        except ApiError:
            self._failed = True
            raise
        finally:
            self._end()
        return GONE if body is None else JSONResponse(body)

    async def stream(self, request: Request) -> Any:
        """The answer as events. It begins with the first of them, so that a refusal still has a status of its own."""
        chunks = Chunks(self.job, self.progress)
        try:
            events = await unless_gone(request, self._events())
            begun = None if events is None else chunks.take(events)
        except BaseException as error:
            self._failed = isinstance(error, ApiError)
            self._end()
            raise
        if begun is None:
            self._end()
            return GONE
        return EventStream(self._pieces(chunks, begun), self._end)

    async def _pieces(self, chunks: Chunks, begun: str) -> AsyncIterator[str]:
        try:
            piece = begun
            while not self.progress.done:
                if piece:
                    yield piece
                piece = chunks.take(await self._events())
            yield piece + chunks.end()
        except ApiError as error:
            self._failed = True
            yield chunks.failure(error)

    async def _events(self) -> list[Event]:
        events = await self.channel.events()
        if not all(isinstance(event, Progressed) for event in events):  # no token has come with it
            self.tracker.progressed()
        return events

    def _end(self) -> None:
        aborted = self.channel.close()
        outcome = "error" if self._failed else "abort" if aborted else "ok"
        self.tracker.end(outcome, self.progress.completion_tokens, self.progress.searches)


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None as soon as the client has gone; then `work` is cancelled."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
