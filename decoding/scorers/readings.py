"""Readings: how scorer models score. What a model is shown is in `renderings`; here is what its rows mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from decoding.core import BadRequest, ModelLoadError
from decoding.scorers.pages import Frame, Tongue, frame, single_tokens
from decoding.scorers.renderings import (
    JUDGE_QUESTION,
    SCORE_TOKENS,
    SELF_QUESTION,
    STEP_RENDERINGS,
    answered,
    asked,
    guarded,
    principles_text,
    replied,
    self_asked,
)
from decoding.scorers.spec import Hypothesis, Rendered
from decoding.text import Prompt

DIGITS = tuple("0123456789")


class Head(Protocol):
    """A classification head as a runner applies it: rows are its `outputs` numbers.

    gate: hidden states [n, H] -> weights of the objectives [n, outputs], or None. transform: [outputs, outputs] or
    None; objectives are `row @ transform` (ArmoRM's correction for verbosity), of the row itself without one.
    """

    @property
    def outputs(self) -> int: ...
    @property
    def gate(self) -> Callable[[Tensor], Tensor] | None: ...
    @property
    def transform(self) -> Tensor | None: ...


class _Framed:
    """The frame of the last prompt, made once: a search scores many answers to one."""

    def __init__(self, make: Callable[[Prompt], Frame]) -> None:
        self._make, self._prompt, self._frame = make, object(), Frame((), -1)

    def __call__(self, prompt: Prompt) -> Frame:
        if prompt is not self._prompt:
            self._frame, self._prompt = self._make(prompt), prompt
        return self._frame


class Reward:
    """A reward model: its head's number at the end of the conversation that the answer closes.

    Several objectives: sum_i w_i (row @ transform)_i, w the request's weights, else the head's gate at the hidden state
    that ends the prompt's last turn (Wang et al. 2024, ArmoRM, arXiv:2406.12845, section 3.2). `principles`: what it
    judges by, shown before the conversation (Sun et al. 2023, SALMON, arXiv:2310.05910). Raises BadRequest for weights
    that do not fit the head.
    """

    one_number = True

    def __init__(
        self,
        model: str,
        tongue: Tongue,
        head: Head,
        weights: Sequence[float] | None = None,
        principles: Sequence[str] = (),
    ) -> None:
        if weights is not None and len(weights) != head.outputs:
            raise BadRequest(
                f"The reward model '{model}' has {head.outputs} objectives, but there are {len(weights)} weights.",
                "weights",
            )
        if weights is None and head.gate is None and head.outputs != 1:
            raise BadRequest(
                f"The reward model '{model}' has {head.outputs} objectives; give each a weight in 'weights'.", "weights"
            )
        self.model, self.hidden = model, weights is None and head.gate is not None
        self._tongue, self._head, self._weights = tongue, head, weights
        system = principles_text(principles) if principles else ""
        self._frame = _Framed(lambda prompt: frame(tongue, prompt, system))

    def render(self, text: Hypothesis) -> Rendered:
        return answered(self._tongue, self._frame(text.prompt), text, self.hidden)

    def read(self, rows: Tensor, hidden: Tensor | None) -> list[float]:
        objectives = rows[-1].float()  # [outputs]
        if self._head.transform is not None:
            objectives = objectives @ self._head.transform.to(objectives)
        if self._weights is not None:
            return [float(objectives @ torch.tensor(self._weights).to(objectives))]
        if self._head.gate is None:
            return [float(objectives)]
        assert hidden is not None, "a gated head reads hidden states"
        return [float(self._head.gate(hidden[:1])[0].float().to(objectives.device) @ objectives)]


class StepReward:
    """A process reward model: the probability of "good" at each step's mark.

    A head with one number goes through a sigmoid, one with two through a softmax whose second class is good; without
    a head, P(good) / (P(good) + P(bad)) of two `score_tokens`. Raises ModelLoadError for a model that fits none.
    """

    one_number = False
    hidden = False

    def __init__(
        self,
        model: str,
        tongue: Tongue,
        width: int,
        head: Head | None = None,
        rendering: str | None = None,
        marker: str | None = None,
        score_tokens: Sequence[str] = (),
    ) -> None:
        rendering = rendering or "generic"
        if rendering not in STEP_RENDERINGS:
            known = ", ".join(STEP_RENDERINGS)
            raise ModelLoadError(f"The rendering of '{model}' is '{rendering}'; it may be {known}.")
        if head is not None and head.outputs not in (1, 2):
            raise ModelLoadError(f"The head of '{model}' has {head.outputs} outputs; a step is scored by 1 or 2.")
        tokens = tuple(score_tokens) or SCORE_TOKENS.get(rendering, ())
        if head is None and len(tokens) != 2:
            raise ModelLoadError(f"'{model}' has no head, so its score_tokens must be two tokens: good, bad.")
        self.model, self._tongue, self._marker = model, tongue, marker
        self._show = STEP_RENDERINGS[rendering]
        self._tokens = None if head is not None else list(single_tokens(tongue, tokens, width))

    def render(self, text: Hypothesis) -> Rendered:
        return self._show(self._tongue, text, self._marker)

    def read(self, rows: Tensor, hidden: Tensor | None) -> list[float]:
        rows = rows.float()
        if self._tokens is not None:
            return _floats(rows[:, self._tokens].softmax(-1)[:, 0])
        return _floats(rows[:, 0].sigmoid() if rows.shape[1] == 1 else rows.softmax(-1)[:, 1])


class Judge:
    """A causal model that is asked about the answer: sum_i i P(i) / sum_j P(j) over the digits 0 to 9.

    (Ye and Ng 2024, Self-J, arXiv:2409.00935, reads judgements so.) Raises BadRequest for a model whose vocabulary has
    no single tokens for the digits, and for a question without {answer}.
    """

    one_number = True
    hidden = False

    def __init__(self, model: str, tongue: Tongue, width: int, question: str | None = None) -> None:
        question = question or JUDGE_QUESTION
        check_question(question)
        try:
            self._digits = list(single_tokens(tongue, DIGITS, width))
        except ModelLoadError as error:
            raise BadRequest(f"'{model}' cannot be a judge: {error}", "model") from error
        self.model, self._tongue = model, tongue
        self._frame = _Framed(lambda prompt: asked(tongue, question, tongue.transcript(prompt)))

    def render(self, text: Hypothesis) -> Rendered:
        return replied(self._tongue, self._frame(text.prompt), text)

    def read(self, rows: Tensor, hidden: Tensor | None) -> list[float]:
        p = rows[-1].float()[self._digits].softmax(-1)  # [10]
        return [float(p @ torch.arange(10.0, device=p.device))]


def check_question(question: str, param: str | None = "question") -> None:
    """Raises BadRequest unless the question has one place for the answer."""
    if question.count("{answer}") != 1:
        raise BadRequest(
            "'question' must hold {answer} just once, where the answer is to stand, and may hold {prompt}.", param
        )


class SelfEvaluation:
    """A model that is asked whether the answer is right: P(yes) / (P(yes) + P(no)).

    score_tokens: (good, bad) in place of yes and no, of which first tokens count; or one token, whose probability
    among all tokens counts.
    """

    one_number = True
    hidden = False

    def __init__(
        self,
        model: str,
        tongue: Tongue,
        width: int,
        score_tokens: Sequence[str] = (),
        question: str | None = None,
    ) -> None:
        if len(score_tokens) > 2:
            raise ModelLoadError(
                f"The score_tokens of '{model}' are {len(score_tokens)}; it has one or two: good, bad."
            )
        if score_tokens:
            self._tokens = list(single_tokens(tongue, score_tokens, width))
        else:
            self._tokens = first_tokens(model, tongue, ("yes", "no"), width)
        self.model, self._tongue = model, tongue
        self._frame = _Framed(functools.partial(self_asked, tongue, question or SELF_QUESTION))

    def render(self, text: Hypothesis) -> Rendered:
        return replied(self._tongue, self._frame(text.prompt), text)

    def read(self, rows: Tensor, hidden: Tensor | None) -> list[float]:
        row = rows[-1].float()
        if len(self._tokens) == 1:
            return [float(row.softmax(-1)[self._tokens[0]])]
        return [float(row[self._tokens].softmax(-1)[0])]


class Guard:
    """A classifier that writes "safe" or "unsafe" (Inan et al. 2023, Llama Guard, arXiv:2312.06674): P(safe).

    Normalised over the two words' first tokens where the verdict comes. taxonomy: categories of the request.
    """

    one_number = True
    hidden = False

    def __init__(self, model: str, tongue: Tongue, width: int, taxonomy: str | None = None) -> None:
        self.model, self._tongue = model, tongue
        self._frame = _Framed(functools.partial(guarded, tongue, taxonomy))
        ends = self._frame("?").tail
        space = " " if tongue.writes_space and not ends[-1:].isspace() else ""
        self._verdicts = first_tokens(model, tongue, (f"{space}safe", f"{space}unsafe"), width)

    def render(self, text: Hypothesis) -> Rendered:
        return replied(self._tongue, self._frame(text.prompt), text)

    def read(self, rows: Tensor, hidden: Tensor | None) -> list[float]:
        return [float(rows[-1].float()[self._verdicts].softmax(-1)[0])]


def first_tokens(model: str, tongue: Tongue, words: Sequence[str], width: int) -> list[int]:
    """The ids that the words begin with. Raises ModelLoadError if two begin with the same one."""
    ids = [tongue.continued(word)[0] for word in words]
    if len(set(ids)) < len(ids) or max(ids) >= width:
        told = " and ".join(f"'{word.strip()}'" for word in words)
        raise ModelLoadError(
            f"'{model}' cannot score texts: {told} begin with the same token, or with none it predicts."
        )
    return ids


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values]
