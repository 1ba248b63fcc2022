"""The verbs on the real engine: what is computed and how often, exactness of forks, budgets, memory, failures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from decoding import search
from decoding.admit import Hosted
from decoding.blocks import Blocks
from decoding.core import (
    BadRequest,
    EngineConfig,
    EngineFailure,
    Overloaded,
    Policy,
    Program,
    Request,
    Role,
    Sampling,
    SearchPlan,
    Speculation,
    Term,
)
from decoding.engine import Engine
from decoding.events import Delta, Done, Event, Failed, Progress, Usage
from decoding.prepare import prepare
from decoding.scorers.spec import Hypothesis, Rendered
from decoding.search.spec import SearchKind
from decoding.search.verbs import (
    Branch,
    Candidate,
    Drop,
    Feed,
    Fork,
    Judge,
    Open,
    Outcome,
    Probe,
    Run,
    Score,
    Search,
    Steps,
    Top,
    Until,
)
from decoding.state import Sequence, Stream
from decoding.strategies import STRATEGIES
from decoding.text import TextModel
from tests.decoding.test_renderings import pieces
from tests.fakes import EOS, TableModel, random_table, table_engine

PLAIN = Program("plain", Policy((Term("base", Role("base")),)))
PROMPT = "a prompt of 22 letters"
MARK = 257


@dataclass(frozen=True)
class Nothing:
    """No parameters."""


class Marked:
    """Reads a scorer's row after each step: prompt, then every step with a marker behind it."""

    hidden = False

    def __init__(self, model: str = "prm") -> None:
        self.model = model

    def render(self, text: Hypothesis) -> Rendered:
        ids, marks = list(str(text.prompt).encode()), []
        for step in text.steps:
            ids += [*step.encode(), MARK]
            marks.append(len(ids) - 1)
        return Rendered(ids, marks)

    def read(self, rows: torch.Tensor, hidden: torch.Tensor | None) -> list[float]:
        return rows[:, 0].tolist()


def make_engine(blocks: int | None = 4096, roles: int = 1, width: int = 257, **settings: Any) -> Engine:
    models = {"base": TableModel("base", random_table(1, width=width), memory=4)}
    for i in range(1, roles):
        models[f"side{i}"] = TableModel(f"side{i}", random_table(10 + i, width=width), memory=4)
    models["prm"] = TableModel("prm", random_table(2, width=258), memory=200, max_model_len=512)
    config = replace(EngineConfig(block_size=4), **settings)
    engine = table_engine(models, config, blocks, extra=1)
    engine._host.make_scorer = lambda spec, model: Marked(str(spec))  # type: ignore[assignment]
    return engine


@pytest.fixture
def asked() -> Iterator[Callable[..., Program]]:
    """Makes a generator a search; `asked(run)` is a program with it."""

    def program(run: Callable[[Search], Steps], policy: Program = PLAIN, **plan: Any) -> Program:
        name = f"test-{len(search.HIDDEN)}"
        search.HIDDEN[name] = SearchKind(name, "", Nothing, lambda it, _: run(it))
        return replace(policy, search=SearchPlan(name, Nothing(), **plan))

    before = dict(search.HIDDEN)
    yield program
    search.HIDDEN.clear()
    search.HIDDEN.update(before)


SAMPLED = Sampling(max_tokens=30, seed=5, ignore_eos=True)


def request_of(
    engine: Engine, program: Program, prompt: Any = PROMPT, sampling: Sampling = SAMPLED, **more: Any
) -> Request:
    return prepare(program, prompt, sampling, engine.catalog(), **more)


def usage_of(engine: Engine, program: Program, sampling: Sampling = SAMPLED, **more: Any) -> Usage:
    made = engine.generate(PROMPT, program, sampling, **more)
    engine.check()
    assert made[0].usage is not None
    return made[0].usage


def one(branch: Branch) -> Outcome:
    return Outcome([Candidate(branch)])


def rows_of(model: TableModel) -> int:
    return sum(len(span.rows) for spans in model.spans for span in spans)


def tokens_of(model: TableModel) -> int:
    return sum(len(span.token_ids) for spans in model.spans for span in spans)


def test_a_search_is_queued_as_one_sequence(asked: Any) -> None:
    def run(it: Search) -> Steps:
        yield Run(it.root)
        return one(it.root)

    engine = make_engine(max_queue=1)
    program = asked(run)
    engine.submit(request_of(engine, program, n=3))
    with pytest.raises(Overloaded):
        engine.submit(request_of(engine, PLAIN, n=2))


