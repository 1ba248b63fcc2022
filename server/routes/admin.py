"""`/admin/adapters`: adapters loaded and unloaded while others run. Only there if the operator gave an admin key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from server.admin import Admin
from server.routes.body import GONE, documented, parse
from server.schema import AdapterBody
from server.state import Services, Shared

router = APIRouter(prefix="/admin")


@router.get("/adapters", summary="The adapters that are loaded.")
async def adapters(services: Shared) -> dict[str, Any]:
    """OpenAI's model objects, those of adapters only."""
    catalog = services.served.catalog
    names = [name for name, entry in catalog.items() if entry.info.of is not None]
    return {"object": "list", "data": [services.served.model_object(name) for name in names]}


@router.post("/adapters", **documented(AdapterBody, "Loads an adapter."))
async def load(request: Request, services: Shared) -> Any:
    """The model object of the adapter, which is served from now on."""
    try:
        body = parse(await request.body(), AdapterBody)
    except ClientDisconnect:
        return GONE
    await _admin(services).load(services, body.id, body.path, body.of)
    return services.served.model_object(body.id)


@router.delete("/adapters/{id:path}", summary="Unloads an adapter.")
async def unload(id: str, services: Shared) -> dict[str, Any]:
    """409 while a request or a preset uses it, 404 for one that is not loaded."""
    await _admin(services).unload(services, id)
    return {"id": id, "object": "model", "deleted": True}


def _admin(services: Services) -> Admin:
    assert services.admin is not None, "the routes are there only if there is an administration"
    return services.admin
