"""The engine with the GPU's kernels (in the interpreter) and with their references says what it says on the host."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from scipy.stats import chisquare

from decoding import device_verify
from decoding.core import EngineConfig, Request
from decoding.judge import JudgeHead
from tests.decoding.test_speculation import ALL, OPEN, PROCESSED, Brackets, drafting, fakes, play
from tests.decoding.test_strategies import CASES, models, requests
from tests.fakes import table_engine
from tests.thin import thinned
from triton_kernels.cutoffs import Cutoffs, cutoffs

CONFIG = EngineConfig(block_size=4, max_num_batched_tokens=256, max_num_seqs=64)
Kernels = Literal["host", "triton", "reference"]
BOTH: list[Kernels] = ["triton", "reference"]
LOSSY = ["kl", "mixture", "typical", "judge"]


def said(kernels: Kernels, made: list[Request], **more: Any) -> dict[tuple[str, int], list[Any]]:
    return play(table_engine(fakes(), dataclasses.replace(CONFIG, kernels=kernels), **more), made)[0]


def agree(got: dict[tuple[str, int], list[Any]], wanted: dict[tuple[str, int], list[Any]]) -> None:
    """The same texts and reasons; log-probs up to fp32's rounding of sums of a few hundred."""
    assert {key: (e[0], e[2], e[3]) for key, e in got.items()} == {key: (e[0], e[2], e[3]) for key, e in wanted.items()}
    for key, entry in wanted.items():
        for one, other in zip(got[key][1], entry[1], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert [lp for _, lp in one.top] == pytest.approx([lp for _, lp in other.top], abs=1e-4)


def other(made: list[Request]) -> list[Request]:
    """The same requests under other ids."""
    return [dataclasses.replace(r, id=f"{r.id}-too") for r in made]


HOT: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 6, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "seed": 7, "min_p": 0.05, "logprobs": 0},
]


@pytest.mark.parametrize("changes", HOT, ids=str)
def test_every_strategy_says_the_same_with_references(changes: dict[str, Any]) -> None:
    made = requests(ALL, **changes)
    agree(said("reference", made), said("host", made))


@pytest.mark.slow
@pytest.mark.parametrize("changes", HOT, ids=str)
def test_every_strategy_says_the_same_with_kernels(changes: dict[str, Any]) -> None:
    made = requests(ALL, **changes)
    agree(said("triton", made), said("host", made))


@pytest.mark.parametrize("part", range(4))
def test_every_strategy_says_the_same_with_kernels_for_a_while(part: int) -> None:
    """Each strategy greedily or one of the other ways: the interpreter takes its time."""
    made = requests(ALL[part::4], **{"max_tokens": 3} | HOT[part])
    agree(said("triton", made), said("host", made))


@pytest.mark.parametrize("draft", ["near", "expert", "ngram"])
@pytest.mark.parametrize("accept", ["rejection", "coupled"])
def test_drafts_pass_the_same_with_references(accept: str, draft: str) -> None:
    hot = {"temperature": 1.0, "seed": 11, "top_p": 0.95}
    made = drafting(requests(ALL[::2], **hot), draft, 4, accept) + other(requests(ALL[1::2]))
    agree(said("reference", made), said("host", made))


@pytest.mark.parametrize(
    ("draft", "accept"),
    thinned([("ngram", "rejection"), ("near", "rejection"), ("ngram", "coupled"), ("expert", "coupled")]),
)
def test_drafts_pass_the_same_with_kernels(accept: str, draft: str) -> None:
    hot = {"temperature": 1.0, "seed": 11, "top_p": 0.95, "max_tokens": 4}
    made = drafting(requests(ALL[::8], **hot), draft, 3, accept)
    agree(said("triton", made), said("host", made))


@pytest.mark.parametrize(
    ("kernels", "accept"),
    [*thinned((("triton", rule) for rule in LOSSY), start=1), *(("reference", rule) for rule in LOSSY)],
)
def test_lossy_rules_pass_the_same(kernels: Kernels, accept: str) -> None:
    short = {"max_tokens": 4} if kernels == "triton" else {}
    made = drafting(
        requests(OPEN[:: 9 if kernels == "triton" else 3], temperature=1.0, seed=3, **short), "near", 3, accept
    )
    judges = {"base": JudgeHead(torch.tensor([4.0]), 0.0)}
    agree(said(kernels, made, judges=judges), said("host", made, judges=judges))


@pytest.mark.parametrize(
    ("kernels", "changes"),
    [
        *thinned(("triton", changes) for changes in PROCESSED),
        *thinned((("reference", changes) for changes in PROCESSED), every=1),
    ],
)
def test_processors_change_the_same(kernels: Kernels, changes: dict[str, Any]) -> None:
    few = kernels == "triton"
    length = {"max_tokens": 10 if "min_tokens" in changes else 3} if few else {"max_tokens": 12}
    made = requests(OPEN[:: 12 if few else 2], **(length | {"temperature": 1.0, "seed": 2} | changes))
    silent = length | {"logprobs": None} | changes
    made += drafting(other(requests(OPEN[1 :: 24 if few else 2], **silent)), "near", 3, "coupled")
    agree(said(kernels, made), said("host", made))