# -- what is computed -----------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_for_64_forks(asked: Any) -> None:
    def run(it: Search) -> Steps:
        children = yield Fork(it.root, 64)
        yield [Run(child, Until(tokens=3)) for child in children]
        return one(children[0])

    engine = make_engine()
    base: Any = engine.runners["base"]
    usage = usage_of(engine, asked(run))
    assert usage.completion_tokens == 64 * 3
    assert tokens_of(base) == len(PROMPT) - 1 + 64 * 3  # all but the last position, then three rows of each
    assert rows_of(base) == 64 * 3
    assert len(base.spans) == 1 + 3
    assert dict(usage.forwards) == {"base": 4}


def test_a_scorer_reads_each_token_and_marker_once(asked: Any) -> None:
    def run(it: Search) -> Steps:
        live = yield Fork(it.root, 3)
        for _ in range(4):
            yield [Run(branch, Until(tokens=5)) for branch in live]
            scores = yield [Score(branch, "prm") for branch in live]
            assert [len(each) for each in scores] == [len(branch.steps) for branch in live]
            best = max(range(3), key=lambda i: scores[i][-1])
            children = yield Fork(live[best], 3)
            yield [Drop(branch) for branch in live]
            live = children
        return Outcome([Candidate(branch) for branch in live])

    engine = make_engine(prefix_cache=False)
    base: Any = engine.runners["base"]
    prm: Any = engine.runners["prm"]
    base.table[:, 128:] = -60.0  # one letter a token
    usage = usage_of(engine, asked(run, candidates=True))
    assert usage.completion_tokens == 4 * 3 * 5
    assert usage.search is not None
    # Every hypothesis has its own tokens and a marker read once, however often it was forked; without the prefix cache,
    # each of the first three reads the prompt.
    own = 4 * 3 * (5 + 1)
    assert dict(usage.search.scored) == {"prm": own + 3 * len(PROMPT)}
    assert tokens_of(prm) == own + 3 * len(PROMPT)
    assert rows_of(prm) == 4 * 3


@pytest.mark.parametrize("cached", [True, False])
def test_what_texts_for_scorers_have_is_told_apart_from_the_prompt(asked: Any, cached: bool) -> None:
    """Their length is the same whatever the cache holds, and what it held of them is not of the request's prompt."""
    text = Hypothesis("the text that is read", ("one step", "and two"), True)

    def run(it: Search) -> Steps:
        yield Judge(text, "prm")
        other = yield Open("another prompt", None, SAMPLED)
        yield [Feed(other, "fed", logprobs=True), Run(it.root)]
        yield Score(other, "prm")
        return one(it.root)

    engine = make_engine(prefix_cache=cached)
    tokens = (21 + 9 + 8) + 14 + (14 + 4)  # the text with its markers, a prompt, that prompt as a scorer reads it
    first, again = (usage_of(engine, asked(run)) for _ in range(2))
    assert first.search is not None
    assert again.search is not None
    assert first.search.read == again.search.read == tokens
    assert (first.cached_tokens, first.search.cached) == (0, 0)
    assert again.cached_tokens == (20 if cached else 0)
    assert again.search.cached == (28 + 12 + 16 if cached else 0)


