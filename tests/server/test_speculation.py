"""The `speculation` axis on the wire: defaults, presets, reports. The engine's part is tested beside the engine."""

from __future__ import annotations

from typing import Any

import pytest

from decoding.rules import RULES
from tests.server.conftest import STEERING, Ask
from tests.server.test_chat import chunks
from tests.server.test_errors import CHAT, HI, TEXT, X

DRAFTS = {"draft": "expert", "tokens": 3}


def report(ask: Ask, path: str, body: dict[str, Any], **settings: Any) -> dict[str, Any]:
    response = ask(path, body, **settings)
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()["decoding"]
    return made


def test_the_report_names_drafter_and_rule(ask: Ask) -> None:
    made = report(ask, TEXT, X | {"decoding": {"speculation": DRAFTS}})
    assert made["speculation"]["draft"] == "expert"
    assert made["speculation"]["accept"] == "rejection"
    assert made["lossless"] is True
    seeded = report(ask, TEXT, X | {"seed": 1, "decoding": {"speculation": DRAFTS}})
    assert seeded["speculation"]["accept"] == "coupled"
    explicit = report(ask, TEXT, X | {"seed": 1, "decoding": {"speculation": DRAFTS | {"accept": "rejection"}}})
    assert explicit["speculation"]["accept"] == "rejection"
    assert report(ask, TEXT, X)["speculation"] is None


@pytest.mark.parametrize("accept", RULES)
def test_lossy_is_never_silent(ask: Ask, accept: str) -> None:
    made = report(ask, TEXT, X | {"decoding": {"speculation": DRAFTS | {"accept": accept}}})
    assert made["lossless"] is RULES[accept].lossless is (accept in ("rejection", "coupled"))


def test_usage_has_openais_prediction_tokens(ask: Ask) -> None:
    body = HI | {"prediction": {"type": "content", "content": [{"type": "text", "text": "Hello"}]}}
    answer = ask(CHAT, body).json()
    assert answer["decoding"]["speculation"]["draft"] == "prediction"
    details = answer["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    frames = chunks(ask(CHAT, body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert frames[-1]["usage"]["completion_tokens_details"] == details
    off = ask(CHAT, body | {"decoding": {"speculation": False}}).json()
    assert off["decoding"]["speculation"] is None
    assert "completion_tokens_details" not in off["usage"]


def test_a_preset_speculates_and_a_request_turns_it_off(ask: Ask) -> None:
    presets = {"base@fast": {"model": "base", "decoding": STEERING | {"speculation": DRAFTS}}}
    settings = {"presets": presets, "defaults": {"model": "base@fast"}}
    body = HI | {"model": "base@fast"}
    assert report(ask, CHAT, body, **settings)["speculation"]["draft"] == "expert"
    assert report(ask, CHAT, body | {"decoding": {"speculation": False}}, **settings)["speculation"] is None


def test_auto_takes_a_small_role_else_ngrams(ask: Ask) -> None:
    """The fake models are all of one size: no model is small enough to draft by itself."""
    assert report(ask, TEXT, X | {"decoding": {"speculation": True}})["speculation"]["draft"] == "ngram"


def test_strategies_tell_what_speculation_takes(ask: Ask) -> None:
    listed = ask("/v1/strategies").json()
    assert [rule["id"] for rule in listed["speculation"]["accept"]] == list(RULES)
    assert "max_ngram" in listed["speculation"]["parameters"]["properties"]
    assert all(row["combines_with"]["speculation"] == list(RULES) for row in listed["data"])
