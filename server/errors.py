"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong.

`ApiError` is the one exception that routes raise for a client; `from_trimtab` maps the engine's exception tree onto it.
Input never makes a 500.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from decoding.core import AdapterInUse, BadRequest, ModelLoadError, Overloaded, TrimtabError, UnknownModel
from decoding.events import Failed
from decoding.scorers.spec import ScorerParams

logger = logging.getLogger("trimtab.server")

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}


class ApiError(Exception):
    """An error response: HTTP `status`, a sentence for a person, the field and OpenAI's code for a program."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object as it is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 429 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response of its own."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)

    def frame(self) -> str:
        """The error as a frame of a stream that has begun."""
        return f"data: {json.dumps(self.body)}\n\n"


def from_trimtab(error: TrimtabError) -> ApiError:
    """The response to an exception of the engine's tree."""
    if isinstance(error, UnknownModel) and (error.param or "model") == "model":
        return ApiError(404, error.message, error.param, error.code)
    if isinstance(error, BadRequest):
        return ApiError(400, error.message, error.param, error.code)
    if isinstance(error, Overloaded):
        return ApiError(503, str(error), code="overloaded", retry_after=error.retry_after)
    if isinstance(error, AdapterInUse):
        return ApiError(409, str(error), code="adapter_in_use")
    if isinstance(error, ModelLoadError):
        return ApiError(400, str(error), code="model_load_error")
    return ApiError(500, str(error), code="engine_failure")


def from_failed(event: Failed) -> ApiError:
    """The response to a request that failed inside the engine."""
    status = {"BadRequest": 400, "UnknownModel": 404, "Overloaded": 503}.get(event.kind, 500)
    code = event.code or {503: "overloaded", 500: "engine_failure"}.get(status)
    return ApiError(status, event.message, event.param, code, retry_after=1 if status == 503 else None)


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


_OBJECT = ScorerParams.__name__  # the one dataclass that is a branch of a union
_SCORER_FIELDS = [each.name for each in fields(ScorerParams)]
# pydantic's names of a union's branches
_BRANCH = re.compile(rf"(int|float|str|bool|{_OBJECT}|(literal|list|dict|tuple)\[.*)$")


def _path(error: Mapping[str, Any]) -> list[str]:
    return [str(part) for part in error["loc"] if not _BRANCH.match(str(part))]


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def from_validation(error: ValidationError, known: Iterable[str] = (), prefix: str = "") -> ApiError:
    """The first thing that is wrong with a body, in one sentence; `known` are the field names of its top level."""
    found = error.errors(include_url=False, include_input=False)
    first = found[0]
    path = _path(first)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if len(path) < len(first["loc"]):  # a field that takes one of several types fits none of them
        same = [each for each in found if each["loc"][:1] == first["loc"][:1]]
        inside = [each for each in same if _OBJECT in each["loc"] and len(_path(each)) > len(path)]
        message = " or ".join(dict.fromkeys(_lowered(each["msg"]) for each in same))
        if inside:  # what is wrong with an object says more than that it is no text
            first, path, message = inside[-1], _path(inside[-1]), inside[-1]["msg"]
    param = ".".join([prefix, *path] if prefix else path) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}.")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        inner = _SCORER_FIELDS if first["type"] == "unexpected_keyword_argument" and _OBJECT in first["loc"] else ()
        hint = nearest(path[-1], inner or known) if inner or len(path) == 1 else ""
        return ApiError(400, f"Unrecognized request argument: '{param}'.{hint}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if first["type"] in ("unsupported", "value_error"):
        return ApiError(400, message, param, "unsupported_parameter" if first["type"] == "unsupported" else None)
    return ApiError(400, f"Invalid value for '{param or 'body'}': {_lowered(message)}.", param, "invalid_value")


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_trimtab_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TrimtabError)
    return from_trimtab(error).response()


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"Unknown path: {request.method} {request.url.path}.",
        405: f"The method {request.method} is not allowed for {request.url.path}.",
    }
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    response = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)), code=code).response()
    response.headers.update(error.headers or {})
    return response


async def _on_bad_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return ApiError(400, f"Invalid value for '{name}': {first['msg']}.", name, "invalid_value").response()


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("unhandled error in %s %s", request.method, request.url.path, exc_info=error)
    return ApiError(
        500, "The server failed to handle this request; its log has the details.", code="internal"
    ).response()


def install(app: FastAPI) -> None:
    """Makes every error of the app an error object."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(TrimtabError, _on_trimtab_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(Exception, _on_bug)