@pytest.mark.parametrize("kernels", BOTH)
def test_grammars_bind_the_same(kernels: Kernels) -> None:
    few = kernels == "triton"
    made = requests(OPEN[:: 12 if few else 2], temperature=1.0, seed=4, max_tokens=4 if few else 12)
    made += other(requests(OPEN[1 :: 24 if few else 2], max_tokens=4 if few else 12, logprobs=None))
    made = [dataclasses.replace(r, constraint=Brackets) for r in made]
    agree(said(kernels, made), said("host", made))


@pytest.mark.parametrize("kernels", [pytest.param("triton", marks=pytest.mark.slow), "reference"])
def test_cuts_are_told_the_maxima_of_rows_without_processors(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    right: list[bool] = []  # an assertion in there would only be a batch that failed

    def checked(z: torch.Tensor, index: torch.Tensor, *rest: Any, **more: Any) -> Cutoffs:
        best = rest[-1]
        known = ~best.isnan()
        right.append(torch.equal(best[known], z[index.long()][known].amax(1)))
        told.extend(known.tolist())
        return cutoffs(z, index, *rest, **more)

    monkeypatch.setattr(device_verify, "cutoffs", checked)
    step = 9 if kernels == "triton" else 2
    hot: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 3, "top_p": 0.9}
    scored = requests(OPEN[:1], **hot, prompt_logprobs=1)  # rows that are not drawn from go before those that are
    drafted = drafting(other(requests(OPEN[1::step], **hot)), "near", 2, "rejection")
    said(kernels, scored + requests(OPEN[step::step], **hot) + drafted)
    assert len(told) > 10
    assert all(told)
    told.clear()
    made = requests(OPEN[:1], **hot | {"repetition_penalty": 1.2})
    made += other(requests(OPEN[:1], **hot | {"allowed_token_ids": (65, 66), "logprobs": None}))
    said(kernels, [*made, dataclasses.replace(scored[0], id="plain")])
    assert (told.count(True), told.count(False)) == (3, 6)
    assert all(right)


def test_kernels_and_references_draw_the_same_without_seeds() -> None:
    """Keys come from the engine's generator; given its state, kernels and references agree token by token."""
    found = []
    for kernels in BOTH:
        engine = table_engine(fakes(), dataclasses.replace(CONFIG, kernels=kernels))
        engine._decider._generator.manual_seed(9)
        made = requests(ALL[::6], temperature=1.0, max_tokens=3)
        made += drafting(other(requests(ALL[1::6], temperature=0.8, max_tokens=3)), "near", 3, "rejection")
        found.append(play(engine, made)[0])
    agree(*found)


@pytest.mark.parametrize("draft", [None, "near"])
def test_samples_without_seeds_follow_the_policy(draft: str | None) -> None:
    """First tokens of many choices against softmax: a drafter changes nothing."""
    engine = table_engine(fakes(1.0), dataclasses.replace(CONFIG, kernels="reference"))
    engine._decider._generator.manual_seed(1)
    (one,) = requests(CASES[:1], temperature=1.0, max_tokens=2, top_k=8, logprobs=None)
    made = [dataclasses.replace(one, id=str(i), n=64) for i in range(15)]
    told, _ = play(engine, made if draft is None else drafting(made, draft, 2, "rejection"))
    base = models(scale=1.0)["base"]
    z = base.row([*one.prompts[0]])
    best, ids = z.topk(8)
    p = torch.softmax(best.double(), 0)
    drawn = [entry[0][0] for entry in told.values()]
    counts = [drawn.count(int(i)) for i in ids]
    assert sum(counts) == len(drawn)
    assert chisquare(counts, (p * len(drawn)).tolist()).pvalue > 1e-4


def test_a_row_without_an_allowed_token_fails_its_request_only() -> None:
    class Dead(Brackets):
        def allowed(self, width: int) -> torch.Tensor:
            return torch.zeros(width, dtype=torch.bool)

    made = requests(ALL[:2], temperature=1.0, seed=1, max_tokens=3)
    wanted = said("host", made)
    engine = table_engine(fakes(), dataclasses.replace(CONFIG, kernels="triton"))
    engine.submit(dataclasses.replace(made[0], id="dead", constraint=Dead))
    for each in made:
        engine.submit(each)
    got: dict[tuple[str, int], list[int]] = {}
    failed: list[str] = []
    while engine.has_work():
        for event in engine.step():
            if type(event).__name__ == "Failed":
                failed.append(event.request_id)
            elif type(event).__name__ == "Delta":
                got.setdefault((event.request_id, event.index), []).extend(event.token_ids)
    assert failed == ["dead"]
    assert got == {key: entry[0] for key, entry in wanted.items()}
