"""What drafting must never do to others: starve, preempt, block or fail them. Odd drafters, requests and budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from decoding.accept import Check, verify
from decoding.admit import Hosted
from decoding.core import BadRequest, EngineConfig, Policy, Program, Request, Role, Sampling, Speculation, Term
from decoding.draft import settle_speculation
from decoding.engine import Engine
from decoding.events import Delta, Done, Event, Failed
from decoding.judge import JudgeHead
from decoding.lookup import Lookup, Source
from decoding.pace import Clock, Pace
from decoding.prepare import Entry, prepare
from decoding.state import Draft
from decoding.text import TextModel
from tests.decoding.test_accept import sequence
from tests.decoding.test_speculation import Brackets
from tests.fakes import TableModel, byte_tokenizer, random_table, table_engine

GREEDY = Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)


class Embedding(TableModel):
    """A table model that, like a real one, has no row for ids beyond its width or positions beyond its length."""

    def forward(self, spans: Any, want_hidden: bool = False) -> Any:
        for span in spans:
            if max(span.token_ids, default=0) >= self.width or span.start + len(span.token_ids) > self.max_model_len:
                raise IndexError("no such id or position")
        return super().forward(spans, want_hidden)


def engine(sizes: dict[str, int] | None = None, blocks: int = 4000, extra: int = 0, **settings: Any) -> Engine:
    """Models by name and context length, memory 1; their tables differ."""
    lengths = sizes or {"base": 4096, "d": 4096}
    models = {n: Embedding(n, random_table(i), 1, length) for i, (n, length) in enumerate(lengths.items())}
    config = replace(EngineConfig(block_size=4, prefix_cache=False), **settings)
    return table_engine(dict(models), config, blocks, extra)


def catalog(served: Engine) -> dict[str, Entry]:
    return {info.id: Entry(served.hosted[info.id].text, info) for info in served.models}


def asking(
    served: Engine, prompt: Any, spec: Speculation | None = None, model: str = "base", **changes: Any
) -> Request:
    program = Program("plain", Policy((Term("base", Role(model)),)), speculation=spec)
    return prepare(program, prompt, replace(GREEDY, **changes), catalog(served))


def until_done(served: Engine, wanted: str, ticks: int = 2000) -> tuple[int, list[Event]]:
    """Ticks until the request `wanted` is done, and everything that happened. Checks blocks."""
    seen: list[Event] = []
    for tick in range(1, ticks):
        seen += served.step()
        served.check()
        if any(isinstance(event, Done | Failed) and event.request_id == wanted for event in seen):
            return tick, seen
    raise AssertionError("not done")


def text_of(events: list[Event], request: Request) -> list[int]:
    return [t for e in events if isinstance(e, Delta) and e.request_id == request.id for t in e.token_ids]


DRAFT = Speculation("d", 4)


def test_what_a_mix_cannot_say_is_not_drafted() -> None:
    """The base's tokenizer has two ids more than the mix: a prediction holds them, a small role could not read them."""
    texts = {"base": TextModel("base", byte_tokenizer(2)), "d": TextModel("d", byte_tokenizer())}
    models = {"base": Embedding("base", random_table(0, width=259), 1), "d": Embedding("d", random_table(1), 1)}
    served = Engine({n: Hosted(m, texts[n], 4000) for n, m in models.items()}, EngineConfig(block_size=4))
    policy = Policy((Term("base", Role("base")), Term("small", Role("d"), 0.5)))
    spec = Speculation("prediction", 4)
    asked = prepare(Program("x", policy, speculation=spec), "abc", GREEDY, catalog(served), prediction="<x1><x0>abc")
    other = asking(served, "innocent", model="d")
    served.submit(asked)
    served.submit(other)
    _, seen = until_done(served, asked.id)
    _, more = until_done(served, other.id) if served.has_work() else (0, [])
    assert not [event for event in seen + more if isinstance(event, Failed)]


def test_a_drafter_with_a_short_context_is_refused_passed_over_and_retired() -> None:
    served = engine({"base": 4096, "d": 64})
    with pytest.raises(BadRequest, match="'d' takes 64") as caught:
        asking(served, "x" * 100, DRAFT)
    assert caught.value.param == "decoding.speculation.draft"
    request = asking(served, "x" * 50, DRAFT, max_tokens=100)
    other = asking(served, "y" * 30, model="d")
    served.submit(request)
    served.submit(other)
    _, seen = until_done(served, request.id)
    assert not [event for event in seen if isinstance(event, Failed)]
    done = next(e for e in seen if isinstance(e, Done) and e.request_id == request.id)
    assert 0 < done.usage.drafted < 64
    assert served.pools["d"].used == 0


