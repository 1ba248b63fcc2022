"""What rows say besides the tokens that are drawn: log-probs of prompts, of fed ids, and what goals of searches ask."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from decoding.events import TokenLogprob
from decoding.plan import Sample
from decoding.sampling import Position, hard_mask, token_logprobs
from decoding.state import Goal, Group, Sequence, Told


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a sequence, log-probs of `tokens`, one for each row of z from `row` on, with the `top` best beside each."""

    sequence: Sequence
    row: int
    tokens: Seq[int]
    top: int = 0

    @property
    def rows(self) -> range:
        """Of z."""
        return range(self.row, self.row + len(self.tokens))


def prompts_asked(samples: Seq[Sample]) -> list[Asked]:
    """The prompt ids that the samples' rows predict, of requests that ask for their log-probs."""
    found: list[Asked] = []
    row = 0
    for sample in samples:
        group, k = sample.sequence.group, sample.sequence.group.request.sampling.prompt_logprobs
        prompt = group.request.prompts[0]
        scored = min(sample.count, -1 - sample.first)  # rows that predict a prompt id
        if k is not None and group.prompt_logprobs is not None and scored > 0:
            at = len(prompt) + sample.first + 1
            found.append(Asked(sample.sequence, row, prompt[at : at + scored], k))
        row += sample.count
    return found


def fed_asked(samples: Seq[Sample]) -> list[Asked]:
    """The ids of outputs, of sequences with goals, that the samples' rows predict."""
    found: list[Asked] = []
    row = 0
    for sample in samples:
        output, first = sample.sequence.output, sample.first + 1
        if sample.sequence.goal is not None:
            skipped = max(0, -first)
            tokens = output[first + skipped : max(0, first + sample.count - sample.drafts)]
            if tokens:
                found.append(Asked(sample.sequence, row + skipped, tokens))
        row += sample.count
    return found


def goals_asked(samples: Seq[Sample]) -> list[tuple[Sequence, Goal, int]]:
    """Goals that ask for the row that predicts the next token, and which of z it is."""
    found: list[tuple[Sequence, Goal, int]] = []
    row = 0
    for sample in samples:
        row += sample.count
        goal = sample.sequence.goal
        if goal is not None and sample.ends and goal.told is None and (goal.top or goal.choices):
            found.append((sample.sequence, goal, row - sample.drafts - 1))
    return found


def score_prompts(samples: Seq[Sample], z: torch.Tensor) -> list[tuple[Group, list[TokenLogprob]]]:
    """Log-probs of prompt ids under z's rows [S, W]."""
    found: list[tuple[Group, list[TokenLogprob]]] = []
    for each in prompts_asked(samples):
        lp = torch.log_softmax(z[each.row : each.row + len(each.tokens)], 1)
        found.append((each.sequence.group, token_logprobs(lp, each.tokens, each.top)))
    return found


def score_fed(samples: Seq[Sample], z: torch.Tensor) -> dict[Sequence, list[float]]:
    """Log-probs of fed ids under z's rows [S, W], before the processors edit them."""
    found: dict[Sequence, list[float]] = {}
    for each in fed_asked(samples):
        lp = torch.log_softmax(z[each.row : each.row + len(each.tokens), : each.sequence.group.width], 1)
        tokens = torch.tensor(each.tokens, device=z.device)
        found[each.sequence] = lp.gather(1, tokens[:, None])[:, 0].tolist()
    return found


def tell_goals(samples: Seq[Sample], z: torch.Tensor) -> dict[Sequence, Told]:
    """What goals want to know of z's rows [S, W], before the processors edit them."""
    found: dict[Sequence, Told] = {}
    for sequence, goal, row in goals_asked(samples):
        width = sequence.group.width
        lp = torch.log_softmax(z[row, :width], 0)
        choices = lp[torch.tensor(goal.choices, dtype=torch.int64, device=z.device)].tolist()
        mask = hard_mask(Position(sequence), width, z.device)
        if mask is not None:
            lp = lp.masked_fill(~mask, -torch.inf)
        best = token_logprobs(lp[None], [0], goal.top)[0].top if goal.top else ()
        found[sequence] = Told(possible(best), choices)
    return found


def possible(best: Seq[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of the likeliest tokens those that are not impossible."""
    return [(token, value) for token, value in best if value > -torch.inf]