def test_hits_count_as_long_as_their_own_text_was_not_preempted(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Hypothesis("the text that is read", ("one step", "and two"), True)
    engine = make_engine()

    def run(it: Search) -> Steps:
        yield Judge(text, "prm")
        return one(it.root)

    def cached() -> int:
        usage = usage_of(engine, asked(run))
        assert usage.search is not None
        return usage.search.cached

    assert [cached(), cached()] == [0, 28]
    hit = Blocks.hit_prefix

    def hidden(self: Blocks, sequence: Sequence, *rest: Any) -> bool:
        sequence.recomputes = isinstance(sequence, Stream) and mine
        sequence.group.payer.preemptions = 1  # another text of the request has been
        return hit(self, sequence, *rest)

    monkeypatch.setattr(Blocks, "hit_prefix", hidden)
    mine = False
    assert cached() == 28
    mine = True
    assert cached() == 0


@pytest.mark.parametrize("cached", [True, False])
def test_a_text_that_is_rendered_otherwise_is_read_from_there_on(asked: Any, cached: bool) -> None:
    """The end of a rendering changes with every step: what stands before it is kept, and every score is right."""

    class Closed(Marked):
        def render(self, text: Hypothesis) -> Rendered:
            ids = [*str(text.prompt).encode(), *"".join(text.steps).encode(), 1, 2, 3]
            return Rendered(ids, [len(ids) - 1])

    seen: list[tuple[Hypothesis, list[float]]] = []

    def run(it: Search) -> Steps:
        for _ in range(5):
            yield Run(it.root, Until(tokens=3))
            score = yield Score(it.root, "prm")
            text = Hypothesis(it.prompt, tuple(it.root.steps))
            seen.append((text, score))
            assert (yield Judge(text, "prm")) == score
        return one(it.root)

    engine = make_engine(prefix_cache=cached)
    engine._host.make_scorer = lambda spec, model: Closed()  # type: ignore[assignment]
    usage_of(engine, asked(run))
    prm: Any = engine.runners["prm"]
    for text, score in seen:
        assert score == [float(prm.row(Closed().render(text).ids)[0])]


def test_marks_that_were_passed_over_are_read_when_they_are_asked_for(asked: Any) -> None:
    def run(it: Search) -> Steps:
        yield Feed(it.root, "ab", step=True)
        yield Feed(it.root, "cd", step=True)
        last = yield Score(it.root, "last")
        both = yield Score(it.root, "all")
        assert len(last) == 1
        assert len(both) == 2
        assert both[-1:] == last
        return one(it.root)

    class Last(Marked):
        def render(self, text: Hypothesis) -> Rendered:
            made = super().render(text)
            return Rendered(made.ids, made.marks[-1:])

    engine = make_engine(prefix_cache=False)
    shared = {"last": Last(), "all": Marked()}
    engine._host.make_scorer = lambda spec, model: shared[spec]  # type: ignore[assignment,index]
    usage_of(engine, asked(run))


# -- exactness ------------------------------------------------------------------------------------------------------


def test_forks_are_the_choices_of_a_plain_request(asked: Any) -> None:
    """The noise goes by seed and path, so n forks of the root write what n choices of the request would."""

    def run(it: Search) -> Steps:
        children = yield Fork(it.root, 5)
        yield [Run(child) for child in children]
        return Outcome([Candidate(child) for child in children])

    engine = make_engine()
    found = engine.generate(PROMPT, asked(run), SAMPLED, n=5)
    plain = engine.generate(PROMPT, PLAIN, SAMPLED, n=5)
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert [each.text for each in found] == [each.text for each in plain]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in plain]


def test_runs_in_pieces_are_one_run(asked: Any) -> None:
    def run(it: Search) -> Steps:
        children = yield Fork(it.root, 3)
        for count in (1, 4, 2, 100):
            yield [Run(child, Until(tokens=count)) for child in children]
            tops = yield [Top(child, 2) for child in children]
            assert all(len(top) == 2 for child, top in zip(children, tops) if not child.finished)
        return Outcome([Candidate(child) for child in children])

    engine = make_engine()
    found = engine.generate(PROMPT, asked(run), SAMPLED, n=3)
    assert [each.token_ids for each in found] == [
        each.token_ids for each in engine.generate(PROMPT, PLAIN, SAMPLED, n=3)
    ]


def test_top_probe_and_fed_tokens_tell_the_policys_log_probs(asked: Any) -> None:
    policy = replace(STRATEGIES["proxy_tuning"].build(STRATEGIES["proxy_tuning"].params("side1", "side2"), "base"))
    told: dict[str, Any] = {}

    def run(it: Search) -> Steps:
        told["fed"] = yield Feed(it.root, "xyz", logprobs=True)
        told["logprob"] = it.root.logprob
        told["top"] = yield Top(it.root, 4)
        told["probe"] = yield Probe(it.root, "? ", ["yes", "no", 7])
        told["again"] = yield Top(it.root, 4)
        told["run"] = yield Run(it.root, Until(tokens=2), replace(it.sampling, temperature=0.0), top=3)
        return one(it.root)

    engine = make_engine(roles=3)
    usage_of(engine, asked(run, policy))

    def lp(text: str) -> torch.Tensor:
        ids = list((PROMPT + text).encode())
        base, expert, anti = (engine.runners[m].row(ids) for m in ("base", "side1", "side2"))  # type: ignore[attr-defined]
        return torch.log_softmax(base + expert - anti, 0)

    want = [float(lp("xyz"[:i])[ord("xyz"[i])]) for i in range(3)]
    assert told["fed"] == pytest.approx(want, abs=1e-5)
    assert told["logprob"] == pytest.approx(sum(want), abs=1e-5)
    values, ids = lp("xyz").topk(4)
    assert [token for token, _ in told["top"]] == ids.tolist()
    assert [value for _, value in told["top"]] == pytest.approx(values.tolist(), abs=1e-5)
    assert told["again"] == told["top"]
    assert told["probe"] == pytest.approx([float(lp("xyz? ")[i]) for i in (ord("y"), ord("n"), 7)], abs=1e-5)
    tokens, first = told["run"]
    assert first == told["top"][:3]
    assert tokens[0] == told["top"][0][0]


