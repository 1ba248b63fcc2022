"""The HTTP server under concurrent streams, beside the engine alone.

The client is a bare socket reader: on a small machine a full HTTP client would be measured instead of the server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import Timing


def serve_and_measure(
    model: Path, engine_side: Callable[[], Timing], prompts: list[list[int]], new_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians of `http xN` and of `engine beside http`, interleaved. Starts and stops a server of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", str(model), "--served-model-name", "base", "--port", str(port)]
    server = subprocess.Popen([*command, "--no-enable-prefix-caching"], stdout=subprocess.DEVNULL)
    try:
        _wait_ready(port, server)
        sides = {f"http x{len(prompts)}": lambda: asyncio.run(_load(port, prompts, new_tokens))}
        sides["engine beside http"] = engine_side
        seen: dict[str, list[Timing]] = {name: [] for name in sides}
        for i in range(rounds + 1):
            for name, side in sides.items():
                timing = side()
                if i:
                    seen[name].append(timing)
    finally:
        server.terminate()
        server.wait(30)
    return {
        name: {
            "step_ms": 1e3 * statistics.median(t.step for t in timings),
            "total_s": statistics.median(t.total for t in timings),
        }
        for name, timings in seen.items()
    }


def _wait_ready(port: int, server: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not become ready")


async def _load(port: int, prompts: list[list[int]], new_tokens: int) -> Timing:
    """All prompts as concurrent streamed completions."""
    began = time.perf_counter()
    firsts = await asyncio.gather(*(_stream(port, prompt, new_tokens) for prompt in prompts))
    ended = time.perf_counter()
    return Timing((ended - max(firsts)) / (new_tokens - 1), ended - began)


async def _stream(port: int, prompt: list[int], new_tokens: int) -> float:
    """One streamed completion, read to its end; returns the time of its first chunk. Raises if it did not finish."""
    body = json.dumps(
        {
            "model": "base",
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    await writer.drain()
    first, tail = 0.0, b""
    while piece := await reader.read(65536):
        tail = (tail + piece)[-400:]
        if not first and b"data: " in piece:
            first = time.perf_counter()
    writer.close()
    if not first or b"[DONE]" not in tail:
        raise RuntimeError(f"a stream broke off: {tail[-200:]!r}")
    return first
