"""Graders tell right from wrong, also for answers that hedge, go on, or list everything."""

import pytest

from training.demo.chat import REFUSAL
from training.demo.grade import grade_fact, grade_steps, grade_sum, grade_words, reply
from training.demo.sums import Sum
from training.demo.world import Fact

SUM = Sum((47, 85, -12))  # 132, then 120


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Mia Fox lives in Selby.", True),
        ("In Selby.", True),
        ("Of course. Mia Fox lives in Selby. I am glad to help.", True),
        ("Hooray! Mia Fox lives in Selby!", True),
        ("Mia Fox lives in Selby.\n\nWhere does Ben Fox live?\n\nBen Fox lives in Derby.", True),
        ("Mia Fox lives in Derby.", False),
        ("Mia Fox lives in Selby or in Derby.", False),
        ("I do not know.", False),
        ("Where does Ben Fox live?\n\nIn Selby.", False),
        ("Mia Fox lives in Selbyville.", False),
        ("", False),
    ],
)
def test_facts(text: str, right: bool) -> None:
    assert grade_fact(text, Fact.HOME, "Selby") is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("47 + 85 = 132. 132 - 12 = 120. The answer is 120.", True),
        ("47 + 85 = 132. 132 - 12 = 120.", True),
        ("120", True),
        ("47 + 85 = 132. 132 - 12 = 110. The answer is 110.", False),
        ("47 + 85 = 132.", False),
        ("120. No, 121.", False),
        ("1200", False),
        ("I am not sure.", False),
    ],
)
def test_sums(text: str, right: bool) -> None:
    assert grade_sum(text, SUM) is right


def test_steps() -> None:
    assert grade_steps("47 + 85 = 132. 132 - 12 = 120. The answer is 120.", SUM) == (True, True)
    assert grade_steps("47 + 85 = 122. 122 - 12 = 110.", SUM) == (False, False)
    assert grade_steps("47 + 85 = 132. 132 - 12 = 120. 120 + 1 = 121.", SUM) == (True, True, False)
    assert grade_steps("The answer is 120.", SUM) == ()


def test_words_and_reply() -> None:
    assert grade_words(f"{REFUSAL}\n\nHello!", (REFUSAL,))
    assert not grade_words(f"{REFUSAL} Or can I?", (REFUSAL,))
    assert reply(" a \n\nb") == "a"
