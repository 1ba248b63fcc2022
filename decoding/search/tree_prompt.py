"""The model searches in its own text, told how by a system prompt (autonomous tree search).

Zhang et al. 2023, Autonomous Tree-search Ability of Large Language Models, arXiv:2310.10686. The prompts are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from decoding.core import BadRequest, Sampling, says
from decoding.search.common import concluded, drop
from decoding.search.prompts import instructed
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Open, Run, Search, Steps

BREADTH = """Solve the task by a breadth-first search that you write out. Level 1: list a few different first steps \
and number them. For each, say in a sentence how promising it is, and mark those that cannot work. Next \
level: continue each of the promising ones by one step in a few ways, numbered under their parents. Go \
on level by level until one of them reaches a solution, and check it."""
DEPTH = """Solve the task by a depth-first search that you write out. Take the most promising first step and go on \
from it step by step. After each step say whether the solution can still be reached. When it cannot, say \
so, go back to the last step that left another choice, and take that. Go on until one line reaches a \
solution, and check it."""
LAST = "Then write, on a line of its own, '{marker}' and after it the answer alone."


@dataclass(frozen=True, slots=True)
class TreePrompt:
    """Parameters of `tree_prompt`."""

    mode: Literal["bfs", "dfs"] = field(default="bfs", metadata=says("Breadth first or depth first."))
    marker: str = field(default="Final answer:", metadata=says("What the answer stands behind."))


def run(search: Search, params: TreePrompt) -> Steps:
    """One text under the system prompt; the answer is what follows its last marker."""
    yield from drop([search.root])
    how = BREADTH if params.mode == "bfs" else DEPTH
    told = f"{how} {LAST.replace('{marker}', params.marker)}"
    branch: Branch = yield Open(instructed(search.prompt, told))
    yield Run(branch)
    search.progress("the search is written out", tokens=len(branch.tokens))
    answer = branch.text.rpartition(params.marker)[2].strip() if params.marker in branch.text else ""
    candidate = Candidate(branch, text=answer or None, answer=answer or None, note="" if answer else "no final answer")
    outcome = concluded(search, [candidate], details={"text": branch.text})
    if answer or outcome.reason:
        return outcome
    return replace(outcome, reason=f"There is no answer behind a '{params.marker}': the whole text is answered.")


def check(params: TreePrompt, _sampling: Sampling) -> None:
    """Raises BadRequest for an empty marker."""
    if not params.marker.strip():
        raise BadRequest("'marker' must be a text that the answer stands behind.", "marker")


KIND = SearchKind(
    "tree_prompt",
    "A system prompt has the model search, breadth or depth first, in its own text.",
    TreePrompt,
    run,
    "y ~ P(. | search prompt, x); the answer behind the last marker",
    check,
    answers=lambda _params: 1,
    paper="Zhang et al. 2023, arXiv:2310.10686",
)
