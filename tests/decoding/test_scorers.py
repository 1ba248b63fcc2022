"""Scorers' numbers against closed forms on rows made by hand; what is built for a request, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoding.core import BadRequest, EngineFailure, ModelLoadError
from decoding.scorers.build import ScorerModel, bounds, check_model, check_scorer, make_scorer
from decoding.scorers.pages import Tongue
from decoding.scorers.patterns import MAX_TEXT
from decoding.scorers.readings import Guard, Judge, Reward, SelfEvaluation, StepReward
from decoding.scorers.rules import Keywords, Measure, Regex, ValidJson, WordRange, aggregate
from decoding.scorers.spec import Hypothesis, ScorerParams, ScorerSpec, Sum
from decoding.text import TextModel
from tests.fakes import byte_tokenizer

TEXT = TextModel("m", byte_tokenizer(2))
TONGUE = Tongue(TEXT)
W = 259


def ofs(text: str, **kwargs: Any) -> Hypothesis:
    return Hypothesis("Q", (text,), **kwargs)


def rows(*entries: dict[str | int, float]) -> torch.Tensor:
    """Logits [n, W]: zero but for these ids or characters."""
    z = torch.zeros(len(entries), W)
    for row, entry in zip(z, entries):
        for token, value in entry.items():
            row[ord(token) if isinstance(token, str) else token] = value
    return z


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- rules -----------------------------------------------------------------------------------------------------------


def test_aggregation() -> None:
    values = [0.5, 0.25, 0.75]
    assert [aggregate(values, how) for how in ("last", "min", "prod", "mean")] == [0.75, 0.25, 0.09375, 0.5]
    for how in ("min", "prod", "mean"):
        for values_with_nan in ([math.nan, 0.5], [0.5, math.nan]):
            assert math.isnan(aggregate(values_with_nan, how)), "a number that cannot be compared is not left out"
    for how, what in (("max", values), ("last", []), ("prod", []), ("mean", [])):
        with pytest.raises(BadRequest) as caught:
            aggregate(what, how)
        assert caught.value.param == "aggregate"


@pytest.mark.parametrize(
    ("text", "share"),
    [("The CAT sat.", 0.5), ("a cat, a dog", 1.0), ("concatenate dogma", 0.0), ("", 0.0), ("c++ dog", 0.5)],
)
def test_keywords_are_whole_words_of_any_case(text: str, share: float) -> None:
    assert Keywords(("cat", "Dog")).score(ofs(text)) == [share]


def test_keywords_may_hold_signs() -> None:
    assert Keywords(("c++", "a.b")).score(ofs("In C++, axb.")) == [0.5]


def test_word_ranges_fall_off_linearly() -> None:
    inside = WordRange(4, 6)
    found = [inside.score(ofs("w " * n))[0] for n in (0, 1, 3, 4, 6, 9, 12, 30)]
    assert found == [0.0, 0.25, 0.75, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert WordRange(2).score(ofs("w " * 999)) == [1.0]
    assert WordRange(0, 5).score(ofs("")) == [1.0]


def test_regexes_are_searched() -> None:
    assert Regex(r"\bfour\b").score(ofs("It is four.")) == [1.0]
    assert Regex(r"^four").score(ofs("It is four.")) == [0.0]
    assert Regex("x").score(ofs("x" + "y" * MAX_TEXT)) == [0.0], "of a very long text the end is searched"
    with pytest.raises(BadRequest, match="too long"):
        Regex(r"(a|a)*$").score(ofs("a" * 5000 + "b"))


@pytest.mark.parametrize(
    "pattern",
    [
        "a{1000000}",
        "(?:a{1000}){1000}",
        "(?:a{1000,}){1000,}",
        "a{9}{9}{9}{9}{9}{9}",
        "(?:[)]a{1000}){1000}",
        "(?:a{1000}[](]){1000}",
        "(?V1)(?:a{1000}[[a](]){1000}",
        r"(?:a{1000}\()){1000}",
        "(?#[)a{1000000}",
        "(?x)a{1 000 000}",
        "(?x)a{1#}\n000000}",
        r"(?x)\#a{1000000}",
    ],
)
def test_patterns_that_fill_the_memory_are_refused(pattern: str) -> None:
    """What they are made into has as many items as their counts multiply to."""
    with pytest.raises(BadRequest, match="repeats"):
        Regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\d{4})-(\d{2})-(\d{2})( \d{2}:\d{2}:\d{2})?",
        "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        r"^([^{}]*\{\d{3}\}){20}$",
        "^(?:[A-Z][a-z]{1,2000} ){3,5000}$",
        "(?x) [[:alpha:]]{3} # a word",
        "x" * 1000,
    ],
)
def test_patterns_with_ordinary_repeats_are_taken(pattern: str) -> None:
    assert Regex(pattern).score(ofs("")) == [0.0]


@pytest.mark.parametrize("pattern", ["(" * 400 + ")" * 400, "(?a)(?u)b", "(?L)(?u)b"])
def test_patterns_that_cannot_be_compiled_are_refused(pattern: str) -> None:
    with pytest.raises(BadRequest, match="regular expression"):
        Regex(pattern)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (' {"a": [1, 2.5e3, null]}\n', 1.0),
        ("12", 1.0),
        ("9" * 9000, 1.0),
        ('{"a": NaN}', 0.0),
        ("{'a': 1}", 0.0),
        ("{} {}", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json(text: str, valid: float) -> None:
    assert ValidJson().score(ofs(text)) == [valid]


def test_measures() -> None:
    text = ofs("two  words", logprob=-6.0, tokens=4)
    assert [Measure(name).score(text) for name in ("likelihood", "mean_likelihood", "length")] == [
        [-6.0],
        [-1.5],
        [2.0],
    ]
    assert Measure("mean_likelihood").score(Hypothesis("Q", ())) == [0.0]


# -- what rows mean --------------------------------------------------------------------------------------------------


class Head:
    def __init__(
        self,
        outputs: int,
        gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        transform: torch.Tensor | None = None,
    ) -> None:
        self.outputs, self.gate, self.transform = outputs, gate, transform


def test_a_reward_is_the_heads_number() -> None:
    reading = Reward("m", TONGUE, Head(1))
    assert reading.read(torch.tensor([[2.5]]), None) == [2.5]
    assert reading.read(torch.tensor([[2.5]], dtype=torch.bfloat16), None) == [2.5]
    assert (reading.hidden, reading.one_number) == (False, True)


def test_objectives_are_weighed_by_the_request() -> None:
    read = torch.tensor([[1.0, 2.0, 4.0]])
    assert Reward("m", TONGUE, Head(3), (0.5, 0.0, -1.0)).read(read, None) == [-3.5]
    gated = Head(3, gate=lambda hidden: 1 / 0)
    reading = Reward("m", TONGUE, gated, (1.0, 1.0, 1.0))
    assert not reading.hidden, "the request's weights stand in for the gate's"
    assert reading.read(read, None) == [7.0]
    for weights in (None, (1.0,)):
        with pytest.raises(BadRequest, match="3 objectives") as caught:
            Reward("m", TONGUE, Head(3), weights)
        assert caught.value.param == "weights"


def test_a_gate_weighs_by_the_prompts_hidden_state() -> None:
    """gate(h) . (row @ transform), h the first mark's hidden state and row the last mark's, written out."""
    transform = torch.tensor([[1.0, -0.5], [0.0, 2.0]])
    head = Head(2, gate=lambda hidden: 10 * hidden[:, :2], transform=transform)
    reading = Reward("m", TONGUE, head)
    assert reading.hidden
    read = torch.tensor([[9.0, 9.0], [3.0, 4.0]])
    hidden = torch.tensor([[0.1, 0.2, 0.9], [7.0, 7.0, 7.0]])
    assert reading.read(read, hidden) == [pytest.approx(1.0 * 3.0 + 2.0 * (3.0 * -0.5 + 4.0 * 2.0))]
    assert reading.read(read[1:], hidden[:1]) == reading.read(read, hidden), "where both marks are one position"


def test_step_scores_of_heads() -> None:
    one = StepReward("m", TONGUE, W, Head(1))
    assert one.read(torch.tensor([[0.0], [2.0]]), None) == pytest.approx([0.5, sigmoid(2.0)])
    two = StepReward("m", TONGUE, W, Head(2), "qwen")
    assert two.read(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), None) == pytest.approx([sigmoid(-1.0), sigmoid(3.0)])
    assert not one.one_number


@pytest.mark.parametrize(("rendering", "tokens"), [("generic", ("+", "-")), ("rlhflow", ()), (None, ("<x0>", "<x1>"))])
def test_step_scores_of_two_tokens(rendering: str | None, tokens: tuple[str, ...]) -> None:
    reading = StepReward("m", TONGUE, W, None, rendering, "#", tokens)
    good, bad = (257, 258) if tokens[:1] == ("<x0>",) else (ord("+"), ord("-"))
    read = rows({good: 1.0, bad: 3.0, "#": 50.0}, {good: 2.0})
    assert reading.read(read, None) == pytest.approx([sigmoid(-2.0), sigmoid(2.0)])
    assert reading.read(read + 64.0, None) == pytest.approx(reading.read(read, None)), "shift invariance"


@pytest.mark.parametrize(
    "wrong",
    [
        {"score_tokens": ("good", "bad")},
        {"score_tokens": ("+",)},
        {"score_tokens": ("+", "+")},
        {"score_tokens": ("<x0>", "<x1>"), "width": 257},
        {"head": Head(3)},
        {"rendering": "math_sheperd", "head": Head(1)},
        {"rendering": "math_shepherd"},
        {},
    ],
)
def test_step_models_that_fit_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError):
        StepReward(**({"model": "m", "tongue": TONGUE, "width": W} | wrong))


def test_a_judges_digits() -> None:
    """sum_i i P(i) / sum_j P(j): with P(3) = 3 P(8) and the others as good as none, and with all alike."""
    reading = Judge("m", TONGUE, W)
    sure = dict.fromkeys("0124567", -60.0) | {"9": -60.0}
    read = rows({**sure, "3": math.log(3.0), "8": 0.0, "x": 99.0})
    assert reading.read(read, None) == [pytest.approx((3 * 3 + 8) / 4)]
    assert reading.read(rows({}), None) == [pytest.approx(4.5)]


def test_a_model_without_digits_is_no_judge() -> None:
    with pytest.raises(BadRequest, match="'0' is not a single token"):
        Judge("m", TONGUE, width=40)


@pytest.mark.parametrize("question", ["Good?", "{answer} {answer}"])
def test_a_question_has_one_place_for_the_answer(question: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Judge("m", TONGUE, W, question)
    assert caught.value.param == "question"


def test_self_evaluation() -> None:
    assert SelfEvaluation("m", TONGUE, W).read(rows({"y": 1.0, "n": 3.0}), None) == [pytest.approx(sigmoid(-2.0))]
    two = SelfEvaluation("m", TONGUE, W, ("+", "-"))
    assert two.read(rows({"+": 1.0, "y": 9.0}), None) == [pytest.approx(sigmoid(1.0))]
    one = SelfEvaluation("m", TONGUE, W, ("<x0>",))
    assert one.read(rows({257: math.log(W - 1.0)}), None) == [pytest.approx(0.5)]
    for tokens in (("ab",), ("a", "b", "c")):
        with pytest.raises(ModelLoadError):
            SelfEvaluation("m", TONGUE, W, tokens)


def test_a_guard_gives_the_probability_of_safe() -> None:
    reading = Guard("m", TONGUE, W)
    assert reading.read(rows({"s": 1.0, "u": 3.0, "x": 9.0}), None) == [pytest.approx(1 - sigmoid(2.0))]


# -- what is built, and what is refused ------------------------------------------------------------------------------


class Elsewhere:
    def score(self, text: Hypothesis) -> list[float]:
        return [1.0]


MODELS = {
    "base": ScorerModel("base", TEXT, "causal", W),
    "lora": ScorerModel("lora", TEXT, "adapter", W),
    "rm": ScorerModel("rm", TEXT, "reward", 1, Head(1)),
    "many": ScorerModel("many", TEXT, "reward", 3, Head(3)),
    "prm": ScorerModel("prm", TEXT, "prm", W, step_marker="#", score_tokens=("+", "-")),
    "steps": ScorerModel("steps", TEXT, "prm", 2, Head(2), "<x0>", rendering="qwen"),
    "guard": ScorerModel("guard", TEXT, "guard", W),
    "self": ScorerModel("self", TEXT, "self_eval", W, score_tokens=("+", "-")),
}
KINDS = {id: model.kind for id, model in MODELS.items()} | {"head": "judge"}
REMOTES = {"far": Elsewhere()}
P = ScorerParams


def made(spec: ScorerSpec) -> Any:
    check_scorer(spec, KINDS, REMOTES, "decoding.scorer")
    return make_scorer(spec, MODELS, REMOTES, "base")


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("rm", Reward),
        ("prm", StepReward),
        ("steps", StepReward),
        ("guard", Guard),
        ("self", SelfEvaluation),
        ("base", Judge),
        ("lora", Judge),
        ("far", Elsewhere),
        (P(remote="far"), Elsewhere),
        (P(model="many", weights=(1.0, 0.0, 2.0)), Reward),
        (P(model="rm", principles=("Be kind.",)), Reward),
        (P(model="guard", taxonomy="X: Mine."), Guard),
        (P(question="{answer}?"), Judge),
        (P(rule="length"), Measure),
        (P(keywords=("a",)), Keywords),
        (P(min_words=1, max_words=3), WordRange),
        (P(regex="a+"), Regex),
        (P(json=True), ValidJson),
    ],
)
def test_a_spec_says_what_is_built(spec: ScorerSpec, kind: type[Any]) -> None:
    scorer = made(spec)
    assert isinstance(scorer, kind)
    if hasattr(scorer, "model") and isinstance(spec, str):
        assert scorer.model == spec


def test_a_question_alone_is_asked_of_the_requests_model() -> None:
    assert made(P(question="{answer}?")).model == "base"


def test_what_a_request_says_reaches_the_reading() -> None:
    assert made(P(model="many", weights=(1.0, 0.0, 2.0))).read(torch.tensor([[1.0, 2.0, 4.0]]), None) == [9.0]
    shown = {
        "Q": P(model="rm"),
        "Judge the answer by these principles:\n- Be kind.\n\nQ": P(model="rm", principles=("Be kind.",)),
        "Is ": P(model="base", question="Is {answer} good?"),
    }
    for start, spec in shown.items():
        assert bytes(made(spec).render(Hypothesis("Q", ("a",))).ids).startswith(f"{start}a".encode())


def test_sums_are_flattened_and_weighed() -> None:
    inner = P(parts=(P(rule="length", weight=2.0), P(json=True)), weight=0.5)
    scorer = made(P(parts=(P(model="rm", weight=3.0), inner)))
    assert isinstance(scorer, Sum)
    assert [(weight, type(part)) for weight, part in scorer.parts] == [(3.0, Reward), (1.0, Measure), (0.5, ValidJson)]
    assert [weight for weight, _ in made(P(rule="length", weight=2.0)).parts] == [2.0], "a weight is never dropped"
    assert len(made(P(parts=(P(model="prm"), P(model="steps"), P(remote="far")))).parts) == 3


@pytest.mark.parametrize(
    ("spec", "param", "says"),
    [
        ("rn", "s", "Scorers that are served: base, lora, rm, many, prm, steps, guard, self, far."),
        ("head", "s", "kind judge"),
        (P(), "s", "exactly one"),
        (P(model="rm", rule="length"), "s", "not model and rule"),
        (P(remote="near"), "s.remote", "Configured: far."),
        (P(model="prm", weights=(1.0,)), "s.weights", "kind reward"),
        (P(rule="length", principles=("x",)), "s.principles", "kind reward"),
        (P(model="base", taxonomy="x"), "s.taxonomy", "kind guard"),
        (P(model="rm", question="{answer}"), "s.question", "kind self_eval or causal"),
        (P(remote="far", question="{answer}"), "s.question", "kind self_eval or causal"),
        (P(model="base", question="Good?"), "s.question", "{answer}"),
        (P(model="many", weights=(math.nan, 0.0, 0.0)), "s.weights", "finite"),
        (P(rule="length", weight=math.inf), "s.weight", "within"),
        (P(keywords=("a", " ")), "s.keywords", "none of them empty"),
        (P(min_words=0), "s.min_words", "at least 1"),
        (P(min_words=5, max_words=4), "s.min_words", "at most"),
        (P(regex="("), "s.regex", "not a regular expression"),
        (P(parts=(P(rule="length"), P(parts=(P(regex="("),)))), "s.parts.1.parts.0.regex", "regular"),
        (P(parts=(P(rule="length"),) * 17), "s.parts", "at most 16"),
        (P(parts=(P(model="prm"), P(rule="length"))), "s.parts", "'prm' gives one number per step and 'length' gives"),
        (
            P(parts=(P(parts=(P(model="rm"),)), P(model="steps"))),
            "s.parts",
            "'steps' gives one number per step and 'rm'",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_where_the_request_is_taken(spec: ScorerSpec, param: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_scorer(spec, KINDS, REMOTES, "s")
    assert caught.value.param == param
    assert says in caught.value.message


def test_sums_nest_only_so_deep() -> None:
    spec = P(rule="length")
    for _ in range(4):
        spec = P(parts=(spec,))
    check_scorer(spec, KINDS, REMOTES, "s")
    with pytest.raises(BadRequest, match="4 deep"):
        check_scorer(P(parts=(spec,)), KINDS, REMOTES, "s")


def test_remote_step_scores_are_not_added_to_single_numbers() -> None:
    far = Elsewhere()
    far.one_number = False  # type: ignore[attr-defined]
    with pytest.raises(BadRequest, match="'far' gives one number per step and 'rm'"):
        make_scorer(P(parts=(P(remote="far"), P(model="rm"))), MODELS, {"far": far}, "base")


def test_models_are_checked_at_the_start() -> None:
    for model in MODELS.values():
        check_model(model)
    wrong = ScorerModel("prm", TEXT, "prm", W, score_tokens=("good", "bad"))
    with pytest.raises(ModelLoadError, match="'good' is not a single token of 'm'"):
        check_model(wrong)
    with pytest.raises(ModelLoadError, match=r"'rm' is a causal language model .* its kind is causal, .* not reward\."):
        check_model(ScorerModel("rm", TEXT, "reward", W))
    with pytest.raises(EngineFailure, match="'good' is not"):
        make_scorer("prm", {"prm": wrong}, {}, "base")


def test_objectives_without_weights_are_refused() -> None:
    with pytest.raises(BadRequest, match="3 objectives"):
        make_scorer("many", MODELS, {}, "base")


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        (ScorerParams(keywords=("a",)), (0.0, 1.0)),
        (ScorerParams(max_words=3, weight=2.0), (0.0, 2.0)),
        (ScorerParams(json=True, weight=-1.0), (-1.0, 0.0)),
        (ScorerParams(parts=(ScorerParams(regex="x"), ScorerParams(json=True, weight=-3.0)), weight=2.0), (-6.0, 2.0)),
        (ScorerParams(rule="length"), None),
        (ScorerParams(parts=(ScorerParams(regex="x"), ScorerParams(model="rm"))), None),
        ("rm", None),
    ],
)
def test_bounds_of_rules(spec: Any, ends: Any) -> None:
    assert bounds(spec) == ends
