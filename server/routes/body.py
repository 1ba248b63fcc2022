"""Bodies, read by hand: the answer to a bad one is OpenAI's and not the framework's. Documented all the same."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Response
from pydantic import BaseModel, ValidationError

from server.errors import from_validation

M = TypeVar("M", bound=BaseModel)

GONE = Response(status_code=499)  # nobody reads it: the client has gone


def parse(raw: bytes, schema: type[M]) -> M:
    """The body as `schema`. Raises ApiError 400: bad JSON, bad UTF-8, unknown or wrong fields."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error, schema.model_fields) from error


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def documented(schema: type[BaseModel], summary: str) -> dict[str, Any]:
    """Keyword arguments of a route that reads its body by hand: body and errors for `/openapi.json`."""
    described = _inlined(schema.model_json_schema())
    errors = {
        status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
        for status, what in {400: "Bad input", 401: "No or wrong key", 404: "Unknown model", 413: "Body too large",
                             500: "The engine failed", 503: "Full or shutting down"}.items()
    }  # fmt: skip
    return {
        "summary": summary,
        "responses": errors,
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": described}}}},
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its local definitions put in place: OpenAPI has them elsewhere than pydantic."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return walk(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {key: walk(value) for key, value in node.items()}
        return [walk(item) for item in node] if isinstance(node, list) else node

    walked: dict[str, Any] = walk(schema)
    return walked