@pytest.mark.parametrize("length", [20, 100])
def test_a_drafter_that_fails_while_it_catches_up_fails_nobody(length: int) -> None:
    served = engine()
    request, other = asking(served, "ab" * length, DRAFT), asking(served, "zz", model="d")
    served.submit(request)
    runner: Any = served.runners["d"]
    runner.broken = True
    _, seen = until_done(served, request.id)
    assert not [event for event in seen if isinstance(event, Failed)]
    plain = asking(served, "ab" * length)
    served.submit(plain)
    _, again = until_done(served, plain.id)
    assert text_of(again, plain) == text_of(seen, request)
    runner.broken = False
    served.submit(other)
    until_done(served, other.id)


def test_drafts_leave_scoring_and_prefill_their_budgets() -> None:
    for settings, changes, prompt in (
        ({"max_num_batched_tokens": 4096, "max_logit_rows": 128}, {"prompt_logprobs": 0}, "c" * 600),
        ({"max_num_batched_tokens": 256}, {}, "c" * 1000),
    ):
        ticks = []
        for spec in (None, Speculation("d", 16)):
            served = engine(**settings)
            for i in range(8):
                served.submit(asking(served, f"ab{i}", spec, max_tokens=2000))
            for _ in range(4):
                served.step()
            request = asking(served, prompt, max_tokens=1, **changes)
            served.submit(request)
            ticks.append(until_done(served, request.id)[0])
        assert ticks[1] <= ticks[0] + 1, ticks


def test_a_drafters_memory_keeps_nobody_out() -> None:
    served = engine(blocks=30)
    long = asking(served, "ab", DRAFT, max_tokens=100)
    served.submit(long)
    for _ in range(12):
        served.step()
    request = asking(served, "q" * 60, model="d", max_tokens=4)
    served.submit(request)
    assert until_done(served, request.id)[0] < 12
    assert served.has_work(), "the long one goes on"


@pytest.mark.parametrize("blocks", [26, 30, 34, 40])
def test_drafts_preempt_nobody(blocks: int) -> None:
    counts = []
    for spec in (None, Speculation("d", 8)):
        models = {n: Embedding(n, random_table(i), 1, 4096) for i, n in enumerate(("base", "d"))}
        memory = {"base": blocks * 4, "d": 400 * 4}
        text = byte_tokenizer()
        config = EngineConfig(block_size=4, max_num_batched_tokens=256, max_num_seqs=8, prefix_cache=False)
        served = Engine({n: Hosted(m, TextModel(n, text), memory[n]) for n, m in models.items()}, config)
        for i in range(4):
            served.submit(asking(served, f"ab{i}xxxxxxxxx", spec if i < 3 else None, max_tokens=40))
        while served.has_work():
            served.step()
            served.check()
        counts.append(served.scheduler.preemptions)
    assert counts[1] <= counts[0] + 1


def test_drafts_stay_within_the_budgets_of_the_tick_that_ends_a_prefill() -> None:
    served = engine(max_num_batched_tokens=31)
    request = asking(served, "x" * 30, Speculation("d", 30), max_tokens=40)
    served.submit(request)
    until_done(served, request.id)
    base: Any = served.runners["base"]
    assert max(sum(len(span.token_ids) for span in spans) for spans in base.spans) <= 31


def test_a_grammar_beside_a_wider_model() -> None:
    """The rows of a batch are as wide as its widest mix; masks are as wide as their own."""
    text = {"base": byte_tokenizer(), "wide": byte_tokenizer(), "d": byte_tokenizer()}
    models = {
        "base": Embedding("base", random_table(0), 1),
        "wide": Embedding("wide", random_table(1, width=300), 1),
        "d": Embedding("d", random_table(2, 50, 300), 1),
    }
    served = Engine({n: Hosted(m, TextModel(n, text[n]), 4000) for n, m in models.items()}, EngineConfig(block_size=4))
    requests = [replace(asking(served, "ab", DRAFT), constraint=Brackets), asking(served, "cd", DRAFT, model="wide")]
    for request in requests:
        served.submit(request)
    seen: list[Event] = []
    while served.has_work():
        seen += served.step()
    assert not [event for event in seen if isinstance(event, Failed)]
    assert all(event.usage.drafted for event in seen if isinstance(event, Done))


