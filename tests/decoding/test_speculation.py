"""Speculation in the engine: the same texts as without, for every policy, proposer and processor, in one batch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoding.core import BadRequest, Constraint, EngineConfig, Request, Speculation
from decoding.engine import Engine
from decoding.events import Delta, Done, Failed
from decoding.judge import JudgeHead
from decoding.kv import BlockPool
from tests.decoding.test_strategies import CASES, WIDTH, Case, models, requests
from tests.fakes import EOS, TableModel, table_engine
from tests.thin import thinned

CONFIG = EngineConfig(block_size=4, max_num_batched_tokens=256, max_num_seqs=64)
NUDGE: Case = ("nudging", {"nudger": "expert", "threshold": 0.5}, lambda r: r["base"])
ALL: list[Case] = [*CASES, NUDGE]
# A gate that drops what is outside of it may leave none of a few allowed ids.
OPEN = [case for case in ALL if case[1].get("outside") != "drop"]


def fakes(scale: float = 3.0) -> dict[str, TableModel]:
    """The strategies' models, and drafters of the base from perfect to random."""
    found = models(scale=scale)
    base = found["base"].table
    for name, noise in (("twin", 0.0), ("near", 0.3), ("far", 30.0)):
        found[name] = TableModel(name, base + noise * torch.randn(base.shape, generator=_noise(name)), memory=6)
    return found


