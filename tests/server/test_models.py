"""Names: models, presets, strategies; the tokenizer's endpoints; health; metrics; the OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from decoding.core import ModelLoadError
from decoding.events import ModelInfo
from decoding.prepare import Entry
from decoding.search import SEARCHES
from decoding.strategies import STRATEGIES
from decoding.text import TextModel
from server.catalog import Served
from server.config import Preset
from tests.fakes import byte_tokenizer
from tests.server.conftest import STEERING, TEXTS, Ask, open_client
from tests.server.fake_engine import MODELS, FakeEngine
from tests.server.test_errors import CHAT, HI, TEXT, X, error_of


def test_the_default_is_listed_first_and_presets_name_their_model(ask: Ask) -> None:
    listed = ask("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["base@chat", *MODELS]
    preset, base = listed["data"][:2]
    assert (preset["root"], preset["parent"]) == ("base", "base")
    assert (base["root"], base["parent"]) == ("base", None)
    assert ask("/v1/models/base@chat").json()["id"] == "base@chat"
    assert ask("/v1/models", defaults={}).json()["data"][0]["id"] == "base"


def test_ids_may_have_slashes(ask: Ask) -> None:
    presets = {"org/model": {"model": "base"}}
    assert ask("/v1/models/org/model", presets=presets, defaults={}).json()["id"] == "org/model"


def test_a_request_may_change_a_presets_parameters_or_stand_alone(ask: Ask) -> None:
    def strategy(**fields: Any) -> str:
        return str(ask(CHAT, HI | fields).json()["decoding"]["strategy"])

    assert strategy() == strategy(decoding={"alpha": 0.5}) == "proxy_tuning"
    assert strategy(decoding={"strategy": "plain"}) == strategy(model="base") == "plain"
    assert strategy(decoding={"strategy": "cfg", "negative_prompt": "no"}) == "cfg"
    assert error_of(ask(CHAT, HI | {"decoding": {"beta": 1}}))["param"] == "decoding.beta"


def test_strategies_describe_their_parameters(ask: Ask) -> None:
    listed = {strategy["id"]: strategy for strategy in ask("/v1/strategies").json()["data"]}
    assert list(listed) == [*STRATEGIES, *SEARCHES]
    parameters = listed["proxy_tuning"]["parameters"]
    assert parameters["required"] == ["expert", "anti"]
    assert parameters["properties"]["alpha"]["default"] == 1.0
    assert parameters["properties"]["alpha"]["description"]
    assert parameters["additionalProperties"] is False
    assert listed["plain"]["parameters"]["properties"] == {}


EVERY: list[dict[str, Any]] = [
    {"strategy": "plain"},
    STEERING,
    {"strategy": "emulated_fine_tuning", "tuned": ["expert", "base"], "reference": "base-small", "top_p": 0.9},
    {"strategy": "dynamic_fusion", "experts": ["expert"], "small": "base-small", "mode": "paper"},
    {"strategy": "contrastive", "amateur": "base-small"},
    {"strategy": "cfg", "negative_prompt": [{"role": "user", "content": "Be rude."}]},
    {"strategy": "contrastive_prompt", "better": "Be kind.", "worse": "Be rude."},
    {"strategy": "reward_guided", "arms": [{"model": "expert", "weight": 0.5, "view": {"system": "harmless: 1"}}]},
    {"strategy": "multi_objective", "models": [{"model": "expert", "weight": 0.5}, {"model": "base-small"}]},
    {"strategy": "unlearning", "assistant": "base-small"},
    {"strategy": "nudging", "nudger": "expert"},
]


@pytest.mark.parametrize("decoding", EVERY, ids=lambda decoding: str(decoding["strategy"]))
def test_every_strategy_is_read_from_json(ask: Ask, decoding: dict[str, Any]) -> None:
    answer = ask(CHAT, HI | {"model": "base", "decoding": decoding})
    assert answer.status_code == 200, answer.text
    assert answer.json()["decoding"]["strategy"] == decoding["strategy"]
    assert error_of(ask(CHAT, HI | {"model": "base", "decoding": decoding | {"nonsense": 1}}))["param"]


POLICY: dict[str, Any] = {
    "terms": [
        {"name": "strong", "model": "base", "weight": 1},
        {"name": "expert", "model": "expert", "weight": 1, "view": "auto", "gated": True},
        {"name": "anti", "model": "base-small", "weight": -1, "gated": True},
    ],
    "gate": {"kind": "top_p", "value": 0.9, "of": "expert"},
    "plausibility": {"kind": "ratio", "value": 0.1, "of": "strong"},
}


def test_a_policy_in_full(ask: Ask) -> None:
    body = HI | {"decoding": {"policy": POLICY}}
    assert error_of(ask(CHAT, body))["param"] == "decoding.policy.terms.2.weight"
    answer = ask(CHAT, body, negative_weights="any")
    assert answer.status_code == 200, answer.text
    assert answer.json()["decoding"]["strategy"] == "policy"


@pytest.mark.parametrize(
    ("decoding", "param"),
    [
        ({"policy": POLICY, "alpha": 1}, "decoding.alpha"),
        ({"policy": POLICY, "strategy": "plain"}, "decoding.strategy"),
        ({"policy": 7}, "decoding.policy"),
        ({"policy": POLICY | {"gate": None}}, "decoding.policy.gate"),
        ({"policy": POLICY | {"terms": []}}, "decoding.policy.terms"),
        ({"policy": POLICY | {"terms": [{"wait": 1}]}}, "decoding.policy.terms.0.wait"),
        ({"policy": POLICY | {"gate": {"kind": "top_p", "value": 0.9, "of": "nobody"}}}, "decoding.policy.gate"),
        ({"policy": {"terms": [{"model": "gone"}]}}, "decoding.policy.terms"),
        ({"policy": {"terms": [{}, {}]}}, "decoding.policy.terms"),
    ],
)
def test_a_bad_policy_is_named(ask: Ask, decoding: dict[str, Any], param: str) -> None:
    assert error_of(ask(CHAT, HI | {"decoding": decoding}, negative_weights="any"))["param"] == param


def test_every_strategy_has_an_example_above() -> None:
    assert [each["strategy"] for each in EVERY] == list(STRATEGIES)


@pytest.mark.parametrize(
    ("decoding", "param"),
    [
        ({"strategy": "reward_guided", "arms": [{"model": "expert", "weight": -1}]}, "decoding.arms.0.weight"),
        ({"strategy": "reward_guided", "arms": [{"model": "expert", "wait": 1}]}, "decoding.arms.0.wait"),
        ({"strategy": "contrastive", "amateur": "base-small", "plausibility": 2}, "decoding.plausibility"),
        ({"strategy": "emulated_fine_tuning", "tuned": "expert", "reference": "gone"}, "decoding.reference"),
        (STEERING | {"alpha": -0.5}, "decoding.alpha"),
        (STEERING | {"alpha": float("nan")}, "decoding.alpha"),
        (STEERING | {"alpha": float("inf")}, "decoding.alpha"),
        (STEERING | {"alpha": 1e300}, "decoding.alpha"),
        ({"strategy": "reward_guided", "arms": [{"model": "expert"}], "beta": 0}, "decoding.beta"),
        ({"strategy": "reward_guided", "arms": [{"model": "expert"}], "beta": 1e-300}, "decoding.beta"),
        ({"strategy": "reward_guided", "arms": [{"model": "expert", "weight": 1e7}]}, "decoding.arms"),
        ({"strategy": "reward_guided", "arms": [{"model": "gone"}]}, "decoding.arms"),
        (
            {"strategy": "reward_guided", "arms": [{"model": "expert", "weight": float("nan")}]},
            "decoding.arms",
        ),
        ({"strategy": "reward_guided"}, "decoding.arms"),
        ({"strategy": "dynamic_fusion", "experts": ["expert", "gone"], "small": "base"}, "decoding.experts"),
        ({"strategy": "emulated_fine_tuning", "tuned": ["gone"], "reference": "base"}, "decoding.tuned"),
        ({"strategy": "cfg", "negative_prompt": "base", "guidance": 1e300}, "decoding.guidance"),
    ],
)
def test_bad_parameters_are_named(ask: Ask, decoding: dict[str, Any], param: str) -> None:
    content = json.dumps(HI | {"model": "base", "decoding": decoding})  # with NaN, which JSON proper has not
    assert error_of(ask(CHAT, content=content.encode()))["param"] == param


@pytest.fixture
def odd_expert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what the engine tells of `expert`, or its tokenizer."""

    def change(text: TextModel | None = None, **info: Any) -> None:
        init = FakeEngine.__init__

        def changed(self: FakeEngine) -> None:
            init(self)
            self.models = tuple(replace(each, **info) if each.id == "expert" else each for each in self.models)

        monkeypatch.setattr(FakeEngine, "__init__", changed)
        if text is not None:
            monkeypatch.setitem(TEXTS, "expert", text)

    return change


