"""A reward weighs the likeliest next tokens (ARGS).

Khanov et al. 2024, ARGS: Alignment as Reward-Guided Search, arXiv:2402.01694, section 3 (greedy and stochastic).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from decoding.core import Sampling, says
from decoding.scorers.spec import ScorerSpec
from decoding.search.common import MAX_CANDIDATES, concluded, drop, spent, whole
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Feed, Fork, Run, Score, Search, Steps, Top, Until
from decoding.strategies.spec import finite


@dataclass(frozen=True, slots=True)
class RewardSearch:
    """Parameters of `reward_search`."""

    scorer: ScorerSpec = field(metadata=says("The reward of a text."))
    k: int = field(default=10, metadata=says("The likeliest next tokens that are tried."))
    weight: float = field(default=1.0, metadata=says("Of the reward against the log-probability."))
    sample: bool = field(
        default=False, metadata=says("Draw the token by the sums, at the request's temperature, not the best one.")
    )


def run(search: Search, params: RewardSearch) -> Steps:
    """At each token: of the k likeliest, the one with the greatest lp + weight reward(prefix and token)."""
    branch, value, rewards = search.root, None, list[float]()
    while not branch.finished and not search.exhausted:
        nexts = [entry for entry in (yield Top(branch, params.k)) if entry[1] > -math.inf]
        children: list[Branch] = yield Fork(branch, len(nexts))
        if not children:
            break
        yield [Feed(child, [token]) for child, (token, _) in zip(children, nexts)]
        rewards = [(found or [math.nan])[-1] for found in (yield [Score(child, params.scorer) for child in children])]
        sums = [lp + params.weight * reward for (_, lp), reward in zip(nexts, rewards)]
        values = [-math.inf if math.isnan(each) else each for each in sums]
        chosen = choose(search, params, values, [token for token, _ in nexts])
        yield from drop([branch, *(child for child in children if child is not children[chosen])])
        branch = children[chosen]
        value = None if math.isnan(rewards[chosen]) else rewards[chosen]
        search.progress(f"token {len(branch.tokens)}: reward {rewards[chosen]:g}", tokens=len(branch.tokens))
    if not branch.finished and not spent(search):  # no more forks: as it would go on
        yield Run(branch, Until(step=False))
    return concluded(search, [Candidate(branch, value)])


def choose(search: Search, params: RewardSearch, values: list[float], tokens: list[int]) -> int:
    """The index of the greatest value, ties to the lower id; with `sample` drawn from softmax(values / temperature)."""
    best = max(range(len(values)), key=lambda i: (values[i], -tokens[i]))
    if not params.sample or search.sampling.temperature == 0.0 or values[best] == -math.inf:
        return best
    highest, t = values[best], search.sampling.temperature
    weights = [1.0 if value == highest else math.exp((value - highest) / t) for value in values]
    return search.rng.choices(range(len(values)), weights)[0]


def check(params: RewardSearch, _sampling: Sampling) -> None:
    """Raises BadRequest for parameters out of range."""
    whole("k", params.k, 1, MAX_CANDIDATES)
    finite("weight", params.weight)


KIND = SearchKind(
    "reward_search",
    "Of the likeliest next tokens, the one that a reward model likes best with what came before.",
    RewardSearch,
    run,
    "argmax lp(v) + weight · reward(y_<t, v) over the k likeliest v",
    check,
    scorers=lambda params: (params.scorer,),
    by_rank=True,
    abreast=lambda params: params.k,
    answers=lambda _params: 1,
    needs=("scorer: a reward of texts",),
    paper="Khanov et al. 2024, ARGS, arXiv:2402.01694",
)
