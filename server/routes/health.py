"""`GET /health`, `/ready`, `/version`, `/metrics`: for load balancers, operators and Prometheus."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.state import Shared

router = APIRouter()


@router.get("/health", summary="Whether the engine runs.")
async def health(services: Shared) -> Response:
    """200 while the engine runs, 503 when it has stopped and the server must be restarted."""
    alive = services.bridge.alive
    return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)


@router.get("/ready", summary="Whether a request would be taken now.")
async def ready(services: Shared) -> Response:
    """200 if loaded, not shutting down and the queue is not full; else 503 with the reason."""
    bridge = services.bridge
    reason = None
    if not bridge.alive:
        reason = "the engine has stopped"
    elif bridge.draining:
        reason = "shutting down"
    elif bridge.full:
        reason = "the queue is full"
    headers = {"Retry-After": "1"} if reason else None
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200, headers)


@router.get("/version", summary="The server's version.")
async def version() -> dict[str, Any]:
    """The version of the distribution, or "unknown" when it runs from a checkout that is not installed."""
    try:
        return {"version": importlib.metadata.version("trimtab")}
    except importlib.metadata.PackageNotFoundError:
        return {"version": "unknown"}


@router.get("/metrics", summary="Prometheus metrics.")
async def metrics(services: Shared) -> Response:
    """The exposition format."""
    return Response(services.metrics.text(), media_type=CONTENT_TYPE_LATEST)
