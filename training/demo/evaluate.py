"""Greedy answers of a member, or of a weighted sum of members' logits, and their scores.

Plain batched forwards that recompute the whole sequence for each new token: slow, obvious, and independent of the
server, so that the server can be checked against it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from training.chats import Message, encode, render
from training.demo.questions import Question
from training.demo.tokenizer import PLAIN_TEMPLATE


@dataclass(frozen=True, slots=True)
class Member:
    """A loaded member: weights in fp32, tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @property
    def end(self) -> int:
        """The id that ends an answer."""
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the model's own view of a chat: its chat template where it has one, else the plain view."""
        template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        return encode(self.tokenizer, render(self.tokenizer, messages, prompt=True, template=template))


def load_member(directory: Path) -> Member:
    """Read a member's directory; weights are computed with in fp32."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return Member(model, tokenizer)


Mix = Sequence[tuple[float, Member]]
"""Weights and members: logits are the weighted sum, each on its own view of the prompt and the shared answer so far."""


def proxy_tuned(base: Member, expert: Member, anti: Member, alpha: float = 1.0) -> Mix:
    """Proxy-tuning (Liu et al. 2024, eq. 1): z_base + alpha (z_expert - z_anti)."""
    return ((1.0, base), (alpha, expert), (-alpha, anti))


@torch.no_grad()
def next_logits(member: Member, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits after each sequence: [sequences, vocab] fp32.

    Padding goes to the right, where a causal model does not look.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])  # [sequences]
    ids = torch.full((len(sequences), int(lengths.max())), member.end)  # [sequences, longest]
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    hidden = member.model.model(input_ids=ids, use_cache=False).last_hidden_state  # [sequences, longest, hidden]
    last = hidden[torch.arange(len(sequences)), lengths - 1]  # [sequences, hidden]
    logits: Tensor = member.model.lm_head(last)
    return logits.float()


def greedy(mix: Mix, chats: Sequence[Sequence[Message]], limit: int = 96) -> list[str]:
    """The greedy answer to each chat, up to the end token or `limit` tokens."""
    prompts = [[member.prompt(chat) for chat in chats] for _, member in mix]
    answers: list[list[int]] = [[] for _ in chats]
    tokenizer, end = mix[0][1].tokenizer, mix[0][1].end
    going = list(range(len(chats)))
    for _ in range(limit):
        if not going:
            break
        logits = torch.stack(
            [
                weight * next_logits(member, [own[i] + answers[i] for i in going])
                for (weight, member), own in zip(mix, prompts, strict=True)
            ]
        ).sum(0)  # [going, vocab]
        chosen = logits.argmax(-1).tolist()
        for i, token in zip(going, chosen, strict=True):
            answers[i].append(token)
        going = [i for i, token in zip(going, chosen, strict=True) if token != end]
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of those asked, in all and by detail."""

    right: int
    asked: int
    details: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.asked


def score(mix: Mix, asked: Sequence[Question], batch: int = 50) -> tuple[Score, list[str]]:
    """Ask, grade and count; the answers come back too, in the order of the questions."""
    answers: list[str] = []
    for first in range(0, len(asked), batch):
        answers += greedy(mix, [question.messages for question in asked[first : first + batch]])
    details: dict[str, tuple[int, int]] = {}
    for question, answer in zip(asked, answers, strict=True):
        right, count = details.get(question.detail, (0, 0))
        details[question.detail] = (right + question.right(answer), count + 1)
    return Score(sum(right for right, _ in details.values()), len(asked), details), answers


@torch.no_grad()
def bits_per_byte(member: Member, texts: Sequence[str]) -> float:
    """Bits needed for each UTF-8 byte of `texts`, each read after an end token and followed by one (counted)."""
    nats, size = 0.0, 0
    for text in texts:
        ids = torch.tensor([[member.end, *member.tokenizer(text)["input_ids"], member.end]])  # [1, length]
        logits = member.model(input_ids=ids, use_cache=False).logits.float()  # [1, length, vocab]
        nats += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        size += len(text.encode())
    return nats / math.log(2) / size
