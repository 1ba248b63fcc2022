"""Searches in prompts of their own: three agents in turn, and a tree that the model writes out."""

from __future__ import annotations

import pytest

from decoding.core import BadRequest, Sampling
from decoding.search import agents, tree_prompt
from decoding.search.agents import Agents
from decoding.search.tree_prompt import BREADTH, DEPTH, TreePrompt
from decoding.text import Chat, Prompt
from tests.scripted import Script, ScriptedSearch


def speakers(model: str, prompt: Prompt) -> Script:
    said = {"base": "own", "g": "try", "v": "bad", "r": "good"}[model]
    return Script(go=lambda text, index, greedy: said + "$")


def test_each_agent_is_shown_what_the_others_said() -> None:
    search = ScriptedSearch(Script(of=speakers), prompt="Why?")
    params = Agents("g", "v", "r", verify="{question} {answer}: ?", refine="{question} {answer} {review}: !")
    outcome = search.drive(agents.run(search, params))
    assert search.calls == [
        [("drop", "")],
        [("open", "g", "Why?")],
        [("run", "", "try")],
        [("open", "v", "Why? try: ?")],
        [("run", "", "bad")],
        [("drop", "bad")],
        [("open", "r", "Why? try bad: !")],
        [("run", "", "good")],
    ]
    assert [(c.branch.text, c.note) for c in outcome.candidates] == [("good", ""), ("try", "not refined")]
    assert outcome.details == {"answer": "try", "review": "bad"}
    assert search.live == {c.branch for c in outcome.candidates}
    assert agents.KIND.models(params) == ("g", "v", "r")


def test_the_requests_own_model_takes_every_part_that_no_other_has() -> None:
    search = ScriptedSearch(Script(of=speakers), prompt=Chat(({"role": "user", "content": "Why?"},)))
    search.drive(agents.run(search, Agents()))
    assert search.calls[0] == [("run", "", "own")]  # on the root
    opened = [call for batch in search.calls for call in batch if call[0] == "open"]
    assert [name for _, name, _ in opened] == [None, None]
    assert all(isinstance(prompt, Chat) and "Why?" in prompt.messages[0]["content"] for _, _, prompt in opened)


def test_a_budget_leaves_the_answer_that_there_is() -> None:
    search = ScriptedSearch(Script(of=speakers), max_tokens=4)
    outcome = search.drive(agents.run(search, Agents(verifier="v", refiner="r")))
    assert [c.branch.text for c in outcome.candidates] == ["own"]
    assert outcome.reason == "The search was cut short: 'max_total_tokens' is used up."
    search = ScriptedSearch(Script(of=speakers), max_tokens=8)
    outcome = search.drive(agents.run(search, Agents(verifier="v", refiner="r")))
    assert [c.branch.text for c in outcome.candidates] == ["own", "go"]


@pytest.mark.parametrize(("context", "said"), [(6, ["own"]), (11, ["own"]), (15, ["good", "own"])])
def test_what_does_not_fit_leaves_the_answer_that_there_is(context: int, said: list[str]) -> None:
    search = ScriptedSearch(Script(of=speakers), context=context)
    params = Agents(None, "v", "r", verify="{question} {answer}: ?", refine="{question} {answer} {review}: !")
    outcome = search.drive(agents.run(search, params))
    assert [c.branch.text for c in outcome.candidates] == said
    assert outcome.reason == ("" if len(said) == 2 else agents.TOO_LONG)
    assert search.live == {c.branch for c in outcome.candidates}


@pytest.mark.parametrize(
    ("params", "param"), [(Agents(verify="Check it."), "verify"), (Agents(refine="{answer}"), "refine")]
)
def test_agents_refuse_templates_without_places(params: Agents, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        agents.check(params, Sampling())
    assert refused.value.param == param
    agents.check(Agents(), Sampling())


@pytest.mark.parametrize("mode", ["bfs", "dfs"])
def test_a_tree_is_written_out_and_its_last_answer_taken(mode: str) -> None:
    text = "I end with 'Final answer:'. 1. no 2. yes\nFinal answer: 42 \n"
    search = ScriptedSearch(Script(go=lambda *_: text + "$"))
    outcome = search.drive(tree_prompt.run(search, TreePrompt(mode)))  # type: ignore[arg-type]
    ((_, name, prompt),) = search.calls[1]
    assert name is None
    assert prompt.startswith({"bfs": BREADTH, "dfs": DEPTH}[mode])
    assert prompt.endswith("'Final answer:' and after it the answer alone.\n\nQ")
    (only,) = outcome.candidates
    assert (only.text, only.answer, only.note) == ("42", "42", "")
    assert outcome.details == {"text": text}
    assert search.live == {only.branch}


@pytest.mark.parametrize("text", ["no end", "Final answer: "])
def test_a_tree_without_an_answer_is_answered_whole(text: str) -> None:
    search = ScriptedSearch(Script(go=lambda *_: text + "$"))
    outcome = search.drive(tree_prompt.run(search, TreePrompt()))
    assert (outcome.candidates[0].text, outcome.candidates[0].note) == (None, "no final answer")
    assert "Final answer:" in outcome.reason


def test_a_tree_needs_a_marker() -> None:
    with pytest.raises(BadRequest) as refused:
        tree_prompt.check(TreePrompt(marker=" "), Sampling())
    assert refused.value.param == "marker"