def test_texts_go_on_as_they_stand_behind_other_text(asked: Any) -> None:
    """With a tokenizer that writes a space before every text: no second space, and choices keep their own ids."""
    told: dict[str, Any] = {}

    def run(it: Search) -> Steps:
        yield Feed(it.root, "a")
        yield Feed(it.root, " b")
        yield Feed(it.root, "+")
        told["probe"] = yield Probe(it.root, " a", [" a", " b"])
        return one(it.root)

    text = TextModel("base", pieces())
    model = TableModel("base", random_table(1, width=len(pieces())), memory=1)
    engine = Engine({"base": Hosted(model, text, 64 * model.kv_bytes_per_block(4))}, EngineConfig(block_size=4))
    (found,) = engine.generate("Q", asked(run), replace(SAMPLED, max_tokens=9))
    ids = [pieces().convert_tokens_to_ids(token) for token in ("▁a", "▁b", "+", "▁a")]
    assert found.token_ids == ids[:3]
    assert found.text == "a b+"
    lp = torch.log_softmax(model.row(ids), 0)
    assert told["probe"] == pytest.approx([float(lp[ids[3]]), float(lp[ids[1]])], abs=1e-5)


def test_tokens_that_were_chosen_among_the_likeliest_have_their_log_probs(asked: Any) -> None:
    def run(it: Search) -> Steps:
        branch = it.root
        for _ in range(3):
            ((token, _),) = yield Top(branch, 1)
            (branch,) = yield Fork(branch, 1)
            yield Feed(branch, [token])
        yield Run(branch)
        return one(branch)

    engine = make_engine()
    sampling = replace(SAMPLED, temperature=0.0, logprobs=0, max_tokens=6)
    (found,) = engine.generate(PROMPT, asked(run), sampling)
    (plain,) = engine.generate(PROMPT, PLAIN, sampling)
    assert found.token_ids == plain.token_ids
    assert [e.token_id for e in found.logprobs] == plain.token_ids
    assert [e.logprob for e in found.logprobs] == pytest.approx([e.logprob for e in plain.logprobs], abs=1e-5)


def test_log_probs_with_gaps_are_not_told(asked: Any) -> None:
    def run(it: Search) -> Steps:
        yield Feed(it.root, "ab")
        yield Run(it.root, Until(tokens=3))
        return one(it.root)

    (found,) = make_engine().generate(PROMPT, asked(run), replace(SAMPLED, logprobs=0))
    assert len(found.token_ids) == 5
    assert found.logprobs == []


