"""Texts for scorer models, written piece by piece: the ids of a longer text begin with those of a shorter one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from decoding.core import BadRequest, Message, ModelLoadError, View
from decoding.scorers.spec import Rendered
from decoding.text import Chat, Prompt, TextModel, content_text, shared_vocabulary

_EDGE = "\x0b"  # white space that no template writes: a template that drops it trims its messages


class Tongue:
    """A model's text side as its scorer uses it.

    asker: the text side of the model whose ids a token-id prompt is made of, None where such prompts cannot be read.
    """

    def __init__(self, text: TextModel, asker: TextModel | None = None) -> None:
        self.text, self._asker = text, asker
        first = text.tokenizer.convert_ids_to_tokens(text.encode("a", bos=False)[:1])
        self.writes_space = bool(first) and str(first[0])[:1] in ("▁", "Ġ")  # before every text, so before a piece too
        self._anchor = text.encode("\n", bos=False) if self.writes_space else []
        self.continued = functools.lru_cache(4096)(self._continued)

    @property
    def templated(self) -> bool:
        """Whether conversations are shown under the chat template."""
        return self.text.has_chat_template and self.text.view != "plain"

    def _continued(self, piece: str) -> tuple[int, ...]:
        """Ids of a piece that stands behind other text."""
        if not piece:
            return ()
        if self._anchor:
            ids = self.text.encode("\n" + piece, bos=False)
            if ids[: len(self._anchor)] == self._anchor:
                return tuple(ids[len(self._anchor) :])
        return tuple(self.text.encode(piece, bos=False))

    def token(self, token: str) -> int | None:
        """The id of a single token, written as it stands behind other text or as the vocabulary has it; else None."""
        ids = self.continued(token)
        if len(ids) == 1:
            return ids[0]
        known: dict[str, int] = self.text.tokenizer.get_vocab()
        return known.get(token)

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """A prompt as a conversation; a text is the user's turn."""
        if isinstance(prompt, Chat):
            return prompt.messages
        return ({"role": "user", "content": self.as_text(prompt)},)

    def as_text(self, prompt: str | tuple[int, ...]) -> str:
        """The text of a prompt that is no conversation. Raises BadRequest."""
        if isinstance(prompt, str):
            return prompt
        if self._asker is None:
            raise BadRequest(f"The scorer '{self.text.id}' needs a text prompt or messages, not token ids.", "prompt")
        return self._asker.decode(prompt)

    def plain(self, prompt: Prompt, system: str = "") -> list[int]:
        """Ids of the plain view, behind `system` if there is one; token ids stay where the vocabularies are one."""
        if isinstance(prompt, tuple):
            if self._asker is not None and not system and shared_vocabulary(self.text, self._asker) is not None:
                return list(prompt)
            prompt = self.as_text(prompt)
        return self.text.render(View("prefix", f"{system}\n\n") if system else View("plain"), prompt)

    def question(self, prompt: Prompt) -> str:
        """The bare question: what was said, joined by blank lines, without system prompts and roles."""
        if not isinstance(prompt, Chat):
            return self.as_text(prompt)
        return "\n\n".join(content_text(message) for message in said(prompt.messages))

    def transcript(self, prompt: Prompt) -> str:
        """What was said: a single turn's text, else each turn behind its role."""
        if not isinstance(prompt, Chat):
            return self.as_text(prompt)
        if len(prompt.messages) == 1:
            return content_text(prompt.messages[0])
        return "\n\n".join(f"{message.get('role')}: {content_text(message)}" for message in prompt.messages)


