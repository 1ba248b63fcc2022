"""`/admin/adapters`: who may, from where, when not; over the scripted engine, and once over real (tiny) weights."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
from collections.abc import Awaitable, Callable
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
from tests.server.conftest import Ask, open_client
from tests.server.test_errors import TEXT, X, error_of
from tests.tiny import tiny_directory, tiny_model

PATH = "/admin/adapters"
KEY = {"Authorization": "Bearer admin"}
Test = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/one", "root/two", "root/bad", "root/broken", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    return tmp_path / "root"


def served(test: Test, root: Path, **settings: Any) -> Any:
    """The test's result, over a server that may be administered."""

    async def run() -> Any:
        async with open_client(admin_key="admin", admin_root=str(root), **settings) as client:
            return await test(client)

    return asyncio.run(run())


async def load(client: httpx.AsyncClient, id: str = "tuned", path: str = "one", of: str = "base") -> httpx.Response:
    return await client.post(PATH, json={"id": id, "path": path, "of": of}, headers=KEY)


async def unload(client: httpx.AsyncClient, id: str = "tuned") -> httpx.Response:
    return await client.delete(f"{PATH}/{id}", headers=KEY)


async def names(client: httpx.AsyncClient) -> list[str]:
    return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


def test_load_use_list_and_unload(root: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        before = await names(client)
        answer = await load(client)
        assert answer.status_code == 200, answer.text
        model = answer.json()
        assert (model["id"], model["root"], model["parent"]) == ("tuned", "tuned", "base")
        assert set(await names(client)) == {*before, "tuned"}
        assert (await names(client))[0] == before[0], "the default stays the default"
        listed = (await client.get(PATH, headers=KEY)).json()["data"]
        assert [(each["id"], each["parent"]) for each in listed] == [("tuned", "base")]

        steered = {"strategy": "proxy_tuning", "expert": "tuned", "anti": "base-small"}
        for body in (X | {"model": "tuned"}, X | {"decoding": steered}):
            assert (await client.post(TEXT, json=body)).status_code == 200

        gone = await unload(client)
        assert gone.json() == {"id": "tuned", "object": "model", "deleted": True}
        assert await names(client) == before
        assert error_of(await client.post(TEXT, json=X | {"model": "tuned"}), 404)["code"] == "model_not_found"
        refused = error_of(await client.post(TEXT, json=X | {"decoding": steered}))
        assert (refused["param"], refused["code"]) == ("decoding.expert", "model_not_found")
        assert error_of(await unload(client), 404)["code"] == "model_not_found"
        assert error_of(await client.get("/v1/models/tuned"), 404)

    served(test, root)


def test_loads_at_once_lose_none(root: Path) -> None:
    async def test(client: httpx.AsyncClient) -> list[str]:
        await asyncio.gather(*(load(client, f"a{i}") for i in range(5)), load(client, "b", "two", "expert"))
        await asyncio.gather(unload(client, "a1"), load(client, "c"))
        return await names(client)

    assert {"a0", "a2", "a3", "a4", "b", "c"} < set(served(test, root))


def test_what_is_in_use_is_neither_unloaded_nor_replaced(root: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        await load(client)
        running = asyncio.create_task(client.post(TEXT, json=X | {"model": "tuned", "prompt": "[slow]"}))
        while not client.bridge.sequences:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
        for answer in (await unload(client), await load(client)):
            error = error_of(answer, 409)
            assert error["code"] == "adapter_in_use"
            assert "'tuned' is in use" in error["message"]
        assert (await running).json()["choices"][0]["finish_reason"] == "stop", "it went on untouched"
        assert (await load(client, path="two")).status_code == 200, "replaced"
        assert (await unload(client)).status_code == 200

    served(test, root)


def test_what_the_configuration_is_made_of_stays(root: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for name in ("base", "base@chat", "expert"):
            assert error_of(await unload(client, name), 404)
        for name in ("base", "base@chat", "auto"):
            error = error_of(await load(client, name), 409)
            assert (error["param"], error["code"]) == ("id", "id_taken")
        await load(client, "tuned")
        assert error_of(await load(client, "tuned", of="expert"), 409)["param"] == "id"

    served(test, root)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"path": "../outside"}, "path", "--admin-root"),
        ({"path": "/etc"}, "path", "--admin-root"),
        ({"path": "/gone/far"}, "path", "--admin-root"),
        ({"path": "one/../../outside"}, "path", "--admin-root"),
        ({"path": "link"}, "path", "--admin-root"),
        ({"path": "linked"}, "path", "--admin-root"),
        ({"path": "a\0b"}, "path", "no path"),
        ({"path": "x" * 5000}, "path", "no path"),
        ({"path": "bad"}, None, "has no adapter_config.json"),
        ({"of": "gone"}, "of", "'gone' does not exist. Served: base, expert, base-small."),
        ({"of": "base@chat"}, "of", "does not exist"),
        ({"id": ""}, "id", "1 to 256"),
        ({"id": "a\nb"}, "id", "printable"),
        ({"id": "x" * 257}, "id", "1 to 256"),
        ({"id": None}, "id", "valid string"),
        ({"kind": "adapter"}, "kind", "Unrecognized"),
    ],
)
def test_what_cannot_be_loaded(root: Path, body: dict[str, Any], param: str | None, message: str) -> None:
    os.symlink(root.parent / "outside", root / "link")
    shutil.copytree(root / "one", root / "linked")
    os.symlink(root.parent / "outside" / "adapter_config.json", root / "linked" / "adapter_model.safetensors")

    async def test(client: httpx.AsyncClient) -> None:
        before = await names(client)
        answer = await client.post(PATH, json={"id": "tuned", "path": "one", "of": "base"} | body, headers=KEY)
        error = error_of(answer)
        assert error["param"] == param
        assert message in error["message"]
        assert await names(client) == before

    served(test, root)