def test_a_fork_leaves_its_parents_blocks_alone(asked: Any) -> None:
    """At every length of text, block boundaries included, whatever children and the parent itself go on with."""
    pools: list[torch.Tensor] = []

    def run(it: Search) -> Steps:
        for _ in range(9):
            yield Run(it.root, Until(tokens=1))
            before = yield Top(it.root, 5)
            pools.append(base.pool[blocks()].clone())
            children = yield Fork(it.root, 2)
            yield Feed(children[0], "z")
            yield [Run(child, Until(tokens=6)) for child in children]
            assert torch.equal(base.pool[blocks()], pools[-1])
            assert (yield Top(it.root, 5)) == before
            yield [Drop(child) for child in children]
        return one(it.root)

    def blocks() -> list[int]:
        (root,) = [s for s in engine.scheduler.resting if s.path == ()]
        return list(root.tracks[0].blocks)

    engine = make_engine()
    base: Any = engine.runners["base"]
    usage_of(engine, asked(run))
    assert len(pools) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_result(asked: Any, temperature: float) -> None:
    texts: list[list[int]] = []
    passes: list[int] = []

    def search_with(drafts: list[int]) -> Callable[[Search], Steps]:
        def run(it: Search) -> Steps:
            yield Run(it.root, Until(tokens=3))
            tokens = yield Run(it.root, Until(tokens=20), drafts=drafts)
            texts.append(tokens)
            yield Run(it.root, Until(tokens=2))
            return one(it.root)

        return run

    engine = make_engine()
    sampling = replace(SAMPLED, temperature=temperature)
    for drafts in ([], "right", [1] * 20, "half"):
        given = (
            drafts
            if isinstance(drafts, list)
            else texts[0]
            if drafts == "right"
            else [*texts[0][:9], 0, *texts[0][10:]]
        )
        passes.append(usage_of(engine, asked(search_with(given)), sampling).passes)
    assert texts[1:] == texts[:1] * 3
    assert passes[0] == 25
    assert passes[1] == 3 + 1 + 2  # all twenty in one pass
    assert passes[2] <= 25
    assert passes[3] < 10  # the text comes back to its drafts


def test_speculation_goes_on_under_a_search(asked: Any) -> None:
    """Drafters of their own fork with their branches; the seed's text is the same with them."""

    def run(it: Search) -> Steps:
        live = yield Fork(it.root, 2)
        for _ in range(3):
            yield [Run(branch, Until(tokens=4)) for branch in live]
            forked = yield [Fork(branch, 1) for branch in live]
            live = [children[0] for children in forked]
        return Outcome([Candidate(branch) for branch in live])

    engine = make_engine(roles=2)
    plain = engine.generate(PROMPT, asked(run), SAMPLED, n=2)
    for draft in ("side1", "ngram"):
        program = asked(run, replace(PLAIN, speculation=Speculation(draft, tokens=3)))
        drafted = engine.generate(PROMPT, program, SAMPLED, n=2)
        assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
        assert drafted[0].usage is not None
        assert draft == "ngram" or drafted[0].usage.drafted > 0
        engine.check()


def test_drafts_of_a_run_stand_in_for_a_drafter(asked: Any) -> None:
    """The drafter's memory is not lost meanwhile, nor when the request goes in the middle of the run."""

    def run(it: Search) -> Steps:
        yield Run(it.root, Until(tokens=6))
        yield Run(it.root, Until(tokens=8), drafts=[1, 2, 3])
        yield Run(it.root)
        return one(it.root)

    engine = make_engine(roles=2)
    program = asked(run, replace(PLAIN, speculation=Speculation("side1", tokens=3)))
    greedy = replace(SAMPLED, temperature=0.0)
    (plain,) = engine.generate(PROMPT, PLAIN, greedy)
    for ticks in (6, 10, 1000):
        request = request_of(engine, program, sampling=greedy)
        engine.submit(request)
        events: list[Event] = []
        for _ in range(ticks):
            events += engine.step()
            engine.check()
        engine.abort(request.id)
        engine.check()
        assert all(pool.used == 0 for pool in engine.pools.values())
    assert [list(event.token_ids) for event in events if isinstance(event, Delta)] == [plain.token_ids]


def test_texts_are_scored_when_the_root_is_gone(asked: Any) -> None:
    def run(it: Search) -> Steps:
        other = yield Open("another", None)
        yield Drop(it.root)
        yield Run(other, Until(tokens=3))
        assert (yield Score(other, "prm")) == (yield Judge(Hypothesis("another", tuple(other.steps)), "prm"))
        return one(other)

    usage_of(make_engine(), asked(run))


# -- ends of texts --------------------------------------------------------------------------------------------------