class Page:
    """Ids in the making, and the positions that are read."""

    def __init__(self, tongue: Tongue, ids: Sequence[int] = ()) -> None:
        self._tongue, self.ids, self.marks = tongue, list(ids), list[int]()

    def add(self, piece: str, mark: bool = False) -> None:
        """Write a piece behind what is there; `mark`: its last position is read."""
        self.ids += self._tongue.continued(piece)
        if mark:
            self.mark(len(self.ids) - 1)

    def mark(self, position: int) -> None:
        """Read this position. Raises BadRequest where there is none."""
        if position < 0:
            raise BadRequest("An empty prompt with an empty answer cannot be scored.", "prompt")
        if not self.marks or self.marks[-1] < position:
            self.marks.append(position)

    def done(self) -> Rendered:
        return Rendered(self.ids, self.marks)


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around an answer.

    head: ids up to the answer. turn: the position that ends the last turn before it. tail: the text that closes it.
    trims: whether white space at the answer's two ends is dropped.
    """

    head: tuple[int, ...]
    turn: int
    tail: str = ""
    trims: tuple[bool, bool] = (False, False)

    def fit(self, steps: Sequence[str]) -> list[str]:
        """The steps as they stand in the frame."""
        fitted = list(steps)
        if fitted and self.trims[0]:
            fitted[0] = fitted[0].lstrip()
        if fitted and self.trims[1]:
            fitted[-1] = fitted[-1].rstrip()
        return fitted


def frame(tongue: Tongue, prompt: Prompt, system: str = "") -> Frame:
    """A prompt and room for its answer: the assistant's turn of the chat template, else the plain view and the answer.

    system: instructions that stand before everything else. Raises BadRequest.
    """
    if not tongue.templated:
        head = tongue.plain(prompt, system)
        return Frame(tuple(head), len(head) - 1)
    messages = under_system(system, tongue.messages(prompt))
    chat = replace(prompt if isinstance(prompt, Chat) else Chat(()), messages=(), add_generation_prompt=False)
    begun = ""
    if chat.continue_final_message:
        chat = replace(chat, continue_final_message=False)
        messages, begun = messages[:-1], content_text(messages[-1])
    before, tail, trims = around(
        lambda answer: tongue.text.chat_text([*messages, {"role": "assistant", "content": answer}], chat), str(messages)
    )
    asked = tongue.text.chat_text(messages, chat).rstrip() if messages else ""
    if not (asked and before.startswith(asked)):
        asked = before
    ids = tongue.text.encode(asked)
    header = tongue.continued(before[len(asked) :])
    return Frame((*ids, *header, *tongue.continued(begun)), len(ids) - 1, tail, trims)


def around(show: Callable[[str], str], others: str) -> tuple[str, str, tuple[bool, bool]]:
    """What stands before and after a text where `show` puts it, and whether it loses white space at either end.

    others: what else is shown. Raises BadRequest if the text is not shown just once.
    """
    hole = "\ue000\ue001"
    while hole in others:
        hole += "\ue001"
    parts = show(f"{_EDGE}{hole}{_EDGE}").split(hole)
    if len(parts) != 2:
        raise BadRequest("The scorer's chat template does not show an answer just once.", "messages")
    before, after = parts
    trims = (not before.endswith(_EDGE), not after.startswith(_EDGE))
    return before.removesuffix(_EDGE), after.removeprefix(_EDGE), trims


def said(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without system prompts."""
    return tuple(message for message in messages if message.get("role") not in ("system", "developer"))


def under_system(system: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages under a system prompt; one that is there already follows it in the same message."""
    if not system:
        return tuple(messages)
    if messages and messages[0].get("role") in ("system", "developer"):
        return ({**messages[0], "content": f"{system}\n\n{content_text(messages[0])}"}, *messages[1:])
    return ({"role": "system", "content": system}, *messages)


def single_tokens(tongue: Tongue, tokens: Sequence[str], width: int) -> tuple[int, ...]:
    """The ids of score tokens. Raises ModelLoadError, naming the first that is no single token of the vocabulary."""
    found = [tongue.token(token) for token in tokens]
    for token, id in zip(tokens, found):
        if id is None or id >= width:
            raise ModelLoadError(f"'{token}' is not a single token of '{tongue.text.id}', so it cannot be scored by.")
    ids = tuple(id for id in found if id is not None)
    if len(set(ids)) < len(ids):
        raise ModelLoadError(f"The score tokens of '{tongue.text.id}' are the same token: {', '.join(tokens)}.")
    return ids