@pytest.mark.parametrize("accept", ["rejection", "kl"])
def test_a_drafts_record_is_as_wide_as_its_own_mix(accept: Any) -> None:
    """A wider neighbour of the draft step is not there when the rows are verified."""
    sizes = {"base": (101, 257), "wide": (101, 300), "d": (50, 300)}
    models = {n: Embedding(n, random_table(i, *size), 1) for i, (n, size) in enumerate(sizes.items())}
    hosted = {n: Hosted(m, TextModel(n, byte_tokenizer()), 4000) for n, m in models.items()}
    served = Engine(hosted, EngineConfig(block_size=4))
    spec = Speculation("d", 3, accept)
    good = asking(served, "ab", spec, temperature=1.0)
    served.submit(good)
    served.submit(asking(served, "cd", spec, model="wide", temperature=1.0))
    for _ in range(2):
        served.step()
    models["wide"].broken = True
    _, seen = until_done(served, good.id)
    assert [e.request_id for e in seen if isinstance(e, Failed)] != [good.id]
    assert len([e for e in seen if isinstance(e, Done)]) == 1


def test_numbers_of_any_size_are_refused() -> None:
    served = engine()
    for changes in ({"max_ngram": 10**400}, {"max_ngram": 0}, {"tokens": 10**400}, {"tokens": -1}):
        with pytest.raises(BadRequest, match="must be from 1 to"):
            asking(served, "x", Speculation("ngram", **changes))  # type: ignore[arg-type]


def test_a_judge_needs_the_model_that_it_reads() -> None:
    served = engine()
    served.judges["base"] = JudgeHead(torch.zeros(1), 0.0)
    policy = Policy((Term("base", Role("base"), 0.0), Term("small", Role("d"))))
    program = Program("x", policy, speculation=Speculation("ngram", 4, "judge"))
    with pytest.raises(BadRequest, match="weight 0"):
        served.submit(prepare(program, "ab", GREEDY, catalog(served)))


def auto(entries: dict[str, Entry], terms: tuple[Term, ...], prompt: tuple[int, ...]) -> str:
    program = Program("x", Policy(terms), speculation=Speculation())
    settled = settle_speculation(program, [prompt] * len(terms), Sampling(), entries, predicted=False)
    assert settled.speculation is not None
    return settled.speculation.draft


def test_auto_knows_what_an_adapter_costs_and_whom_a_prompt_suits() -> None:
    served = engine({"base": 512, "d": 512})
    entries = catalog(served)
    big = replace(entries["base"].info, parameters=1000)
    entries["base"] = replace(entries["base"], info=big)
    entries["d"] = replace(entries["d"], info=replace(entries["d"].info, parameters=100, width=200))
    entries["tuned"] = Entry(entries["base"].text, replace(big, id="tuned", of="base", parameters=3))
    alone = (Term("base", Role("base")),)
    assert auto(entries, alone, (1, 2)) == "d"
    assert auto(entries, (Term("base", Role("tuned")),), (1, 2)) == "d"  # an adapter costs what its model costs
    assert auto(entries, (*alone, Term("tuned", Role("tuned"))), (1, 2)) == "d"  # and is no small role
    assert auto(entries, alone, (1, 250)) == "ngram"  # 'd' does not have that id
    assert auto(entries, (*alone, Term("small", Role("d"))), (1, 250)) == "d"  # a role has a prompt of its own
    with pytest.raises(BadRequest, match="does not have"):
        settle_speculation(
            Program("x", Policy(alone), speculation=Speculation("d")), [(250,)], Sampling(), entries, False
        )
    small = Program("x", Policy((Term("d", Role("d")),)), speculation=Speculation("base"))
    with pytest.raises(BadRequest, match="larger than"):
        settle_speculation(small, [(1,)], Sampling(), entries, predicted=False)


def test_a_prediction_is_no_longer_than_the_context() -> None:
    served = engine({"base": 64, "d": 64})
    program = Program("x", Policy((Term("base", Role("base")),)), speculation=Speculation("prediction"))
    request = prepare(program, "ab", GREEDY, catalog(served), prediction="z" * 100_000)
    assert len(request.prediction) == 64


