"""Searches on the real engine: token-level ones are their definitions, all of them leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from decoding import search
from decoding.admit import Hosted
from decoding.core import BadRequest, EngineConfig, Policy, Program, Role, Sampling, SearchPlan, Term
from decoding.engine import Engine
from decoding.events import Usage
from decoding.generate import Completion
from decoding.scorers.spec import Hypothesis, ScorerParams
from decoding.search import (
    adaptive,
    agents,
    cascade,
    deal,
    nudging_search,
    revise,
    reward_search,
    score_texts,
    selective,
    step_speculative,
    tree_prompt,
)
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Feed, Open, Outcome, Probe, Search, Steps
from decoding.text import TextModel
from tests.decoding.test_renderings import merges, pieces
from tests.fakes import EOS, TableModel, random_table, table_engine

PROMPT = "a prompt of letters"
LETTERS = torch.full((257,), -torch.inf)
LETTERS[[*b"abcdefgh ", EOS]] = 0.0
LETTERS[EOS] = -1.0


@dataclass(frozen=True)
class Empty:
    """No parameters."""


class Hash:
    """A rule: a number from 0 to 3 that only the text decides."""

    def score(self, text: Hypothesis) -> list[float]:
        return [value(text.text)]


def value(text: str) -> float:
    return random.Random(f"v {text}").random() * 3


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A base and a small model that say letters; the base remembers three of them."""
    models = {
        name: TableModel(name, random_table(seed, scale=1.5) + LETTERS, memory=3)
        for seed, name in enumerate(("base", "small"))
    }
    made = table_engine(models, blocks=4096)
    made._host.make_scorer = lambda spec, model: Hash()  # type: ignore[assignment]
    before = dict(search.HIDDEN)
    yield made
    search.HIDDEN.clear()
    search.HIDDEN.update(before)


def answered(
    engine: Engine, kind: SearchKind, params: Any, sampling: Sampling, prompt: Any = PROMPT, **plan: Any
) -> tuple[Completion, Usage]:
    kind.check(params, sampling)
    search.HIDDEN[kind.name] = kind
    policy = Policy((Term("base", Role("base")),))
    asked = SearchPlan(kind.name, params, candidates=True, **plan)
    (made,) = engine.generate(prompt, Program("plain", policy, search=asked), sampling)
    engine.check()
    assert made.usage is not None
    return made, made.usage


def best(ids: list[int], k: int) -> list[tuple[int, float]]:
    model = TableModel("base", random_table(0, scale=1.5) + LETTERS, memory=3)
    lps = torch.log_softmax(model.row([*PROMPT.encode(), *ids]), 0)
    return [(int(i), float(lps[i])) for i in torch.argsort(-lps, stable=True)[:k]]


def look_ahead(ids: list[int], count: int, room: int) -> str:
    for _ in range(count):
        token = best(ids, 1)[0][0]
        if token == EOS or len(ids) == room:
            break
        ids = [*ids, token]
    return bytes(ids).decode()


@pytest.mark.parametrize(("k", "length", "weight"), [(4, 3, 1.0), (3, 6, 3.0), (5, 1, 0.3)])
def test_deal_is_its_definition(engine: Engine, k: int, length: int, weight: float) -> None:
    """And each token costs as many passes as it looks ahead, or one more where the chosen text was not computed."""
    ids: list[int] = []
    while len(ids) < 20:
        options = []
        for token, lp in best(ids, k):
            text = bytes(ids).decode() if token == EOS else look_ahead([*ids, token], length, 20)
            options.append((lp + weight * value(text), -token))
        ids.append(-max(options)[1])
        if ids[-1] == EOS:
            break
    params = deal.Deal(k=k, lookahead=length, weight=weight, scorer="rule")
    made, usage = answered(engine, deal.KIND, params, Sampling(max_tokens=20, temperature=0.0))
    assert list(made.token_ids) == ids
    assert dict(usage.forwards)["base"] <= 1 + (length + 1) * len(ids)


@pytest.mark.parametrize("beams", [1, 2])
def test_what_deal_chooses_has_its_log_probs(engine: Engine, beams: int) -> None:
    """Also where it leaves its look-ahead several times in a row."""
    params = deal.Deal(k=4, lookahead=2, weight=3.0, scorer="rule", beams=beams)
    made, _ = answered(engine, deal.KIND, params, Sampling(max_tokens=20, temperature=0.0, logprobs=0))
    assert [entry.token_id for entry in made.logprobs] == made.token_ids
    for i, entry in enumerate(made.logprobs):
        assert entry.logprob == pytest.approx(dict(best(made.token_ids[:i], 257))[entry.token_id], abs=1e-5)


