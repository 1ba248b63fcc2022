"""The app factory: an ASGI app from its collaborators, which it does not start, stop or load."""

from __future__ import annotations

from fastapi import FastAPI

from server import errors
from server.auth import Authentication, BodyLimit
from server.routes import generate, health, models, tokens
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
    for module in (generate, models, tokens, health):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=services.config.max_body_size)
    app.add_middleware(Authentication, keys=services.config.api_key)  # outermost: no body is read without a key
    return app
