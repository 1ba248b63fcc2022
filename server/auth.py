"""API keys and the body limit: what is decided about a request before a route sees it.

Plain ASGI middleware: it costs microseconds, and it sees disconnects and chunked bodies as they are.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError

OPEN_PATHS = frozenset({"/health"})
ADMIN = "/admin/"


class Authentication:
    """Refuses every request without one of the keys, `/health` excepted. Without keys everything is open.

    With an admin key, what lies under `/admin/` is open to that key alone, and that key opens nothing else.
    The path compared is the one the router will see, so no spelling of a path gets past it. Keys are compared by
    digest in constant time, all of them, so neither their length nor their order shows.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin_key: str | None = None) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._admin = [] if admin_key is None else [_digest(admin_key.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        administers = bool(self._admin) and scope["path"].startswith(ADMIN)
        keys = self._admin if administers else self._digests
        if not keys or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            raise ValueError(f"no protocol '{scope['type']}' here")
        elif (digest := _match(scope, keys)) is not None:
            scope.setdefault("state", {})["key"] = digest.hex()  # keys do not share a prefix cache
            await self.app(scope, receive, send)
        elif administers and _match(scope, self._digests) is not None:
            await ApiError(403, "This key may not administer; send the admin key.").response()(scope, receive, send)
        else:
            what = "admin" if administers else "API"
            message = f"Missing or wrong {what} key: send 'Authorization: Bearer <key>'."
            await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _match(scope: Scope, digests: Sequence[bytes]) -> bytes | None:
    """The digest of the key that the request came with, if it is one of these."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or values[0][:7].lower() != b"bearer ":
        return None
    given = _digest(values[0][7:].strip())
    return given if sum(hmac.compare_digest(given, digest) for digest in digests) else None


class BodyLimit:
    """Answers 413 to a body above `limit` bytes: by its Content-Length at once, without one when it gets too long."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = ApiError(413, f"The body is larger than {self.limit} bytes.", code="request_too_large")
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self.limit:
            await error.response()(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if received > self.limit:
                raise error  # while the route reads the body, before anything was sent
            return message

        await self.app(scope, limited, send)