USES: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "reward_guided", "arms": [{"model": "base-small"}, {"model": "expert"}]}, "decoding.arms"),
    ({"strategy": "proxy_tuning", "expert": "base", "anti": "expert"}, "decoding.anti"),
    ({"strategy": "emulated_fine_tuning", "tuned": ["base", "expert"], "reference": "base-small"}, "decoding.tuned"),
    ({"strategy": "dynamic_fusion", "experts": ["base"], "small": "expert"}, "decoding.small"),
    ({"strategy": "unlearning", "assistant": "expert"}, "decoding.assistant"),
    ({"policy": {"terms": [{"model": "base"}, {"name": "x", "model": "expert"}]}}, "decoding.policy.terms"),
]


def test_a_scorer_does_not_draft(ask: Ask, odd_expert: Callable[..., None]) -> None:
    odd_expert(kind="reward", parameters=1)
    alone: dict[str, Any] = {"presets": {}, "defaults": {"model": "base"}}
    named = error_of(ask(CHAT, HI | {"decoding": {"speculation": {"draft": "expert"}}}, **alone))
    assert named["param"] == "decoding.speculation.draft"
    assert "is served as a scorer" in named["message"]
    auto = ask(CHAT, HI | {"decoding": {"speculation": True}}, **alone)
    assert auto.json()["decoding"]["speculation"]["draft"] == "ngram", "not the smallest model, which is the scorer"