@pytest.mark.parametrize(("words", "cut"), [("Final answer: 42", True), ("Final answer: 42$", False)])
def test_an_answer_in_a_text_that_was_cut_was_cut(engine: Engine, words: str, cut: bool) -> None:
    def run(it: Search, _: Any) -> Steps:
        branch: Branch = yield Open("Q")
        yield Feed(branch, [*words.replace("$", "").encode(), *([EOS] if words.endswith("$") else [])])
        return Outcome([Candidate(branch, text="42", answer="42")])

    kind = SearchKind("test-cut", "", tree_prompt.TreePrompt, run)
    limit = 16 if cut else 40
    made, _ = answered(engine, kind, tree_prompt.TreePrompt(), Sampling(max_tokens=limit))
    assert (made.text, made.finish_reason) == ("42", "length" if cut else "stop")


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_reward_search_is_its_definition(engine: Engine, weight: float) -> None:
    ids: list[int] = []
    while len(ids) < 20 and ids[-1:] != [EOS]:
        options = []
        for token, lp in best(ids, 5):
            said = [*ids, token] if token != EOS else ids
            options.append((lp + weight * value(bytes(said).decode()), -token))
        ids.append(-max(options)[1])
    params = reward_search.RewardSearch("rule", k=5, weight=weight)
    made, usage = answered(engine, reward_search.KIND, params, Sampling(max_tokens=20))
    assert list(made.token_ids) == ids
    assert dict(usage.forwards)["base"] == len(ids)


REFERENCES = (cascade.Reference("a", "b", True), cascade.Reference("c", "d", False))
SHORT = "{reference_query}{reference_answer}{query}{answer}"


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (deal.KIND, deal.Deal(k=3, lookahead=4, beams=3, scorer="rule")),
        (reward_search.KIND, reward_search.RewardSearch("rule", k=4, sample=True)),
        (adaptive.KIND, adaptive.Adaptive(max_samples=6, wave=3, prune_at=4, threshold=1.0)),
        (adaptive.KIND, adaptive.Adaptive(max_samples=4, wave=3, self_eval="rule")),
        (revise.KIND, revise.Revise(chains=2, length=3)),
        (revise.KIND, revise.Revise(chains=2, length=3, scorer="rule")),
        (agents.KIND, agents.Agents(generator="small", verify="{answer}?", refine="{answer}{review}")),
        (tree_prompt.KIND, tree_prompt.TreePrompt()),
        (selective.KIND, selective.Selective("rule", 1.5)),
        (cascade.KIND, cascade.Cascade("small", REFERENCES, compare=SHORT)),
        (step_speculative.KIND, step_speculative.StepSpeculative("small", "rule", separator=" ", threshold=1.5)),
        (step_speculative.KIND, step_speculative.StepSpeculative("small", "rule", "gsi", step_tokens=3, beta=1.0, u=1)),
        (nudging_search.KIND, nudging_search.NudgingSearch("small", 0.5)),
    ],
    ids=lambda it: it.name if isinstance(it, SearchKind) else "",
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_search_gives_its_text_again_for_a_seed_and_frees_all(
    engine: Engine, kind: SearchKind, params: Any, seed: int
) -> None:
    sampling = Sampling(max_tokens=24, seed=seed)
    first, usage = answered(engine, kind, params, sampling)
    again, _ = answered(engine, kind, params, sampling)
    assert first.text == again.text
    assert usage.search is not None
    assert usage.search.candidates[0].text == first.text
    assert usage.search.exhausted is None


@pytest.mark.parametrize("kind", [deal, reward_search])
def test_nothing_but_the_model_where_the_reward_does_not_count(engine: Engine, kind: Any) -> None:
    params = deal.Deal(weight=0.0, scorer="rule") if kind is deal else reward_search.RewardSearch("rule", weight=0.0)
    greedy = Sampling(max_tokens=20, temperature=0.0)
    (plain,) = engine.generate(PROMPT, Program("plain", Policy((Term("base", Role("base")),))), greedy)
    assert answered(engine, kind.KIND, params, greedy)[0].token_ids == plain.token_ids


@pytest.mark.parametrize("kind", [deal, reward_search])
def test_without_branches_a_text_goes_on_as_the_model_would(engine: Engine, kind: Any) -> None:
    params = deal.Deal(k=3, scorer="rule") if kind is deal else reward_search.RewardSearch("rule", k=3)
    greedy = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
    made, usage = answered(engine, kind.KIND, params, greedy, max_candidates=10)
    assert usage.search is not None
    assert (len(made.token_ids), usage.search.exhausted) == (20, "max_candidates")
    said = list(made.token_ids)
    assert all(best(said[:i], 1)[0][0] == said[i] for i in range(5, 20))  # ten branches are three tokens at most


