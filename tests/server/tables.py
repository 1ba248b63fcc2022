"""A server in this process over the real engine, whose models are tables: what comes out is exactly known."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import torch

from decoding.admit import Hosted
from decoding.core import EngineConfig, ModelSpec
from decoding.engine import Engine
from decoding.text import TextModel
from server.bridge import Bridge, launch_thread
from server.config import Config
from server.start import build_app
from tests.fakes import TableModel, byte_tokenizer, random_table

MODELS = {"base": "causal", "small": "causal", "prm": "prm"}


def letters(seed: int, scale: float = 3.0) -> torch.Tensor:
    """A table that writes small letters and sometimes ends."""
    table = random_table(seed, width=257, scale=scale)
    keep = torch.full((257,), -60.0)
    keep[97:123], keep[256] = 0.0, -1.0
    return table + keep


def specs() -> dict[str, ModelSpec]:
    extra: dict[str, Any] = {"prm": {"step_marker": "+", "score_tokens": ("y", "n")}}
    return {id: ModelSpec(id, f"/{id}", kind=kind, **extra.get(id, {})) for id, kind in MODELS.items()}  # type: ignore[arg-type]


def make_engine(kinds: Mapping[str, str] = MODELS) -> Engine:
    tables = {"base": letters(1), "small": letters(2), "prm": random_table(3, width=257)}
    hosted = {
        id: Hosted(
            TableModel(id, tables[id], memory=5), TextModel(id, byte_tokenizer()), 40_000, None, kind, specs()[id]
        )
        for id, kind in kinds.items()
    }
    return Engine(hosted, EngineConfig(block_size=4))


@contextlib.asynccontextmanager
async def client_of(kinds: Mapping[str, str] = MODELS, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server of these models; nothing is left in its queue at the end."""
    entries = {id: {"path": f"/{id}", "kind": kind} for id, kind in kinds.items()}
    best = {"search": {"kind": "best_of_n", "n": 3, "scorer": "prm"}}
    presets = {"base@best": {"model": "base", "decoding": best}} if "base" in kinds else {}
    config = Config.model_validate({"models": entries, "presets": presets, "log_level": "error"} | settings)
    bridge = Bridge(functools.partial(make_engine, kinds), launch=launch_thread)
    await bridge.start()
    texts = {id: TextModel(id, byte_tokenizer()) for id in MODELS}
    transport = httpx.ASGITransport(build_app(config, bridge, texts))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test/", timeout=60) as client:
            yield client
        assert bridge.sequences == 0
    finally:
        bridge.stop()


def ask(path: str, body: dict[str, Any] | None = None, **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(**settings) as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(run())