def test_paths_may_be_absolute_and_lead_over_links_inside(root: Path) -> None:
    os.symlink(root / "one", root / "link")

    async def test(client: httpx.AsyncClient) -> list[int]:
        answers = [await load(client, f"a{i}", path) for i, path in enumerate((str(root / "one"), "link", "./two/"))]
        return [answer.status_code for answer in answers]

    assert served(test, root) == [200] * 3


def test_a_bug_of_the_engine_is_a_500(root: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        assert error_of(await load(client, path="broken"), 500)["code"] == "engine_failure"
        assert (await client.post(TEXT, json=X)).status_code == 200

    served(test, root)


@pytest.mark.parametrize("keys", [{}, {"api_key": ["secret"]}])
def test_only_the_admin_key_administers(root: Path, keys: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = {"id": "tuned", "path": "one", "of": "base"}
        for key in (None, "Bearer wrong", "Bearer", "Bearer adminx"):
            headers = {} if key is None else {"Authorization": key}
            for method, path in (("POST", PATH), ("GET", PATH), ("DELETE", f"{PATH}/x"), ("GET", "/admin/nothing")):
                answer = await client.request(method, path, json=body, headers=headers)
                assert error_of(answer, 401)["code"] == "invalid_api_key"
        ordinary = await client.post(PATH, json=body, headers={"Authorization": "Bearer secret"})
        assert error_of(ordinary, 403 if keys else 401)
        if keys:
            assert error_of(await client.get("/v1/models", headers=KEY), 401), "the admin key opens nothing else"
        assert error_of(await client.get("/admin/nothing", headers=KEY), 404)

    served(test, root, **keys)


def test_without_a_key_there_is_no_such_path(ask: Ask) -> None:
    for headers in ({}, KEY):
        answer = ask(PATH, {"id": "tuned", "path": "one", "of": "base"}, headers=headers)
        assert error_of(answer, 404)["code"] == "unknown_url"
    assert PATH not in ask("/openapi.json").json()["paths"]


def test_it_is_documented_where_it_is(root: Path) -> None:
    async def test(client: httpx.AsyncClient) -> Any:
        return (await client.get("/openapi.json")).json()["paths"]

    paths = served(test, root)
    assert {"get", "post"} <= set(paths[PATH])
    assert "delete" in paths[f"{PATH}/{{id}}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"admin_key": "k"}, "admin_root: admin_key needs it"),
        ({"admin_root": "."}, "admin_key: admin_root needs it"),
        ({"admin_key": "k", "admin_root": "/gone/far"}, "there is no directory '/gone/far'"),
        ({"admin_key": "k", "admin_root": ".", "api_key": ["a", "k"]}, "another key than those of api_key"),
        ({"admin_key": "", "admin_root": "."}, "admin_key: "),
    ],
)
def test_key_and_root_come_together(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"models": {"a": {"path": "x"}}} | settings))
    with pytest.raises(ConfigError, match=message):
        load_config(file=str(file), environment={})
    with pytest.raises(ConfigError, match="TRIMTAB_ADMIN_KEY is empty"):
        load_config(model="x", environment={"TRIMTAB_ADMIN_KEY": " "})