@pytest.mark.parametrize(("decoding", "param"), USES)
@pytest.mark.parametrize("kind", ["reward", "prm"])
def test_a_scorer_is_no_role_of_a_policy(
    ask: Ask, odd_expert: Callable[..., None], decoding: dict[str, Any], param: str, kind: str
) -> None:
    odd_expert(kind=kind)
    alone: dict[str, Any] = {"presets": {}, "defaults": {"model": "base"}}
    error = error_of(ask(CHAT, HI | {"model": "base", "decoding": decoding}, **alone))
    assert error["param"] == param
    for part in (f"'expert' is served as a scorer (kind {kind})", "autoregressive reward model", "'scorer'"):
        assert part in error["message"]
    as_main = error_of(ask(CHAT, HI | {"model": "expert"}, **alone))
    assert as_main["param"] == "model"
    assert "kind" in as_main["message"]


@pytest.mark.parametrize(("decoding", "param"), USES)
def test_another_vocabulary_names_the_role(
    ask: Ask, odd_expert: Callable[..., None], decoding: dict[str, Any], param: str
) -> None:
    odd_expert(TextModel("expert", byte_tokenizer()))
    error = error_of(ask(CHAT, HI | {"model": "base", "decoding": decoding}, presets={}, defaults={"model": "base"}))
    assert error["param"] == param
    assert "cannot be mixed: their tokenizers" in error["message"]


@pytest.mark.parametrize("decoding", [{"strategy": "none"}, STEERING | {"expert": "gone"}, STEERING | {"beta": 1}])
def test_a_preset_that_cannot_be_served_stops_the_start(decoding: dict[str, Any]) -> None:
    catalog = {name: Entry(TEXTS[name], ModelInfo(name, 9, 9, 9, 9, "", "")) for name in MODELS}
    served = Served(catalog, {"p": Preset(model="base", decoding=decoding)}, "base")
    with pytest.raises(ModelLoadError, match="preset 'p' cannot be served"):
        served.check_presets()


