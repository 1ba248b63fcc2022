"""Whatever a body holds: an answer, or an error object below 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoding.search import SEARCHES
from server.schema import ChatBody, CompletionBody, ScoreBody
from server.searching import Bounds
from tests.server.conftest import open_client

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
strategy_fields = st.sampled_from(
    ["strategy", "expert", "anti", "alpha", "negative_prompt", "guidance", "search", "trace"]
)
strategies = st.sampled_from(["plain", "cfg", "proxy_tuning", "base", "expert"])
scorers = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["base", "x"]) | values,
        "rule": st.sampled_from(["length", "likelihood"]) | values,
        "regex": st.text(max_size=5) | values,
        "parts": st.lists(st.just({"rule": "length"}) | values, max_size=2),
        "weight": st.integers(-2, 2) | values,
    },
)
rows = st.fixed_dictionaries(
    {"kind": st.sampled_from(list(SEARCHES))},
    optional={"params": st.dictionaries(st.sampled_from(["n", "scorer", "separator"]), scorers | values, max_size=2)},
)
search_params = st.dictionaries(
    st.sampled_from([each.name for kind in SEARCHES.values() for each in fields(kind.params)]),
    st.sampled_from(["base", "max", "[a-", "{prompt}"]) | st.integers(-1, 65) | scorers | st.lists(rows) | values,
    max_size=3,
)
bounds = st.dictionaries(st.sampled_from(list(Bounds.__dataclass_fields__)), st.booleans() | values, max_size=2)
searches = st.builds(
    lambda kind, params, bound: {"kind": kind} | params | bound,
    st.sampled_from(list(SEARCHES)) | values,
    search_params | st.builds(lambda params: params | {"scorer": "base"}, search_params),
    bounds,
)
decoding = st.dictionaries(strategy_fields, strategies | values, max_size=4) | st.builds(
    lambda search: {"search": search}, searches
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]) | values,
            "content": st.text(max_size=5) | values,
        }
    ),
    max_size=3,
)
prompts = st.text(max_size=5) | st.lists(st.text(max_size=5) | st.integers(-2, 400), max_size=3)
likely = {
    "decoding": decoding,
    "messages": messages,
    "prompt": prompts,
    "model": st.sampled_from(["base", "expert", "base@chat", "x"]),
    "stop": st.lists(st.text(max_size=3), max_size=3) | st.text(max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 400).map(str), st.integers(-101, 101), max_size=3),
    "n": st.integers(0, 3),
    "max_tokens": st.integers(-1, 200),
    "logprobs": st.integers(0, 3) | st.booleans(),
    "stream": st.booleans(),
    "input": st.lists(
        st.fixed_dictionaries({"response": st.text(max_size=5) | values, "prompt": st.text(max_size=5) | values}),
        max_size=3,
    ),
    "text_1": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2),
    "text_2": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2),
    "scorer": scorers,
}


def bodies(fields: Iterator[str], needed: str) -> st.SearchStrategy[dict[str, Any]]:
    optional = {name: (likely[name] | values if name in likely else values) for name in fields if name != needed}
    return st.fixed_dictionaries(
        {needed: likely[needed] | values}, optional={name: optional[name] for name in optional}
    )


@pytest.fixture(scope="module")
def post() -> Iterator[Any]:
    with asyncio.Runner() as runner:
        context = open_client()
        client = runner.run(context.__aenter__())

        def send(path: str, body: Any) -> httpx.Response:
            # json.dumps writes lone surrogates as escapes, so they get as far as a client could send them
            return runner.run(client.post(path, content=json.dumps(body).encode()))

        yield send
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize(
    ("path", "schema", "needed"),
    [
        ("/v1/chat/completions", ChatBody, "messages"),
        ("/v1/completions", CompletionBody, "prompt"),
        ("/v1/score", ScoreBody, "input"),
        ("/v1/score", ScoreBody, "text_1"),
    ],
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_body_makes_a_500(post: Any, path: str, schema: Any, needed: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(schema.model_fields)), max_size=3, unique=True))
    response = post(path, data.draw(bodies(iter(names), needed)))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(["model", "prompt", "messages", "tokens"]), messages | values, max_size=3))
def test_no_body_breaks_the_tokenizer(post: Any, body: dict[str, Any]) -> None:
    for path in ("/tokenize", "/detokenize"):
        assert post(path, body).status_code in (200, 400, 404)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(search=searches, strategy=st.booleans())
def test_no_search_makes_a_500(post: Any, search: dict[str, Any], strategy: bool) -> None:
    kind, params = search["kind"], {name: value for name, value in search.items() if name != "kind"}
    decoding = params | {"strategy": kind} if strategy else {"search": search}
    response = post("/v1/completions", {"model": "base", "prompt": "x", "decoding": decoding})
    assert response.status_code in (200, 400), response.text
