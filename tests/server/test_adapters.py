"""Adapters from the configuration file to the answer: real (tiny) weights behind the real server's app."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import PeftModel

from decoding.texts import load_texts
from server.bridge import Bridge, launch_thread
from server.config import ConfigError, load_config
from server.start import build_app, make_engine
from tests.decoding.test_adapters import LLAMA, greedy, make_adapter, pytestmark  # noqa: F401
from tests.fakes import byte_tokenizer
from tests.server.test_errors import error_of
from tests.tiny import tiny_directory, tiny_model

YAML = """
models:
  base: {path: %(root)s/base, dtype: float32}
  tuned: {path: %(root)s/tuned, kind: adapter, of: base}
  other: {path: %(root)s/other, kind: adapter, of: base}
presets:
  steered: {model: base, decoding: {strategy: proxy_tuning, expert: tuned, anti: base}}
kv_memory: 4MiB
log_level: error
"""
PROMPT = "It was a dark night"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    tiny_directory("llama", root / "base", **LLAMA)
    byte_tokenizer().save_pretrained(root / "base")
    make_adapter(root / "tuned", tiny_model("llama", **LLAMA), 1, r=8, lora_alpha=16, target_modules=["q_proj"])
    make_adapter(root / "other", tiny_model("llama", **LLAMA), 2, r=4, lora_alpha=8, target_modules=["down_proj"])
    (root / "trimtab.yaml").write_text(YAML % {"root": root})
    return root


async def ask(root: Path, *bodies: dict[str, Any]) -> tuple[list[httpx.Response], list[dict[str, Any]], str]:
    """Answers to completions sent at once, the list of models, and the metrics."""
    config = load_config(file=str(root / "trimtab.yaml"), environment={})
    bridge = Bridge(functools.partial(make_engine, config.specs(), config.engine()), launch=launch_thread)
    await bridge.start()
    transport = httpx.ASGITransport(build_app(config, bridge, load_texts(config.specs())))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            listed = (await client.get("/v1/models")).json()["data"]
            return list(answers), listed, (await client.get("/metrics")).text
    finally:
        bridge.stop()


def test_adapters_are_served_as_models(root: Path) -> None:
    common = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    names = ["base", "tuned", "other", "steered"]
    steered = {"model": "other", "decoding": {"strategy": "proxy_tuning", "expert": "tuned", "anti": "base"}}
    answers, listed, metrics = asyncio.run(
        ask(root, *(common | {"model": name} for name in names), common | steered, common | {"model": "gone"})
    )
    prompt = tuple(byte_tokenizer().encode(PROMPT))
    bare = tiny_model("llama", **LLAMA)
    wanted = [greedy(bare, prompt)]
    for name in ("tuned", "other"):
        wanted.append(greedy(PeftModel.from_pretrained(tiny_model("llama", **LLAMA), root / name).eval(), prompt))
    # base + (tuned - base) is the tuned model itself
    wanted.append(wanted[1])
    for answer, want in zip(answers[:4], wanted, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == want
    assert [answer.json()["model"] for answer in answers[:4]] == names
    mixed = answers[4].json()["decoding"]
    assert mixed["models"] == ["other", "tuned", "base"]
    assert list(mixed["forwards"]) == ["base"]
    assert error_of(answers[5], 404)["code"] == "model_not_found"
    assert {model["id"]: (model["root"], model["parent"]) for model in listed} == {
        "base": ("base", None),
        "tuned": ("tuned", "base"),
        "other": ("other", "base"),
        "steered": ("base", "base"),
    }
    assert 'model="base"' in metrics


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("a: {path: x}, b: {path: y, kind: adapter}", r"models\.b\.of: name the model that the adapter is of: a\."),
        ("a: {path: x}, b: {path: y, kind: adapter, of: c}", r"models\.b\.of: name the model"),
        ("a: {path: x}, b: {path: y, kind: adapter, of: b}", r"models\.b\.of: name the model"),
        ("a: {path: x}, b: {path: y, of: a}", r"models\.b\.of: only adapter and judge"),
        ("a: {path: x}, b: {path: y, kind: adapter, of: a, dtype: float32}", r"models\.b\.dtype: .*its model 'a'"),
        ("a: {path: x}, b: {path: y, kind: adaptor, of: a}", r"models\.b\.kind: "),
    ],
)
def test_bad_entries_name_the_key(tmp_path: Path, models: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"models: {{{models}}}")
    with pytest.raises(ConfigError, match=message):
        load_config(file=str(file), environment={})