def test_tokenize_and_back(ask: Ask) -> None:
    made = ask("/tokenize", {"prompt": "hello world", "return_token_strs": True}).json()
    assert made["tokens"] == TEXTS["base"].encode("hello world")
    assert (made["count"], made["max_model_len"], made["token_strs"][1]) == (2, 128, "Ġworld")
    assert ask("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": "hello world"}
    chat = {"model": "expert", "messages": [{"role": "user", "content": "x"}]}
    ids = ask("/tokenize", chat).json()["tokens"]
    text = "<|x|>user\nx</s><|x|>assistant\n"
    assert ask("/detokenize", {"model": "expert", "tokens": ids}).json() == {"prompt": text}
    short = ask("/tokenize", chat | {"add_generation_prompt": False}).json()["tokens"]
    assert ids[: len(short)] == short
    info = ask("/tokenizer_info?model=expert").json()
    assert (info["eos_token"], info["bos_token"]) == ("</s>", "<s>")
    assert "generation_prompt" in info["chat_template"]


@pytest.mark.parametrize("kind", ["reward", "prm", "guard", "self_eval"])
def test_a_scorers_tokenizer_is_asked_as_any_other(ask: Ask, odd_expert: Callable[..., None], kind: str) -> None:
    odd_expert(kind=kind)
    asked: dict[str, Any] = {"presets": {}, "defaults": {"model": "expert"}}
    for named in ({"model": "expert"}, {}):
        made = ask("/tokenize", {"prompt": "hello world"} | named, **asked).json()
        assert (made["tokens"], made["count"]) == (TEXTS["expert"].encode("hello world"), len(made["tokens"]))
        back = ask("/detokenize", {"tokens": made["tokens"]} | named, **asked)
        assert back.json()["prompt"].endswith("hello world")
    assert ask("/tokenizer_info?model=expert", **asked).json()["eos_token"] == "</s>"
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert error_of(ask(path, body | {"model": "gpt-9"}, **asked), 404)["code"] == "model_not_found"


def test_health_and_version(ask: Ask) -> None:
    assert ask("/health").json() == {"status": "ok"}
    assert ask("/ready").json() == {"status": "ready"}
    assert ask("/version").json()["version"]


def test_metrics_count_what_happened() -> None:
    async def run() -> str:
        async with open_client() as client:
            await client.post(CHAT, json=HI)
            await client.post(TEXT, json=X | {"stream": True})
            await client.post(TEXT, json=X | {"n": 99})
            await client.post(TEXT, json=X | {"prompt": "[fail]"})
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    for line in (
        'trimtab_requests_total{model="base@chat",outcome="ok",strategy="proxy_tuning"} 1.0',
        'trimtab_requests_total{model="base",outcome="ok",strategy="plain"} 1.0',
        'trimtab_requests_total{model="base",outcome="error",strategy="plain"} 1.0',
        'trimtab_refused_total{status="400"} 1.0',
        'trimtab_tokens_total{kind="completion",model="base@chat",strategy="proxy_tuning"} 11.0',
        'trimtab_time_to_first_token_seconds_count{model="base",strategy="plain"} 2.0',
        'trimtab_kv_used_ratio{model="expert"} 0.25',
        'trimtab_prefix_hits_total{model="expert"} 3.0',
        'trimtab_forward_seconds_total{model="expert"} 0.5',
        "trimtab_up 1.0",
        "trimtab_sequences 0.0",
    ):
        assert line in text, text
    assert re.search(r"trimtab_ticks_total \d", text)


def test_openapi_describes_the_bodies(ask: Ask) -> None:
    document = ask("/openapi.json").json()
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert {"messages", "decoding", "stream_options"} <= set(body["properties"])
    assert "$ref" not in str(document["paths"][TEXT]["post"]["requestBody"])
