"""Speculation from the configuration file to the answer: real (tiny) weights behind the real server's app."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from decoding.core import ModelLoadError
from decoding.judge import weights_hash
from decoding.texts import load_texts
from server.bridge import Bridge, launch_thread
from server.config import ConfigError, load_config
from server.start import build_app, make_engine
from tests.fakes import byte_tokenizer
from tests.server.test_errors import error_of
from tests.tiny import tiny_directory

SHAPE: dict[str, Any] = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None}
YAML = """
models:
  judge: {path: %(root)s/judge, kind: judge, of: base}
  base: {path: %(root)s/base, dtype: float32}
  small: {path: %(root)s/small, dtype: float32}
presets:
  fast: {model: base, decoding: {strategy: plain, speculation: {draft: small, tokens: 3}}}
kv_memory: 4MiB
log_level: error
"""
TEXT = {"model": "base", "prompt": "It was a dark night", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def write_judge(root: Path, of: Path, hidden: int = 32) -> None:
    root.mkdir(exist_ok=True)
    save_file({"weight": torch.zeros(hidden), "bias": torch.full((1,), 50.0)}, root / "judge.safetensors")
    card = {"role": "judge", "target_hash": weights_hash(of), "hidden_size": hidden}
    (root / "trimtab.json").write_text(json.dumps(card))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drafting")
    for seed, name in enumerate(("base", "small")):
        tiny_directory("llama", root / name, seed, num_hidden_layers=3 - seed, **SHAPE)
        byte_tokenizer().save_pretrained(root / name)
    write_judge(root / "judge", root / "base")
    (root / "trimtab.yaml").write_text(YAML % {"root": root})
    return root


Told = tuple[list[httpx.Response], str, list[str]]


def ask(root: Path, *bodies: dict[str, Any], path: str = "/v1/completions") -> Told:
    """Answers to bodies sent at once, the metrics, and the ids of the models."""

    async def run() -> Told:
        config = load_config(file=str(root / "trimtab.yaml"), environment={})
        bridge = Bridge(functools.partial(make_engine, config.specs(), config.engine()), launch=launch_thread)
        await bridge.start()
        transport = httpx.ASGITransport(build_app(config, bridge, load_texts(config.specs())))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                answers = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
                await asyncio.sleep(0.4)  # the engine tells its statistics now and then
                await client.post("/v1/completions", json=TEXT | {"max_tokens": 1})
                listed = [each["id"] for each in (await client.get("/v1/models")).json()["data"]]
                return list(answers), (await client.get("/metrics")).text, listed
        finally:
            bridge.stop()

    return asyncio.run(run())


def test_drafts_change_the_cost_and_not_the_text(root: Path) -> None:
    specs: list[Any] = [None, {"draft": "small", "tokens": 3}, {"draft": "ngram"}, True]
    seeded = TEXT | {"temperature": 1, "seed": 5, "top_p": 0.9, "logprobs": 2}
    bodies = [t | {"decoding": {"speculation": s, "trace": True}} for t in (TEXT, seeded) for s in specs]
    answers, metrics, listed = ask(root, *bodies)
    assert listed == ["base", "small", "fast"]  # a judge head is no model
    for batch in (answers[:4], answers[4:]):
        assert len({a.json()["choices"][0]["text"] for a in batch}) == 1
        first, *others = [a.json()["choices"][0]["logprobs"] for a in batch]
        for other in others:  # to rounding: batches of other shapes add up in another order
            assert (other is None) == (first is None)
            assert first is None or other["token_logprobs"] == pytest.approx(first["token_logprobs"], abs=1e-4)
    drafts = answers[1].json()["decoding"]["speculation"]
    assert drafts["drafted"] > 0
    assert drafts["block_efficiency"] == pytest.approx(24 / (24 - drafts["accepted"]), abs=0.5)
    trace = answers[1].json()["decoding"]["trace"][0]
    assert sum(entry["drafted"] for entry in trace) == drafts["accepted"]
    assert 'trimtab_drafted_tokens_total{draft="small",model="base",position="0"}' in metrics
    assert answers[3].json()["decoding"]["speculation"]["draft"] in ("small", "ngram")


def test_a_judge_is_used_and_told(root: Path) -> None:
    """A head that finds everything right: the drafter's text, lossy and said to be."""
    judge = TEXT | {"decoding": {"speculation": {"draft": "small", "tokens": 4, "accept": "judge"}}}
    (judged, alone), _, _ = ask(root, judge, TEXT | {"model": "small"})
    assert judged.json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]
    assert judged.json()["decoding"]["lossless"] is False
    other = {"speculation": {"draft": "ngram", "accept": "judge"}}
    (refused,), _, _ = ask(root, TEXT | {"model": "small", "decoding": other})
    assert error_of(refused)["param"] == "decoding.speculation.accept"


def test_a_prediction_drafts(root: Path) -> None:
    body = {key: value for key, value in TEXT.items() if key != "prompt"}
    body |= {"messages": [{"role": "user", "content": TEXT["prompt"]}]}
    (chat,), _, _ = ask(root, body, path="/v1/chat/completions")
    said = chat.json()["choices"][0]["message"]["content"]
    prediction = {"type": "content", "content": said}
    (again,), _, _ = ask(root, body | {"prediction": prediction}, path="/v1/chat/completions")
    assert again.json()["choices"][0]["message"]["content"] == said
    drafts = again.json()["decoding"]["speculation"]
    assert drafts["draft"] == "prediction"
    assert again.json()["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == drafts["accepted"]


@pytest.mark.parametrize(("of", "hidden", "message"), [("small", 32, "other weights"), ("base", 16, "16 numbers")])
def test_a_judge_of_something_else_is_refused(root: Path, tmp_path: Path, of: str, hidden: int, message: str) -> None:
    write_judge(tmp_path / "judge", root / of, hidden)
    file = tmp_path / "trimtab.yaml"
    file.write_text((YAML % {"root": root}).replace(f"{root}/judge", f"{tmp_path}/judge"))
    config = load_config(file=str(file), environment={})
    with pytest.raises(ModelLoadError, match=message):
        make_engine(config.specs(), config.engine())


def test_a_judge_names_its_model(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "trimtab.yaml"
    file.write_text((YAML % {"root": root}).replace("of: base", "of: nobody"))
    with pytest.raises(ConfigError, match="the judge is of: base, small"):
        load_config(file=str(file), environment={})
    file.write_text((YAML % {"root": root}) + "defaults: {model: judge}\n")
    with pytest.raises(ConfigError, match="'judge' is not served"):
        load_config(file=str(file), environment={})