def _noise(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def drafting(made: list[Request], draft: str, tokens: Any, accept: str, **more: Any) -> list[Request]:
    """The requests with speculation; a role that a policy lacks becomes a drafter of its own."""
    spec = Speculation(draft, tokens, accept, **more)  # type: ignore[arg-type]
    return [
        dataclasses.replace(
            r,
            program=dataclasses.replace(r.program, speculation=spec),
            prediction=(5, 6, 7) if draft == "prediction" else (),
        )
        for r in made
    ]


def play(engine: Engine, made: list[Request]) -> tuple[dict[tuple[str, int], list[Any]], dict[str, Done]]:
    """What each choice was told (ids, log-probs, text, reason), and each request's end. Checks the engine."""
    told: dict[tuple[str, int], list[Any]] = {}
    done: dict[str, Done] = {}
    for req in made:
        engine.submit(req)
    while engine.has_work():
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                entry = told.setdefault((event.request_id, event.index), [[], [], "", None])
                entry[0] += event.token_ids
                entry[1] += event.logprobs
                entry[2] += event.text
                entry[3] = event.finish_reason, event.stop_reason
            elif isinstance(event, Done):
                done[event.request_id] = event
        engine.check()
    assert all(pool.used == 0 for pool in engine.pools.values())
    return told, done


def texts(told: dict[tuple[str, int], list[Any]]) -> dict[tuple[str, int], list[int]]:
    return {key: entry[0] for key, entry in told.items()}


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("accept", ["rejection", "coupled"])
@pytest.mark.parametrize(
    ("draft", "tokens"),
    [
        ("twin", 3),
        ("near", 1),
        ("near", 5),
        ("far", 4),
        ("expert", 3),
        ("anti", 2),
        ("ngram", 4),
        ("prediction", 8),
        ("near", "auto"),
    ],
)
def test_greedy_texts_are_those_without_drafts(draft: str, tokens: Any, accept: str, every: int) -> None:
    made = requests(ALL[::every], max_tokens=20)
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    got, done = play(table_engine(fakes(), CONFIG), drafting(made, draft, tokens, accept))
    assert texts(got) == texts(wanted)
    for key, entry in got.items():
        assert entry[2:] == wanted[key][2:]
        assert [(e.token_id, e.top) for e in entry[1]] == [(e.token_id, e.top) for e in wanted[key][1]]
    if draft == "twin":  # the base's equal drafts all that a plain request says
        usage = done["0-plain"].usage
        assert usage.accepted == usage.drafted > 0
        assert usage.passes < usage.completion_tokens / 3


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("changes", "draft"),
    thinned(
        (changes, draft)
        for changes in ({}, {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_k": 40})
        for draft in ("twin", "near", "far", "expert", "ngram")
    ),
)
def test_coupled_gives_a_seeds_text_whatever_drafts(draft: str, changes: dict[str, Any], every: int) -> None:
    """T = 1, top-p 0.9, penalties: token-identical to no speculation."""
    made = requests(ALL[::every], max_tokens=20, temperature=1.0, top_p=0.9, seed=7, **changes)
    made = [dataclasses.replace(r, n=2) for r in made]
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    got, done = play(table_engine(fakes(), CONFIG), drafting(made, draft, 4, "coupled"))
    assert texts(got) == texts(wanted)
    assert sum(d.usage.drafted for d in done.values()) > 100 // every
    if draft == "twin":
        assert done["0-plain"].usage.accepted == done["0-plain"].usage.drafted


def test_requests_that_draft_and_others_share_a_batch() -> None:
    made = requests(ALL, max_tokens=16)
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    kinds = [("near", 3), ("ngram", 2), ("expert", 4), None, ("far", 1)]
    mixed = []
    for i, req in enumerate(made):
        kind = kinds[i % len(kinds)]
        mixed += [req] if kind is None else drafting([req], *kind, "rejection")
    got, _ = play(table_engine(fakes(), CONFIG), mixed)
    assert texts(got) == texts(wanted)


@pytest.mark.parametrize("changes", [{"max_num_batched_tokens": 7}, {"max_logit_rows": 5}, {"max_num_seqs": 3}])
def test_budgets_do_not_change_the_texts(changes: dict[str, int]) -> None:
    made = requests(ALL, max_tokens=16)
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    got, _ = play(table_engine(fakes(), dataclasses.replace(CONFIG, **changes)), drafting(made, "near", 4, "rejection"))
    assert texts(got) == texts(wanted)


@pytest.mark.parametrize("draft", ["near", "expert"])
def test_an_eighth_of_the_memory_gives_the_same_texts(draft: str) -> None:
    made = drafting(requests(ALL * 2, max_tokens=24), draft, 4, "coupled")
    made = [dataclasses.replace(r, id=f"{i}:{r.id}", n=1 + i % 2) for i, r in enumerate(made)]
    wanted, _ = play(table_engine(fakes(), CONFIG, blocks=2000), made)
    engine = table_engine(fakes(), CONFIG, blocks=40)
    got, _ = play(engine, made)
    assert texts(got) == texts(wanted)
    assert engine.stats().preemptions > 0


def test_a_drafter_without_memory_leaves_it_to_the_policy() -> None:
    """The drafter's pool holds less than its prompt: nothing is drafted, nothing hangs."""
    pools = fakes()
    made = drafting(requests(ALL[:1], max_tokens=16), "near", 4, "rejection")
    made = [dataclasses.replace(r, prompts=(tuple(range(60)),)) for r in made]
    engine = table_engine(pools, CONFIG, blocks=30)
    vars(engine.pools["near"]).update(vars(BlockPool(3, CONFIG.block_size)))
    _, done = play(engine, made)
    assert done["0-plain"].usage.drafted == 0
    assert done["0-plain"].usage.completion_tokens == 16


def test_a_role_that_drafts_computes_no_position_twice() -> None:
    """Its rows for drafted positions serve the mix: each (block slot, tick) of the expert is written once."""
    pools = fakes()
    case = next(c for c in ALL if c[0] == "proxy_tuning")
    made = drafting(requests([case], max_tokens=40), "expert", 4, "rejection")
    engine = table_engine(pools, CONFIG)
    _, done = play(engine, made)
    usage = done[made[0].id].usage
    computed = sum(len(span.token_ids) for spans in pools["expert"].spans for span in spans)
    rejected = usage.drafted - usage.accepted
    # The prompt, every token of the output but the last, and the drafts that were thrown away.
    assert computed <= len(made[0].prompts[1]) + usage.completion_tokens - 1 + rejected
    passes = sum(len(spans) for spans in pools["base"].spans)
    assert passes < usage.completion_tokens or usage.accepted == 0


def test_usage_and_statistics_count_by_position() -> None:
    made = drafting(requests(ALL[:1], max_tokens=21), "twin", 4, "rejection")
    engine = table_engine(fakes(), CONFIG)
    _, done = play(engine, made)
    usage = done["0-plain"].usage
    assert (usage.drafted, usage.accepted, usage.passes, usage.completion_tokens) == (16, 16, 5, 21)
    (stats,) = engine.stats().drafts
    assert (stats.draft, stats.target) == ("twin", "base")
    assert stats.drafted == stats.accepted == (4, 4, 4, 4)


def test_a_trace_says_what_was_drafted_and_how_it_passed() -> None:
    made = drafting(requests(ALL[:3], max_tokens=12), "near", 3, "rejection")
    made = [dataclasses.replace(r, program=dataclasses.replace(r.program, trace=True)) for r in made]
    plain = [dataclasses.replace(r, program=dataclasses.replace(r.program, speculation=None)) for r in made]
    entries: list[dict[str, list[Any]]] = []
    for batch in (made, plain):
        engine = table_engine(fakes(), CONFIG)
        seen: dict[str, list[Any]] = {}
        for req in batch:
            engine.submit(req)
        while engine.has_work():
            for event in engine.step():
                if isinstance(event, Delta):
                    seen.setdefault(event.request_id, []).extend(event.trace)
        entries.append(seen)
    with_drafts, without = entries
    assert any(e.drafted and e.accepted == "rejection" for e in with_drafts["0-plain"])
    assert any(not e.drafted and e.accepted is None for e in with_drafts["0-plain"])
    for name, seen_entries in without.items():
        blank = [dataclasses.replace(e, drafted=False, accepted=None) for e in with_drafts[name]]
        assert blank == seen_entries


@pytest.mark.parametrize("draft", ["near", "expert"])
def test_real_models_say_the_same_with_drafts(draft: str) -> None:
    """Tiny random Llamas in fp32, kernels and all: every policy greedy, and with a seed."""
    from decoding.admit import Hosted
    from decoding.runner import Runner
    from decoding.text import TextModel
    from tests.decoding.test_hosted_engine import tiny_llama
    from tests.fakes import byte_tokenizer

    text = byte_tokenizer()
    names = ("base", "expert", "anti", "other", "near")
    made = requests(ALL, max_tokens=12)
    made += [dataclasses.replace(r, id=f"hot:{r.id}") for r in requests(ALL, max_tokens=12, temperature=1.0, seed=3)]
    answers = []
    for batch in (made, drafting(made, draft, 3, "coupled")):
        runners = {name: Runner(tiny_llama(i, WIDTH, 2), name) for i, name in enumerate(names)}
        engine = Engine({n: Hosted(r, TextModel(n, text)) for n, r in runners.items()}, CONFIG)
        told, done = play(engine, batch)
        answers.append(texts(told))
        for runner in runners.values():
            runner.close()
    assert answers[0] == answers[1]
    assert sum(d.usage.drafted for d in done.values()) > 300


def test_a_drafter_catches_up_with_a_long_prompt_and_after_a_pause() -> None:
    """Its prompt goes with the packed forwards, and a drafter whose memory was taken joins again later."""
    made = [
        dataclasses.replace(r, prompts=(tuple(i % 250 for i in range(90)),)) for r in requests(ALL[:1], max_tokens=200)
    ]
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    engine = table_engine(fakes(), CONFIG)
    engine.submit(drafting(made, "twin", 3, "rejection")[0])
    out: list[int] = []
    for tick in range(200):
        if tick == 10:
            assert engine.scheduler._reclaim(["twin"])
        out += [t for e in engine.step() if isinstance(e, Delta) for t in e.token_ids]
        engine.check()
        if not engine.has_work():
            break
    assert out == wanted["0-plain", 0][0]
    drafted = engine.stats().drafts[0].drafted[0]
    assert 9 < drafted < 200 - 64  # both before the pause and after it


# -- processors with state ------------------------------------------------------------------------------------------


class Brackets:
    """A toy grammar over bytes: '(' and ')' balanced up to depth 3, letters a to e between them, never two alike."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.most = 0

    def allowed(self, width: int) -> torch.Tensor:
        depth = self.taken.count(ord("(")) - self.taken.count(ord(")"))
        mask = torch.zeros(width, dtype=torch.bool)
        letters = [ord(c) for c in "abcde" if not self.taken or self.taken[-1] != ord(c)]
        mask[letters] = True
        mask[ord("(")] = depth < 3
        mask[ord(")")] = depth > 0
        mask[EOS] = depth == 0 and len(self.taken) > 3
        return mask

    def advance(self, token: int) -> None:
        assert bool(self.allowed(WIDTH)[token]), "a token that is not allowed was taken"
        self.taken.append(token)
        self.most = max(self.most, len(self.taken))

    def rollback(self, count: int) -> None:
        del self.taken[len(self.taken) - count :]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("draft", ["twin", "near", "expert", "ngram", "prediction"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_a_grammar_holds_and_rolls_back(draft: str, sampling: dict[str, Any], every: int) -> None:
    plain = requests(OPEN[::every], max_tokens=24, ignore_eos=False, **sampling)
    made = [dataclasses.replace(r, constraint=Brackets) for r in plain]
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    got, done = play(table_engine(fakes(), CONFIG), drafting(made, draft, 4, "coupled"))
    assert texts(got) == texts(wanted)
    for entry in got.values():
        check = Brackets()
        for token in entry[0]:
            if token != EOS:
                check.advance(token)
    if draft in ("twin", "near"):
        assert sum(d.usage.accepted for d in done.values()) > 20
        assert sum(d.usage.drafted - d.usage.accepted for d in done.values()) > 20 or draft == "twin"


PROCESSED: list[dict[str, Any]] = [
    {"logit_bias": ((65, 4.0), (66, 4.0), (67, -3.0))},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.7},
    {"min_tokens": 9, "ignore_eos": False, "logit_bias": ((EOS, 6.0),)},
    {"stop": ("AB", "BBA", "CA"), "allowed_token_ids": (65, 66, 67)},
    {"stop": ("ABC",), "allowed_token_ids": (65, 66, 67), "include_stop_str_in_output": True, "min_tokens": 5},
    {"stop_token_ids": (70,), "allowed_token_ids": (65, 66, 70)},
    {"ignore_eos": False, "logit_bias": ((EOS, 5.0),)},
]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", PROCESSED, ids=lambda c: "-".join(c))
@pytest.mark.parametrize("hot", [{}, {"temperature": 1.0, "seed": 11}])
def test_processors_see_the_drafted_prefix_and_stops_cut_drafts(
    changes: dict[str, Any], hot: dict[str, Any], every: int
) -> None:
    made = [dataclasses.replace(r, n=2) for r in requests(OPEN[::every], **({"max_tokens": 20} | changes | hot))]
    wanted, _ = play(table_engine(fakes(), CONFIG), made)
    for draft in ("near", "expert", "ngram"):
        got, _ = play(table_engine(fakes(), CONFIG), drafting(made, draft, 5, "coupled"))
        assert {key: (e[0], e[2], e[3]) for key, e in got.items()} == {
            key: (e[0], e[2], e[3]) for key, e in wanted.items()
        }


def test_cancelling_in_mid_draft_frees_every_block() -> None:
    engine = table_engine(fakes(), CONFIG)
    rng = random.Random(4)
    made = drafting(requests(ALL, max_tokens=60), "near", 6, "rejection")
    for req in made:
        engine.submit(req)
    for _ in range(6):
        engine.step()
    for req in made:
        engine.abort(req.id)
        engine.check()
        if rng.random() < 0.3:
            engine.step()
    assert not engine.has_work() or engine.step() is not None
    assert all(pool.used == 0 for pool in engine.pools.values())


@pytest.mark.parametrize("draft", ["near", "expert"])
def test_a_drafter_that_fails_stops_drafting_and_nothing_else(draft: str) -> None:
    pools = fakes()
    cases = ALL[:1]
    made = drafting(requests(cases, max_tokens=20), draft, 4, "rejection")
    wanted, _ = play(table_engine(fakes(), CONFIG), requests(cases, max_tokens=20))
    engine = table_engine(pools, CONFIG)
    engine.submit(made[0])
    out: list[int] = []
    for tick in range(100):
        pools[draft].broken = tick >= 3
        out += [t for e in engine.step() if isinstance(e, Delta) for t in e.token_ids]
        engine.check()
        if not engine.has_work():
            break
    assert out == wanted["0-plain", 0][0]
    assert 0 < engine.stats().drafts[0].drafted[0] <= 3


# -- rules that are not exact ----------------------------------------------------------------------------------------


def greedy_text(model: TableModel, prompt: tuple[int, ...], length: int) -> list[int]:
    out: list[int] = []
    for _ in range(length):
        out.append(int(model.row([*prompt, *out]).argmax()))
    return out


def judged(threshold: float, **more: Any) -> list[int]:
    pools = fakes()
    made = drafting(requests(ALL[:1], max_tokens=24), "far", 4, "judge", threshold=threshold, **more)
    engine = table_engine(pools, CONFIG, judges={"base": JudgeHead(torch.tensor([4.0]), 0.0)})
    told, _ = play(engine, made)
    assert pools["base"].asked_hidden
    ids: list[int] = told["0-plain", 0][0]
    return ids


def test_a_judge_that_accepts_all_gives_the_drafters_text_and_one_that_accepts_none_the_targets() -> None:
    prompt = requests(ALL[:1])[0].prompts[0]
    assert judged(0.0, bonus=False) == judged(0.0) == greedy_text(fakes()["far"], prompt, 24)
    assert judged(1.5) == greedy_text(fakes()["base"], prompt, 24)


def test_a_judge_reads_the_hidden_state_at_the_drafts_own_position() -> None:
    """The fake's hidden state says whether its own token is even: the even drafts pass, besides the target's."""
    pools, prompt = fakes(), requests(ALL[:1])[0].prompts[0]
    out: list[int] = []
    while len(out) < 24:
        ahead: list[int] = []
        for _ in range(min(4, 24 - len(out))):
            ahead.append(int(pools["far"].row([*prompt, *out, *ahead]).argmax()))
        for i, token in enumerate(ahead):
            best = int(pools["base"].row([*prompt, *out, *ahead[:i]]).argmax())
            if token % 2 and token != best:
                out += [*ahead[:i], best]
                break
        else:
            out += ahead  # no bonus token
    assert judged(0.5) == out
    assert any(
        token % 2 == 0 and token != int(pools["base"].row([*prompt, *out[:i]]).argmax()) for i, token in enumerate(out)
    )


def test_kl_goes_from_the_targets_text_to_the_drafters() -> None:
    prompt = requests(ALL[:1])[0].prompts[0]

    def with_threshold(threshold: float) -> list[int]:
        made = drafting(requests(ALL[:1], max_tokens=24), "far", 4, "kl", threshold=threshold, bonus=False)
        told, _ = play(table_engine(fakes(), CONFIG), made)
        ids: list[int] = told["0-plain", 0][0]
        return ids

    assert with_threshold(0.0) == greedy_text(fakes()["base"], prompt, 24)
    assert with_threshold(float("inf")) == greedy_text(fakes()["far"], prompt, 24)


def test_a_judge_needs_its_head() -> None:
    made = drafting(requests(ALL[:1]), "near", 4, "judge")
    with pytest.raises(BadRequest, match="No judge head"):
        table_engine(fakes(), CONFIG).submit(made[0])


@pytest.mark.parametrize("accept", ["judge", "kl", "mixture", "typical"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lossy_rules_never_emit_what_is_forbidden(accept: str, temperature: float) -> None:
    """Unlearning's implausible tokens and a grammar's, under thresholds that accept all else."""
    case: Case = ("unlearning", {"assistant": "expert", "weight": 0.8, "plausibility": 0.2}, lambda r: r["base"])
    more: dict[str, Any] = {
        "judge": {"threshold": 0.0, "kappa": 1e9},
        "kl": {"threshold": float("inf")},
        "mixture": {"weight": 0.0},
        "typical": {"epsilon": 0.0, "delta": 0.0},
    }[accept]
    judges = {"base": JudgeHead(torch.zeros(1), 0.0)}
    engine = table_engine(fakes(1.0), CONFIG, judges=judges)
    made = drafting(requests([case], max_tokens=40, temperature=temperature), "far", 4, accept, **more)
    told, _ = play(engine, made)
    base, prompt = fakes(1.0)["base"], made[0].prompts[0]
    out = told["0-unlearning", 0][0]
    for i, token in enumerate(out):
        p = torch.softmax(base.row([*prompt, *out[:i]]).double(), 0)
        assert p[token] >= 0.2 * p.max() * (1 - 1e-6)
    made = [
        dataclasses.replace(r, constraint=Brackets)
        for r in drafting(requests(ALL[:1], max_tokens=30), "far", 4, accept, **more)
    ]
    told, _ = play(table_engine(fakes(), CONFIG, judges=judges), made)
    check = Brackets()
    for token in told["0-plain", 0][0]:
        check.advance(token)


def _constraint(factory: Callable[[], Constraint]) -> Callable[[], Constraint]:
    """mypy: the toy grammar is a constraint."""
    return factory


_constraint(Brackets)
