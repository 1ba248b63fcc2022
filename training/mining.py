"""Labels for a judge head without people: does a draft that differs from the target's token change the final answer?

The greedy pass of AutoJudge (arXiv:2504.20039): walk along the target's greedy answer to the first place where the
drafter would have written another token, put that token in, let the target finish greedily. If the final answer stays
what the target's own was, the draft is unimportant, and the walk goes on along the new text; else it is important, and
the walk goes on along the old one. Many prompts walk at once.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.chats import Ids
from training.measure import padded

Finish = Callable[[Sequence[Ids], Sequence[int]], list[Ids]]
"""(prefixes, most tokens for each) -> the target's greedy continuation of each prefix."""

Draft = Callable[[Sequence[tuple[Ids, Ids]]], list[list[int]]]
"""(prompt, answer) pairs -> for each answer token, the drafter's greedy choice in its place."""

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def last_number(text: str) -> str | None:
    """The last number in `text`, without thousands separators; None if there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def whole_text(text: str) -> str | None:
    """The text itself, for tasks whose whole answer counts; None if it is blank."""
    return text.strip() or None


GRADERS: dict[str, Callable[[str], str | None]] = {"last-number": last_number, "text": whole_text}


@dataclass(frozen=True, slots=True)
class Answers:
    """How token ids become a final answer, and where an answer ends."""

    decode: Callable[[Ids], str]
    grader: Callable[[str], str | None]
    ends: frozenset[int]
    stop: str | None = None
    max_tokens: int = 128

    def final(self, ids: Ids) -> str | None:
        """The final answer in what was written before the stop string."""
        text = self.decode(ids)
        return self.grader(text if self.stop is None else text.partition(self.stop)[0])

    def cut(self, ids: Ids) -> Ids:
        """Up to the first end token, the token that completes the stop string, or `max_tokens`."""
        ended = next((i + 1 for i, token in enumerate(ids) if token in self.ends), len(ids))
        ids = ids[: min(ended, self.max_tokens)]
        if self.stop is None:
            return ids
        stop = self.stop
        places = range(len(ids) + 1)
        return ids[: bisect.bisect_left(places, True, key=lambda length: stop in self.decode(ids[:length]))]

    def over(self, ids: Ids) -> bool:
        """Whether nothing is to follow `ids`."""
        ended = bool(ids) and ids[-1] in self.ends
        return ended or len(ids) >= self.max_tokens or (self.stop is not None and self.stop in self.decode(ids))


@dataclass(frozen=True, slots=True)
class Label:
    """`context` ends with the draft token; `accept` if it changed no final answer."""

    context: Ids
    accept: bool


@dataclass(slots=True)
class Walk:
    """One prompt on its way along the target's answer; everything before place `at` is settled."""

    prompt: Ids
    text: Ids
    wanted: str | None
    at: int = 0
    drafts: list[int] | None = None  # the drafter's choices along `text`
    labels: list[Label] = field(default_factory=list)

    def step(self) -> int | None:
        """Move to the next place where the drafter differs, and return its token there; None at the end."""
        assert self.drafts is not None
        while self.at < len(self.text):
            if self.drafts[self.at] != self.text[self.at]:
                return self.drafts[self.at]
            self.at += 1
        return None


def mine(prompts: Sequence[Ids], answers: Answers, finish: Finish, draft: Draft) -> list[Walk]:
    """Walk all prompts to their ends; the labels are in the walks, in the order of the prompts.

    Prompts whose own answer has no final answer in it get none: nothing says what must stay.
    """
    greedy = finish(prompts, [answers.max_tokens] * len(prompts))
    walks = [Walk(p, text := answers.cut(ids), answers.final(text)) for p, ids in zip(prompts, greedy, strict=True)]
    going = [walk for walk in walks if walk.wanted is not None]
    while going:
        changed = [walk for walk in going if walk.drafts is None]
        for walk, drafts in zip(changed, draft([(walk.prompt, walk.text) for walk in changed]), strict=True):
            walk.drafts = drafts
        tried = [(walk, token) for walk in going if (token := walk.step()) is not None]
        texts = _substitute(tried, answers, finish)
        for (walk, token), text in zip(tried, texts, strict=True):
            accept = answers.final(text) == walk.wanted
            walk.labels.append(Label((*walk.prompt, *walk.text[: walk.at], token), accept))
            walk.at += 1
            if accept:
                walk.text, walk.drafts = text, None
        going = [walk for walk, _ in tried]
    return walks


def _substitute(tried: Sequence[tuple[Walk, int]], answers: Answers, finish: Finish) -> list[Ids]:
    """Each walk's text with the draft in its place, finished by the target."""
    heads = [(*walk.text[: walk.at], token) for walk, token in tried]
    open_ = [i for i, head in enumerate(heads) if not answers.over(head)]
    room = [answers.max_tokens - len(heads[i]) for i in open_]
    tails = finish([tried[i][0].prompt + heads[i] for i in open_], room)
    for i, tail in zip(open_, tails, strict=True):
        heads[i] += tail
    return [answers.cut(head) for head in heads]


@torch.no_grad()
def greedy_choices(model: nn.Module, pairs: Sequence[tuple[Ids, Ids]], batch: int = 32) -> list[list[int]]:
    """A model's greedy token in the place of each answer token, given everything before it."""
    found: list[list[int]] = []
    device = next(model.parameters()).device
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        ids = padded([prompt + answer for prompt, answer in part], device)  # [part, longest]
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1)  # [part, longest]
        found += [
            best[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist()
            for row, (prompt, answer) in enumerate(part)
        ]
    return found


@torch.no_grad()
def last_hidden(model: PreTrainedModel, contexts: Sequence[Ids], batch: int = 32) -> Tensor:
    """The input of the output embeddings at each context's last token: [contexts, hidden] fp32.

    It is what a verify pass computes at a draft's own position: taken where the head takes it, so that whatever the
    model does between its last norm and its head is in it.
    """
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))  # like lengths together
    kept: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    rows: list[Tensor] = []
    try:
        for first in range(0, len(order), batch):
            part = [contexts[i] for i in order[first : first + batch]]
            ids = padded(part, next(model.parameters()).device)
            ends = [len(context) - 1 for context in part]
            places = sorted(set(ends))
            model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(places, device=ids.device))
            which = [places.index(end) for end in ends]
            rows.append(kept.pop()[torch.arange(len(part)), which].float().cpu())  # [part, hidden]
    finally:
        hook.remove()
    found = torch.cat(rows)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return found[back]
