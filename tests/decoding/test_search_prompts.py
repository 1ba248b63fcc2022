"""Prompts that searches make of the request's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from decoding.core import BadRequest
from decoding.search.prompts import asked, check_template, continued, filled, instructed, question
from decoding.text import Chat

USER = {"role": "user", "content": "2 + 2?"}
CHAT = Chat((USER,), template_kwargs=(("think", False),))


def test_a_question_is_a_text() -> None:
    assert question("2 + 2?") == "2 + 2?"
    assert question(CHAT) == "2 + 2?"
    assert question(Chat(({"role": "system", "content": "Sums."}, USER))) == "system: Sums.\n\nuser: 2 + 2?"


def test_another_question_has_the_prompts_form() -> None:
    assert asked("2 + 2?", "3 + 3?") == "3 + 3?"
    found = asked(CHAT, "3 + 3?")
    assert found == Chat(({"role": "user", "content": "3 + 3?"},), template_kwargs=(("think", False),))


def test_a_system_prompt_stands_first() -> None:
    assert instructed("2 + 2?", "Search.") == "Search.\n\n2 + 2?"
    system = {"role": "system", "content": "Search."}
    assert instructed(CHAT, "Search.") == Chat((system, USER), template_kwargs=CHAT.template_kwargs)
    own = Chat(({"role": "system", "content": "Sums."}, USER))
    assert instructed(own, "Search.").messages == ({"role": "system", "content": "Search.\n\nSums."}, USER)  # type: ignore[union-attr]


def test_earlier_answers_are_shown_with_what_is_said_to_them() -> None:
    assert continued("Q:", ["5", "3"], "Again.") == "Q:5\n\nAgain.\n\n3\n\nAgain.\n\n"
    again = {"role": "user", "content": "Again."}
    five, three = ({"role": "assistant", "content": text} for text in ("5", "3"))
    assert continued(CHAT, ["5", "3"], "Again.") == Chat(
        (USER, five, again, three, again), template_kwargs=CHAT.template_kwargs
    )
    begun = Chat((USER, {"role": "assistant", "content": "It is "}), False, True)
    assert continued(begun, ["5", "3"], "Again.") == Chat(
        (USER, {"role": "assistant", "content": "It is 5"}, again, three, again)
    )


@pytest.mark.parametrize(
    "make", [question, lambda p: asked(p, "x"), lambda p: instructed(p, "x"), lambda p: continued(p, [], "x")]
)
def test_token_ids_cannot_be_rewritten(make: Callable[[Any], Any]) -> None:
    with pytest.raises(BadRequest, match="token ids") as refused:
        make((1, 2, 3))
    assert refused.value.param == "prompt"


def test_templates() -> None:
    values = {"answer": "{question}", "question": "why {0}?"}
    assert filled("{question} {answer} {other} {}", values) == "why {0}? {question} {other} {}"
    check_template("verify", "{answer}", "answer")
    with pytest.raises(BadRequest, match=r"\{answer\} and \{review\}") as refused:
        check_template("refine", "{question}", "answer", "review")
    assert refused.value.param == "refine"