def test_separators_stops_and_lengths_end_runs(asked: Any) -> None:
    # after "a": b, then c, then newline twice, then d, then the end
    table = torch.full((257, 257), -20.0)
    for now, then in ((ord("a"), ord("b")), (ord("b"), ord("c")), (ord("c"), 10), (10, 10), (ord("d"), EOS)):
        table[now, then] = 20.0
    steps: list[list[str]] = []

    def run(it: Search) -> Steps:
        tokens = yield Run(it.root, Until(separator="\n\n"))
        assert bytes(tokens) == b"bc\n\n"
        assert it.root.finished is None
        yield Feed(it.root, "d")
        assert it.root.steps == ["bc\n\nd"]
        yield Run(it.root, Until(separator="\n\n"))
        assert (it.root.finished, it.root.text, it.root.tokens[-1]) == ("stop", "bc\n\nd", EOS)
        assert (yield Run(it.root)) == []
        assert (yield Top(it.root, 3)) == []
        assert (yield Feed(it.root, "more")) is None
        (child,) = yield Fork(it.root, 1)
        assert child.finished == "stop"
        told = yield Probe(child, "a", ["b"])  # behind the text, not behind its end
        assert told[0] == pytest.approx(0.0, abs=1e-3)
        other = yield Open("a", None, replace(it.sampling, max_tokens=3))
        yield Run(other)
        assert (other.finished, other.text) == ("length", "bc\n")
        stopped = yield Open("a", None, replace(it.sampling, stop=("c\n",)))
        yield Run(stopped)
        assert (stopped.finished, stopped.text, stopped.stop_reason) == ("stop", "b", "c\n")
        steps.append(it.root.steps)
        return one(it.root)

    engine = table_engine({"base": TableModel("base", table)}, blocks=64)
    (made,) = engine.generate("a", asked(run), Sampling(temperature=0.0, max_tokens=50))
    assert (made.text, made.finish_reason, made.token_ids[-1]) == ("bc\n\nd", "stop", EOS)
    assert steps == [["bc\n\nd"]]


def test_other_models_and_prompts_are_opened(asked: Any) -> None:
    def run(it: Search) -> Steps:
        small = yield Open("another", "side1")
        yield [Run(small, Until(tokens=6)), Run(it.root, Until(tokens=6))]
        assert small.model == "side1"
        return Outcome([Candidate(small), Candidate(it.root)])

    engine = make_engine(roles=2)
    greedy = replace(SAMPLED, temperature=0.0)
    found = engine.generate(PROMPT, asked(run), greedy, n=2)
    want = engine.generate("another", "side1", replace(greedy, max_tokens=6))
    assert found[0].token_ids == want[0].token_ids
    assert found[1].token_ids == engine.generate(PROMPT, "base", replace(greedy, max_tokens=6))[0].token_ids
    assert found[0].usage is not None
    assert dict(found[0].usage.forwards)["side1"] == 6


def test_nothing_is_computed_for_a_root_that_is_not_used(asked: Any) -> None:
    def run(it: Search) -> Steps:
        score = yield Judge(Hypothesis("question", ("one", "two")), "prm")
        return Outcome([Candidate(Branch(), scores=tuple(score))])

    engine = make_engine()
    usage = usage_of(engine, asked(run, candidates=True))
    assert dict(usage.forwards) == {"prm": 1}
    assert usage.search is not None
    prm: Any = engine.runners["prm"]
    want = [float(prm.row(list(b"questionone") + [MARK])[0]), float(prm.row([*b"questionone", MARK, *b"two", MARK])[0])]
    assert list(usage.search.candidates[0].scores) == pytest.approx(want)


# -- budgets --------------------------------------------------------------------------------------------------------


def test_the_budget_of_tokens_is_exact(asked: Any) -> None:
    def run(it: Search) -> Steps:
        children = yield Fork(it.root, 4)
        while it.exhausted is None:
            yield [Run(child, Until(tokens=5)) for child in children]
        assert (yield Run(children[0])) == []
        return Outcome([Candidate(child) for child in children])

    engine = make_engine()
    for limit in (1, 4, 13, 40):
        usage = usage_of(engine, asked(run, max_total_tokens=limit), n=2)
        assert usage.completion_tokens == limit
        assert usage.search is not None
        assert (usage.search.exhausted, usage.search.generated) == ("max_total_tokens", limit)


def test_the_budget_of_candidates_is_exact(asked: Any) -> None:
    counts: list[int] = []

    def run(it: Search) -> Steps:
        while it.exhausted is None:
            children = yield Fork(it.root, 3)
            counts.append(len(children))
        return one(it.root)

    usage = usage_of(make_engine(), asked(run, max_candidates=7))
    assert counts == [3, 3, 1]
    assert usage.search is not None
    assert usage.search.exhausted == "max_candidates"


