"""`GET /v1/models`, `GET /v1/models/{id}`, `GET /v1/strategies`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.state import Shared

router = APIRouter(prefix="/v1")


@router.get("/models", summary="Models and presets, the default first.")
async def models(services: Shared) -> dict[str, Any]:
    """OpenAI's list of models; presets have `root` and `parent`."""
    served = services.served
    return {"object": "list", "data": [served.model_object(name) for name in served.names]}


@router.get("/models/{name:path}", summary="One model or preset.")
async def model(name: str, services: Shared) -> dict[str, Any]:
    """One model; an unknown one is a 404 `model_not_found`."""
    return services.served.model_object(name)


@router.get("/strategies", summary="What `decoding.strategy` may be.")
async def strategies(services: Shared) -> dict[str, Any]:
    """Every strategy with the JSON schema of its parameters; `speculation` combines with all of them."""
    served = services.served
    return {"object": "list", "data": served.strategies(), "speculation": served.speculation()}