# -- real weights -----------------------------------------------------------------------------------------------------

YAML = """
models:
  base: {path: %(root)s/base, dtype: float32}
  fixed: {path: %(root)s/adapters/tuned, kind: adapter, of: base}
presets:
  steered: {model: base, decoding: {strategy: proxy_tuning, expert: fixed, anti: base}}
kv_memory: 4MiB
log_level: error
admin_key: admin
admin_root: %(root)s/adapters
"""
PROMPT = "It was a dark night"
ASK: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("administered")
    tiny_directory("llama", root / "base", **LLAMA)
    byte_tokenizer().save_pretrained(root / "base")
    model = functools.partial(tiny_model, "llama", **LLAMA)
    make_adapter(root / "adapters" / "tuned", model(), 1, r=8, lora_alpha=16, target_modules=["q_proj"])
    make_adapter(root / "adapters" / "other", model(), 2, r=4, lora_alpha=8, target_modules=["down_proj"])
    pickled = root / "adapters" / "pickled"
    shutil.copytree(root / "adapters" / "tuned", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (root / "trimtab.yaml").write_text(YAML % {"root": root})
    return root


def test_real_adapters_come_and_go(weights: Path) -> None:
    prompt = tuple(byte_tokenizer().encode(PROMPT))
    bare, tuned = tiny_model("llama", **LLAMA), weights / "adapters"
    other = PeftModel.from_pretrained(tiny_model("llama", **LLAMA), tuned / "other").eval()

    async def complete(client: httpx.AsyncClient, length: int = 12, **body: Any) -> list[int]:
        answer = await client.post(TEXT, json=ASK | {"max_tokens": length} | body)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    async def test(client: httpx.AsyncClient) -> None:
        running = asyncio.create_task(complete(client, 100, model="base"))
        await asyncio.sleep(0.05)
        assert (await load(client, "new", "other")).status_code == 200
        assert await complete(client, model="new") == greedy(other, prompt)
        mixed = {"strategy": "multi_objective", "models": [{"model": "new"}]}
        assert await complete(client, model="base", decoding=mixed) == greedy(other, prompt)
        assert await running == greedy(bare, prompt, 100)

        assert "only safetensors are loaded" in error_of(await load(client, "x", "pickled"))["message"]
        assert "is not a directory" in error_of(await load(client, "x", "gone"))["message"]
        assert error_of(await unload(client, "fixed"), 409)["code"] == "adapter_in_use"
        assert "preset 'steered'" in error_of(await unload(client, "fixed"), 409)["message"]

        assert (await load(client, "new", "tuned")).status_code == 200  # other weights, the same id
        assert await complete(client, model="new") == await complete(client, model="fixed")
        assert (await unload(client, "new")).status_code == 200
        answer = await client.post(TEXT, json=ASK | {"max_tokens": 1, "model": "new"})
        assert error_of(answer, 404)["code"] == "model_not_found"
        assert await complete(client, model="base") == greedy(bare, prompt)

    async def run() -> None:
        config = load_config(file=str(weights / "trimtab.yaml"), environment={})
        assert config.engine().adapters
        bridge = Bridge(functools.partial(make_engine, config.specs(), config.engine()), launch=launch_thread)
        await bridge.start()
        transport = httpx.ASGITransport(build_app(config, bridge, load_texts(config.specs())))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                await test(client)
        finally:
            bridge.stop()

    asyncio.run(run())