def test_the_budget_of_seconds_ends_a_search(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("decoding.search.driver.time.monotonic", lambda: now[0])

    def run(it: Search) -> Steps:
        yield Run(it.root, Until(tokens=5))
        now[0] = 2.5
        tokens = yield Run(it.root)
        assert len(tokens) <= 1
        return one(it.root)

    made = make_engine().generate(PROMPT, asked(run, max_seconds=2.0), SAMPLED)
    assert made[0].finish_reason == "length"
    assert made[0].stop_reason == "max_seconds"


def test_a_choice_without_a_candidate_is_empty(asked: Any) -> None:
    def run(it: Search) -> Steps:
        yield Run(it.root, Until(tokens=2))
        return one(it.root)

    first, second = make_engine().generate(PROMPT, asked(run), SAMPLED, n=2)
    assert (len(first.token_ids), second.token_ids, second.finish_reason) == (2, [], "length")


def test_an_answer_that_ends_where_its_text_was_cut_is_cut_too(asked: Any) -> None:
    def run(it: Search) -> Steps:
        yield Run(it.root, Until(tokens=3))
        return Outcome(
            [Candidate(it.root, text=it.root.text[1:], answer="b"), Candidate(it.root, text="Something else.")]
        )

    own, other = make_engine().generate(PROMPT, asked(run), SAMPLED, n=2)
    assert (own.finish_reason, other.finish_reason) == ("length", "stop")


def test_progress_is_told_to_those_who_ask(asked: Any) -> None:
    def run(it: Search) -> Steps:
        it.progress("half", done=0.5)
        yield Run(it.root, Until(tokens=1))
        return one(it.root)

    engine = make_engine()
    for wanted in (True, False):
        engine.submit(request_of(engine, asked(run, progress=wanted)))
        events = [event for event in drain(engine) if isinstance(event, Progress)]
        assert [(e.message, e.numbers) for e in events] == [("half", (("done", 0.5),))] * wanted


# -- memory, fairness, failures -------------------------------------------------------------------------------------


def drain(engine: Engine, ticks: int = 5000) -> list[Event]:
    events: list[Event] = []
    for _ in range(ticks):
        if not engine.has_work():
            return events
        events += engine.step()
        engine.check()
    raise AssertionError("it does not end")


def wide(it: Search) -> Steps:
    """Forks, scores, prunes, drops: something of everything."""
    live = yield Fork(it.root, 6)
    for _ in range(4):
        yield [Run(branch, Until(tokens=4)) for branch in live]
        scores = yield [Score(branch, "prm") for branch in live]
        order = sorted(range(len(live)), key=lambda i: -scores[i][-1])
        kept = [live[i] for i in order[:2]]
        yield [Drop(live[i]) for i in order[2:]]
        yield Probe(kept[0], "?", ["y", "n"])
        children = yield [Fork(branch, 3) for branch in kept]
        yield [Drop(branch) for branch in kept]
        live = [child for group in children for child in group]
    return Outcome([Candidate(branch) for branch in live])


def test_an_eighth_of_the_memory_gives_the_same_texts(asked: Any) -> None:
    """Whoever rests gives its blocks to whoever needs them, and catches up."""
    policy = STRATEGIES["proxy_tuning"].build(STRATEGIES["proxy_tuning"].params("side1", "side2"), "base")
    results = []
    for blocks in (4096, 20):
        engine = make_engine(blocks, roles=3)
        requests = [
            request_of(engine, asked(wide, policy), f"{PROMPT} {i}", replace(SAMPLED, seed=i)) for i in range(3)
        ]
        requests += [request_of(engine, PLAIN, "plain", replace(SAMPLED, seed=i)) for i in range(3)]
        for request in requests:
            engine.submit(request)
        events = drain(engine)
        assert not [event for event in events if isinstance(event, Failed)]
        assert len([event for event in events if isinstance(event, Done)]) == 6
        places = {request.id: i for i, request in enumerate(requests)}
        texts: dict[int, list[int]] = {i: [] for i in range(6)}
        for event in events:
            if isinstance(event, Delta):
                texts[places[event.request_id]] += event.token_ids
        results.append(texts)
        assert all(pool.used == 0 for pool in engine.pools.values())
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(8))
def test_cancelling_at_any_moment_frees_everything(asked: Any, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(rng.choice([20, 40, 4096]), roles=2, max_num_seqs=rng.choice([2, 5, 64]))
    requests = [request_of(engine, asked(wide), sampling=replace(SAMPLED, seed=i)) for i in range(4)]
    for request in requests:
        engine.submit(request)
    for _ in range(rng.randrange(60)):
        engine.step()
        engine.check()
    for request in requests[:2]:
        engine.abort(request.id)
        engine.check()
        assert not [s for s in engine.scheduler.resting if s.group.payer.request.id == request.id]
    events = drain(engine)
    done = {event.request_id for event in events if isinstance(event, Done)}
    assert not [event for event in events if isinstance(event, Failed)]
    assert done <= {request.id for request in requests}
    assert all(pool.used == 0 for pool in engine.pools.values())
    assert not engine.scheduler.resting


def test_a_wide_search_does_not_starve_a_plain_stream(asked: Any) -> None:
    """One row a tick is the stream's, however many branches want one."""

    def run(it: Search) -> Steps:
        children = yield Fork(it.root, 40)
        yield [Run(child) for child in children]
        return one(children[0])

    engine = make_engine(max_num_seqs=8, max_logit_rows=4)
    engine.submit(request_of(engine, asked(run)))
    for _ in range(20):
        engine.step()
    plain = request_of(engine, PLAIN, "other")
    engine.submit(plain)
    for _ in range(30 + len("other") + 10):
        events = engine.step()
        if any(isinstance(event, Done) and event.request_id == plain.id for event in events):
            break
    else:
        raise AssertionError("the stream waits")
    drain(engine)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (BadRequest("no such thing", "decoding.search.x"), "BadRequest", "no such thing"),
        (EngineFailure("elsewhere"), "EngineFailure", "elsewhere"),
        (ZeroDivisionError(), "EngineFailure", "ZeroDivisionError"),
    ],
)
def test_a_search_that_fails_fails_alone(asked: Any, error: Exception, kind: str, words: str) -> None:
    def run(it: Search) -> Steps:
        children = yield Fork(it.root, 3)
        yield [Run(child, Until(tokens=4)) for child in children]
        raise error

    engine = make_engine()
    bad, good = request_of(engine, asked(run)), request_of(engine, asked(wide))
    engine.submit(bad)
    engine.submit(good)
    events = drain(engine)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, failed.kind) == (bad.id, kind)
    assert words in failed.message
    assert [event.request_id for event in events if isinstance(event, Done)] == [good.id]
    assert all(pool.used == 0 for pool in engine.pools.values())


