"""The app factory: an ASGI app from its collaborators, which it does not start, stop or load."""

from __future__ import annotations

from fastapi import FastAPI

from server import errors
from server.auth import Authentication, BodyLimit
from server.routes import admin, generate, health, models, score, tokens
from server.state import Services


def create_app(services: Services) -> FastAPI:
    """The app. `services.bridge` has been started, and whoever started it stops it."""
    app = FastAPI(
        title="Trimtab",
        summary="Large frozen language models, steered by small ones while they decode. OpenAI's API.",
        redirect_slashes=False,
        docs_url="/docs",
        redoc_url=None,
    )
    app.state.services = services
    modules = [generate, models, score, tokens, health] + ([admin] if services.admin is not None else [])
    for module in modules:
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=services.config.max_body_size)
    # Outermost: no body is read without a key.
    app.add_middleware(Authentication, keys=services.config.api_key, admin_key=services.config.admin_key)
    return app
