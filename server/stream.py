"""Streams: events of a job as server-sent events, cheap per token, and a response that notices a client leaving.

A chunk is a constant frame around one JSON string, so it costs a few microseconds; all chunks of a tick go out in one
write. The frames are OpenAI's: role in the first delta, `usage: null` on every chunk and a last chunk without choices
when usage was asked for, an error frame when the request fails half-way, `[DONE]` at the end.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from decoding.events import Delta, Event, PromptLogprobs
from decoding.events import Progress as SearchProgress
from server.answers import Progress, trace_entries
from server.errors import ApiError
from server.generation import Job
from server.logprobs import TextLogprobs, chat_logprobs

DONE = "data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Chunks:
    """A job's events as the text of frames."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        kind = "chat.completion.chunk" if job.chat else "text_completion"
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.name, "system_fingerprint": None}
        self._head = f"data: {json.dumps(head)[:-1]}, "
        # What stands around a text in the usual chunk: no log-probs, no ids, not the last one.
        self._before = '"delta": {"content": ' if job.chat else '"text": '
        self._after = "}" if job.chat else ""
        plain = job.logprobs is None and not job.return_token_ids and not job.continuous_usage and not job.program.trace
        self._tail = self._ending(None, "") if plain else None
        self._logprobs = [TextLogprobs(job.text.vocabulary, job.skip_special_tokens) for _ in range(job.choices)]
        self._begun = [False] * job.choices
        self._held = ""

    def take(self, events: Sequence[Event]) -> str:
        """Frames of the events, possibly none. Raises ApiError when the request has failed."""
        frames = []
        for index, event in self.progress.take(events):
            if isinstance(event, PromptLogprobs):
                frames.extend(self._echoes(index, event))
            elif isinstance(event, SearchProgress):
                frames.append(self._told(index, event))
            else:
                frames.append(self._chunk(index, event))
        return "".join(frames)

    def _told(self, position: int, event: SearchProgress) -> str:
        """How far the search of a prompt is, in a chunk without choices, which clients of OpenAI's skip."""
        told: dict[str, Any] = {name: value for name, value in event.numbers if math.isfinite(value)}
        told |= {"message": event.message}
        if len(self.job.requests) > 1:
            told["prompt"] = position
        return f'{self._head}"choices": [], "decoding": {json.dumps({"progress": told})}{self._usage()}}}\n\n'

    def end(self) -> str:
        """The frames after the last event: the report in the last chunk, usage, and the end of the stream."""
        report = f', "decoding": {json.dumps(self.progress.decoding())}'
        if self.job.include_usage:
            usage = json.dumps(self.progress.usage())
            return f'{self._held}{self._head}"choices": [], "usage": {usage}{report}}}\n\n{DONE}'
        return f"{self._held[:-3]}{report}}}\n\n{DONE}" if self._held else DONE

    def failure(self, error: ApiError) -> str:
        """The frames of a request that failed after its stream had begun."""
        return f"{self._held}{error.frame()}{DONE}"

    def _chunk(self, index: int, delta: Delta) -> str:
        opening = "" if self._begun[index] else self._opening(index)
        if delta.finish_reason is None and self._tail is not None:
            if not delta.text:
                return opening
            text = encode_basestring(delta.text)
            return f'{opening}{self._head}"choices": [{{"index": {index}, {self._before}{text}{self._after}{self._tail}'
        frame = self._full_chunk(index, delta)
        if delta.finish_reason is not None and self.progress.unfinished == 0:
            frame, self._held = "", self._held + frame  # the last chunk waits for the report that it carries
        return opening + frame

    def _full_chunk(self, index: int, delta: Delta) -> str:
        job, extra = self.job, ""
        if job.return_token_ids:
            extra = f', "token_ids": {json.dumps(delta.token_ids)}'
        if delta.trace:
            extra += f', "decoding": {json.dumps({"trace": trace_entries(delta)})}'
        logprobs = None
        if job.logprobs is not None and delta.logprobs:
            logprobs = (
                chat_logprobs(job.text.vocabulary, delta.logprobs)
                if job.chat
                else self._logprobs[index].answer(delta.logprobs)
            )
        if not delta.text and not delta.finish_reason and not extra and logprobs is None and not job.continuous_usage:
            return ""
        payload = f"{self._before}{encode_basestring(delta.text)}{self._after}"
        if job.chat and not delta.text:
            payload = '"delta": {}'
        ending = self._ending(delta.finish_reason, extra, logprobs)
        return f'{self._head}"choices": [{{"index": {index}, {payload}{ending}'

    def _ending(self, finish_reason: str | None, extra: str, logprobs: dict[str, Any] | None = None) -> str:
        reason = json.dumps(finish_reason)
        return f', "logprobs": {json.dumps(logprobs)}, "finish_reason": {reason}{extra}}}]{self._usage()}}}\n\n'

    def _usage(self) -> str:
        if self.job.continuous_usage:
            return f', "usage": {json.dumps(self.progress.usage())}'
        return ', "usage": null' if self.job.include_usage else ""

    def _opening(self, index: int) -> str:
        """What a choice begins with: the role, or the echoed prompt where no log-probs have brought it."""
        self._begun[index] = True
        job, position = self.job, index // self.job.n
        extra = ""
        if job.return_token_ids:
            extra = f', "prompt_token_ids": {json.dumps(job.requests[position].prompts[0])}'
        if job.chat:
            payload = '"delta": {"role": "assistant", "content": "", "refusal": null}'
        elif job.echoes or extra:
            payload = f'"text": {encode_basestring(job.echoes[position] if job.echoes else "")}'
        else:
            return ""
        return f'{self._head}"choices": [{{"index": {index}, {payload}{self._ending(None, extra)}'

    def _echoes(self, position: int, event: PromptLogprobs) -> list[str]:
        job, frames = self.job, []
        ids, text = job.requests[position].prompts[0], job.echoes[position]
        for index in range(position * job.n, (position + 1) * job.n):
            self._begun[index] = True
            made = self._logprobs[index].prompt(ids, event.logprobs, text)
            extra = f', "prompt_token_ids": {json.dumps(ids)}' if job.return_token_ids else ""
            ending = self._ending(None, extra, made)
            frames.append(f'{self._head}"choices": [{{"index": {index}, "text": {encode_basestring(text)}{ending}')
        return frames


class EventStream(Response):
    """An ASGI response that sends `pieces` as they come, and stops the moment the client has gone.

    `on_end` runs once, however the stream ends. Not sse-starlette: that formats an object per event and sends each by
    itself, several times the cost of a chunk.
    """

    def __init__(self, pieces: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers(_HEADERS)
        self._pieces, self._on_end = pieces, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        sender = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait([sender, watcher], return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError:
            pass  # the client went away while something was sent
        finally:
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)
            self._on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