def test_a_scorers_forward_that_fails_fails_its_searches(asked: Any) -> None:
    engine = make_engine()
    prm: Any = engine.runners["prm"]
    prm.broken = True
    request, plain = request_of(engine, asked(wide)), request_of(engine, PLAIN)
    engine.submit(request)
    engine.submit(plain)
    events = drain(engine)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == request.id
    assert [event.request_id for event in events if isinstance(event, Done)] == [plain.id]
    assert not engine.scheduler.resting


def test_a_text_too_long_for_its_scorer_is_refused(asked: Any) -> None:
    def run(it: Search) -> Steps:
        yield Run(it.root)
        yield Judge(Hypothesis("x" * 600, ("y",)), "prm")
        return one(it.root)

    engine = make_engine()
    with pytest.raises(BadRequest, match="602 tokens was to be scored; the scorer 'prm' takes 512"):
        engine.generate(PROMPT, asked(run), SAMPLED)
    engine.check()
    assert not engine.scheduler.resting


def test_a_branch_that_was_dropped_cannot_be_used(asked: Any) -> None:
    def run(it: Search) -> Steps:
        (child,) = yield Fork(it.root, 1)
        yield Drop(child)
        yield Run(child)
        return one(it.root)

    with pytest.raises(EngineFailure):
        make_engine().generate(PROMPT, asked(run), SAMPLED)


def test_remote_scorers_are_waited_for(asked: Any) -> None:
    class Elsewhere:
        blocks = True

        def score(self, text: Hypothesis) -> list[float]:
            return [float(len(text.text))]

    found: list[Any] = []

    def run(it: Search) -> Steps:
        yield Run(it.root, Until(tokens=3))
        found.append((yield [Score(it.root, "a"), Judge(Hypothesis("p", ("four",)), "a")]))
        return one(it.root)

    engine = make_engine()
    engine._host.make_scorer = lambda spec, model: Elsewhere()  # type: ignore[assignment]
    usage_of(engine, asked(run))
    assert found[0][1] == [4.0]
