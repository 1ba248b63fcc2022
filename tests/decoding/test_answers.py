"""Final answers: where they are found, how they are written in one way, which are equal."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from decoding import answers
from decoding.answers import boxed, check_extraction, extract, group, last_number, normalise
from decoding.core import BadRequest


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("first 3, then 42.", "42"),
        ("it is -5.", "-5"),
        ("10-5", "5"),
        ("a total of 1,234,567.50 dollars", "1,234,567.50"),
        ("$1,234", "1,234"),
        ("a loss of -$50", "-$50"),
        (r"a loss of $-\$50$", r"-\$50"),
        ("a loss of $-50", "-50"),
        ("$10{,}000$ in all", "10{,}000"),
        ("so 3/4.", "3/4"),
        ("−7", "−7"),
        (".5", ".5"),
        ("1, 2, 3", "3"),
        ("x=3", "3"),
        ("(3)", "3"),
        ("about 5%", "5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed { x } }", "x"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{}", ""),
        ("} { no box }", None),
    ],
)
def test_the_last_whole_box(text: str, found: str | None) -> None:
    assert boxed(text) == found


def test_auto_takes_the_box_then_the_number_then_the_last_line() -> None:
    assert extract(r"\boxed{a} 5") == "a"
    assert extract("the answer is 5\nindeed") == "5"
    assert extract("first\n  yes, certainly \n\n") == "yes, certainly"
    assert extract("  \n ") is None


def test_patterns_give_their_group_or_the_whole_last_match() -> None:
    text = "Answer: 5\nAnswer: 6 apples"
    assert extract(text, r"Answer: (\d+)") == "6"
    assert extract(text, r"\d \w+") == "6 apples"
    assert extract(text, r"Result: (\d+)") is None
    assert extract("a b", r"a (\d)?") is None, "a group that took no part"


@pytest.mark.parametrize("how", ["boxd", "(a)(b)", "(", "", "x" * 1001, "(?a)(?u)x", "(" * 450 + ")" * 450])
def test_what_finds_no_answers_is_refused(how: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_extraction(how, "answer")
    assert caught.value.param == "answer"
    with pytest.raises(BadRequest):
        extract("text", how)


def test_catastrophic_patterns_end() -> None:
    with pytest.raises(BadRequest, match="too long"):
        extract("a" * 5000 + "!", r"(a+)+$")


@pytest.mark.parametrize(
    "text",
    [
        "/" + "1" * 99_990 + "/",
        r"\boxed{" * 14_000,
        "1,111" * 20_000,
        "{" * 99_999,
        "1/" * 50_000,
        "-" * 99_999,
        r"\frac" * 80,
        "^{" * 190,
        "((" * 40 + "x^9",
    ],
)
def test_no_text_holds_the_engine(text: str) -> None:
    start = time.process_time()
    extract(text)
    group([text, text + " "])
    assert time.process_time() - start < 10, "these take milliseconds when the work is linear, hours when it is not"


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("1,234.50", "2469/2"),
        ("007", "7"),
        ("+3", "3"),
        ("-0", "0"),
        ("−2", "-2"),
        ("5.", "5"),
        ("0.50", "1/2"),
        ("1e3", "1000"),
        (r"50\%", "50"),
        ("$12", "12"),
        (r"\$5", "5"),
        (r"$\frac{2}{4}$", "1/2"),
        (r"\dfrac12", "1/2"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"1\frac{1}{2}", "3/2"),
        ("-6/4", "-3/2"),
        (r"10{,}000", "10000"),
        (r"90^\circ", "90"),
        ("x = 3", "3"),
        (r"\(3\)", "3"),
        (r"\text{Yes}.", "yes"),
        ("  The   Answer ", "the answer"),
        ("12,34", "12,34"),
        (r"\left( 3, \frac{1}{2} \right]", "(3,(1)/(2)]"),
        (r"\{1, 2\}", r"\{1,2\}"),
        ("-1, 2", "-1,2"),
        ("1, 234", "1, 234"),
        ("(1, 234)", "(1, 234)"),
        ("-$50", "-50"),
        (r"-\$50", "-50"),
        ("3-1", "3-1"),
        (r"\frac{\sqrt{3}}{2}", "(sqrt(3))/(2)"),
        ("1" * 500, "1" * 500),
    ],
)
def test_normal_forms(answer: str, written: str) -> None:
    assert normalise(answer) == written
    assert normalise(written) == written


def test_equal_answers_are_grouped_in_order() -> None:
    answers = ["7", "1/2", None, "0.5", "seven", r"\frac12", "Seven", None, "7.0"]
    assert group(answers) == [[0, 8], [1, 3, 5], [4, 6]]
    assert group([None, None]) == []


def test_pairs_intervals_and_sets_are_equal_however_they_are_spaced() -> None:
    answers = ["(3, 4)", "(3,4)", r"\left(3, 4\right)", "[0, 1)", "[0,1)", r"\{1, 2\}", r"\{ 1,2 \}", "1, 234", "1,234"]
    assert group(answers) == [[0, 1, 2], [3, 4], [5, 6], [7], [8]]


def test_expressions_are_compared_by_sympy() -> None:
    pytest.importorskip("sympy")
    same = ["x+1", "1 + x", "(x^2-1)/(x-1)"]
    roots = [r"2\sqrt{2}", r"\sqrt{8}", r"\frac{4}{\sqrt2}"]
    assert group([*same, "x+2", *roots, r"2\pi", "pi*2", "2x", "x*2"]) == [[0, 1, 2], [3], [4, 5, 6], [7, 8], [9, 10]]


@pytest.mark.parametrize(
    "expression",
    [
        "(1/(a+b)+1/(b+c)+1/(a+c)+1/(a-b)+1/(b-c)+1/(a-c))^12",
        "(1/(a+sqrt(b))+1/(b+sqrt(c))+1/(c+sqrt(a))+1/(a+sqrt(c)))^12",
        "((a+b+c+1)(a-b-c-1)(a+b-c-1)/(a+b+c+3)+(a+b+c+7)/(a-b-c-5)+1/(a+2b+3c+4))^4",
        "sqrt((1/(a+b)+1/(b+c)+1/(a+c)+1/(a-b)+1/(b-c)+1/(a-c))^11)",
    ],
)
def test_expressions_with_too_many_terms_are_compared_as_text(expression: str) -> None:
    pytest.importorskip("sympy")
    before = threading.active_count()
    assert group([expression, f" {expression}.", "1"]) == [[0, 1], [2]]
    assert threading.active_count() == before, "nothing goes on computing"


def test_expressions_with_few_terms_are_compared_whatever_their_powers() -> None:
    pytest.importorskip("sympy")
    same = ["(x^4)/(x^2-1)", "x^4/((x+1)(x-1))", "-(x^4)/(1-x^2)"]
    others = ["(a+b+c)^12", "(c+b+a)^12", "(a+b)/(a b)", "1/a+1/b"]
    assert group([*same, *others]) == [[0, 1, 2], [3, 4], [5, 6]]


def test_an_expressions_time_begins_when_sympy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sympy.parsing.sympy_parser")
    monkeypatch.delitem(sys.modules, "sympy.parsing.sympy_parser")
    there: list[bool] = []

    class Watched(threading.Thread):
        def start(self) -> None:
            there.append("sympy.parsing.sympy_parser" in sys.modules)
            super().start()

    answers._has_sympy.cache_clear()
    monkeypatch.setattr(threading, "Thread", Watched)
    assert group(["x+1", "1+x"]) == [[0, 1]]
    assert there == [True, True]


def test_words_are_no_products_of_letters_and_nothing_is_evaluated() -> None:
    assert group(["tea", "eat"]) == [[0], [1]]
    hostile = "__import__('os').abort()"
    assert group([hostile, "x.y()", "9^9^9^9", "(a+b)^99", "f(x)", "1/0"]) == [[0], [1], [2], [3], [4], [5]]