class Faulty(Brackets):
    """A constraint one of whose methods raises when it has been called a few times."""

    def __init__(self, method: str, after: int) -> None:
        super().__init__()
        self.method, self.left = method, after

    def _count(self, method: str) -> None:
        self.left -= method == self.method
        if self.left < 0:
            raise RuntimeError("broken on purpose")

    def allowed(self, width: int) -> torch.Tensor:
        self._count("allowed")
        return super().allowed(width)

    def advance(self, token: int) -> None:
        self._count("advance")
        super().advance(token)

    def rollback(self, count: int) -> None:
        self._count("rollback")
        super().rollback(count)


@pytest.mark.parametrize("method", ["allowed", "advance", "rollback"])
@pytest.mark.parametrize("after", [0, 1, 4, 9])
@pytest.mark.parametrize("draft", ["ngram", "d"])
def test_a_constraint_that_raises_harms_nobody_else(draft: str, method: str, after: int) -> None:
    served = engine()
    spec = Speculation(draft, 4)
    bad = replace(asking(served, "(ab)(ab)(ab", spec), constraint=lambda: Faulty(method, after))
    good = asking(served, "cd", DRAFT)
    for request in (bad, good):
        served.submit(request)
    seen: list[Event] = []
    while served.has_work():
        seen += served.step()
        served.check()
    assert good.id in [event.request_id for event in seen if isinstance(event, Done)]
    drafted = next(event.usage.drafted for event in seen if isinstance(event, Done) and event.request_id == good.id)
    assert drafted > 8, "the other one's drafter goes on"


def test_a_drafter_that_lacks_a_token_is_retired_in_mid_prefill() -> None:
    """The first token is one that the drafter has no row for, in the tick in which it catches up with the prompt."""
    text = {"base": TextModel("base", byte_tokenizer(2)), "d": TextModel("d", byte_tokenizer())}
    models = {"base": Embedding("base", random_table(0, width=259), 1), "d": Embedding("d", random_table(1, 50), 1)}
    served = Engine({n: Hosted(m, text[n], 4000) for n, m in models.items()}, EngineConfig(block_size=4))
    request = asking(served, "x" * 60, DRAFT, allowed_token_ids=(258,), max_tokens=3)
    served.submit(request)
    _, seen = until_done(served, request.id)
    assert text_of(seen, request) == [258] * 3
    assert served.pools["d"].used == 0


def test_a_fork_does_not_take_the_memory_that_it_copies() -> None:
    """n = 2 where the drafter's pool has no block left: the sibling catches up by itself."""
    models = {n: Embedding(n, random_table(i), 1, 4096) for i, n in enumerate(("base", "d"))}
    for blocks in range(11, 18):
        text = byte_tokenizer()
        memory = {"base": 4000, "d": blocks * 4}
        hosted = {n: Hosted(m, TextModel(n, text), memory[n]) for n, m in models.items()}
        served = Engine(hosted, EngineConfig(block_size=4))
        request = replace(asking(served, "q" * 42, DRAFT, max_tokens=12), n=2)
        served.submit(request)
        _, seen = until_done(served, request.id)
        answers = [[], []]  # type: list[list[int]]
        for event in seen:
            if isinstance(event, Delta):
                answers[event.index] += event.token_ids
        assert answers[0] == answers[1]
        assert len(answers[0]) == 12


def test_lookups_draft_again_as_soon_as_something_matches() -> None:
    """A tick without a match says nothing about the next one."""
    pace = Pace(Clock())
    member = sequence(GREEDY, Speculation("ngram"))
    member.running = True
    member.draft = Draft(Speculation("ngram", accept="rejection"), lookup=Lookup((), Source(()), 3))
    wanted = []
    for token in (1, 2, 3, 1, 2, 3, 1):
        wanted.append(pace.assign([member]))
        assert member.draft.lookup is not None
        member.draft.lookup.push(token)
        member.output.append(token)
        member.next_row = len(member.output) - 1
    wanted.append(pace.assign([member]))
    assert wanted == [False] * 4 + [True] * 4


def test_a_row_that_allows_nothing_ends_a_draft() -> None:
    """Behind an accepted draft nothing may follow: the draft stays, and then there is no token."""
    member = sequence(Sampling(temperature=0.7, top_p=0.9), Speculation("d", 2, "rejection"))
    assert member.draft is not None
    z = torch.zeros(3, 10)
    z[1] = -torch.inf
    member.draft.tokens, member.draft.probs = [4, 5], [torch.full((10,), 0.1)] * 2
    (drawn,) = verify(z, [Check(member, 0)], torch.Generator().manual_seed(0))
    assert drawn[-1].token is None or len(drawn) == 1
