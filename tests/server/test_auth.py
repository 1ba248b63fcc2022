"""Keys and the body limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import Ask, open_client
from tests.server.test_errors import TEXT, X, error_of

KEYS: dict[str, Any] = {"api_key": ["secret", "other"]}


@pytest.mark.parametrize(
    "value", [None, "secret", "Bearer", "Bearer wrong", "Bearer secretx", "Basic secret", "Bearer é"]
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/ready", "/openapi.json", "/nothing", "/health/", "//health"]
)
def test_without_a_key_everything_is_refused(ask: Ask, path: str, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value.encode()}
    response = ask(path, headers=headers, **KEYS)
    assert error_of(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_any_of_the_keys_opens(ask: Ask) -> None:
    for key in ("Bearer secret", "bearer other"):
        assert ask("/v1/models", headers={"Authorization": key}, **KEYS).status_code == 200
    assert ask("/health", **KEYS).status_code == 200
    assert ask("/v1/models").status_code == 200


def test_two_authorization_headers_are_none() -> None:
    async def run() -> httpx.Response:
        async with open_client(**KEYS) as client:
            headers = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer secret")]
            return await client.get("/v1/models", headers=headers)

    error_of(asyncio.run(run()), 401)


def test_keys_do_not_share_cached_prompts(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.bridge import Bridge

    salts, submit = [], Bridge.submit

    def spy(self: Bridge, requests: Any) -> Any:
        salts.extend(request.salt for request in requests)
        return submit(self, requests)

    monkeypatch.setattr(Bridge, "submit", spy)
    for key in ("secret", "other"):
        ask(TEXT, X | {"cache_salt": "s"}, headers={"Authorization": f"Bearer {key}"}, **KEYS)
    ask(TEXT, X, headers={"Authorization": "Bearer other"}, **KEYS)
    assert len(set(salts)) == 3
    assert not any("secret" in salt or "other" in salt for salt in salts)


def test_large_bodies_are_refused_by_their_length_and_while_they_come(ask: Ask) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    async def run() -> httpx.Response:
        async with open_client(max_body_size=200_000) as client:
            return await client.post(TEXT, content=chunked())

    assert error_of(asyncio.run(run()), 413)["code"] == "request_too_large"
    large = ask(TEXT, content=b" " * 1001, max_body_size=1000)
    assert "larger than 1000 bytes" in error_of(large, 413)["message"]
    assert ask(TEXT, X, max_body_size=1000).status_code == 200
    assert error_of(ask(TEXT, content=b" " * (8 * 2**20 + 1)), 413)


def test_large_bodies_below_the_limit_are_served(ask: Ask) -> None:
    assert "too many" not in ask(TEXT, X | {"user": "u" * 100_000}).text
    assert ask(TEXT, X | {"user": "u" * 100_000}).status_code == 200