def test_nudging_never_is_the_base_alone(engine: Engine) -> None:
    for penalty in (1.0, 1.3):
        greedy = Sampling(max_tokens=20, temperature=0.0, repetition_penalty=penalty)
        (plain,) = engine.generate(PROMPT, Program("plain", Policy((Term("base", Role("base")),))), greedy)
        params = nudging_search.NudgingSearch("small", 0.0)
        assert answered(engine, nudging_search.KIND, params, greedy)[0].token_ids == plain.token_ids


def test_nudging_always_is_the_nudger_alone(engine: Engine) -> None:
    greedy = Sampling(max_tokens=20, temperature=0.0)
    (plain,) = engine.generate(PROMPT, Program("plain", Policy((Term("base", Role("small")),))), greedy)
    made, _ = answered(engine, nudging_search.KIND, nudging_search.NudgingSearch("small", 1.0), greedy)
    assert made.text == plain.text


def test_answers_that_leave_no_room_for_another_are_kept(engine: Engine) -> None:
    """Texts of 512 tokens at most: the fourth prompt, with three answers in it, is too long."""
    sampling = Sampling(max_tokens=200, seed=1, logit_bias=((EOS, -100.0),))
    made, usage = answered(engine, revise.KIND, revise.Revise(length=4, request="Again."), sampling)
    assert usage.search is not None
    assert [len(text) for text in dict(usage.search.details)["chains"][0]] == [200, 200, 73]
    assert (made.finish_reason, len(usage.search.candidates)) == ("length", 3)
    params = agents.Agents(verify="{answer}" * 3, refine="{answer}{review}")
    made, usage = answered(engine, agents.KIND, params, sampling)
    assert usage.search is not None
    assert [each.note for each in usage.search.candidates] == ["not refined"]


def test_token_ids_cannot_be_rewritten(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="not token ids"):
        answered(engine, revise.KIND, revise.Revise(), Sampling(max_tokens=5), (1, 2, 3))


# -- what is fed as text ---------------------------------------------------------------------------------------------


def test_text_goes_on_in_the_middle_of_a_line() -> None:
    """A tokenizer that writes a space before every text writes none into one that goes on."""
    tokenizer = pieces()
    base = TableModel("base", random_table(3, width=len(tokenizer)), memory=4)
    engine = Engine({"base": Hosted(base, TextModel("base", tokenizer), 4096)}, EngineConfig(block_size=4))
    told: dict[str, Any] = {}

    def run(it: Search, _: Any) -> Steps:
        yield Feed(it.root, "a")
        told["first"] = list(it.root.tokens)
        yield Feed(it.root, "b")
        yield Feed(it.root, " a")
        told["fed"] = list(it.root.tokens)
        told["probe"] = yield Probe(it.root, "\n1", (" +", " -"))
        return Outcome([Candidate(it.root)])

    kind = SearchKind("test-text", "", Empty, run)
    answered(engine, kind, Empty(), Sampling(max_tokens=20, ignore_eos=True), "b")
    id_of = tokenizer.convert_tokens_to_ids
    assert told["first"] == [id_of("▁a")], "an answer's first word as the model writes it"
    assert told["fed"] == id_of(["▁a", "b", "▁a"])
    row = torch.log_softmax(base.row([*id_of(["▁b", "▁a", "b", "▁a", "<0x0A>", "1"])]), 0)
    assert told["probe"] == pytest.approx([float(row[id_of(token)]) for token in ("▁+", "▁-")], abs=1e-5)


def test_the_likelihood_of_a_text_does_not_depend_on_its_steps() -> None:
    tokenizer = merges()
    base = TableModel("base", random_table(4, width=len(tokenizer)), memory=4)
    engine = Engine({"base": Hosted(base, TextModel("base", tokenizer), 4096)}, EngineConfig(block_size=4))
    steps = ("a b\n", "\n a\n", " b the", " the")
    ids, answer = tokenizer.encode("ab", add_special_tokens=False), tokenizer.encode("".join(steps))
    assert answer != [id for step in steps for id in tokenizer.encode(step)], "tokens lie across the steps' ends"
    texts = (("ab", steps), ("ab", ("".join(steps),)), ("ab", ()))
    params = score_texts.ScoreTexts(texts, ScorerParams(rule="likelihood"), writer="base")
    engine._host.make_scorer = engine.served.make_scorer
    _, usage = answered(engine, score_texts.KIND, params, Sampling(max_tokens=1), "ab")
    assert usage.search is not None
    rows = [torch.log_softmax(base.row([*ids, *answer[:i]]), 0) for i in range(len(answer))]
    want = sum(float(row[id]) for row, id in zip(rows, answer, strict=True))
    assert [each.score for each in usage.search.candidates] == pytest.approx([want, want, 0.0], abs=1e-3)
