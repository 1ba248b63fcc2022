"""Text on both sides of the engine: what each role is shown of a request, and where the text ends.

`TextModel` is a model's tokenizer with its chat template, plain template and stop ids; `render` makes the ids of a
view. `Detokenizer` and `StopStrings` turn output ids into text that may be shown. Nothing here needs weights.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from decoding.core import BadRequest, Message, ModelLoadError, ModelSpec, View
from decoding.detokenizer import Detokenizer, Vocabulary

__all__ = ["Chat", "Detokenizer", "Prompt", "StopStrings", "TextModel", "Vocabulary", "shared_vocabulary"]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as the prompt of a request. `template_kwargs` go to the chat template."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: tuple[tuple[str, Any], ...] = ()


Prompt = Chat | str | tuple[int, ...]


def content_text(message: Message) -> str:
    """The text of a message's content: a string, a list of text parts (joined by newlines), or nothing."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if any(not isinstance(text, str) for text in texts):
        raise BadRequest("Message content must be text or a list of text parts.", "messages")
    return "\n".join(str(text) for text in texts)


def _compile_plain(model: str, source: str | None) -> Callable[..., str]:
    if source is None:
        return _join_contents
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    try:
        return environment.from_string(source).render
    except jinja2.TemplateError as error:
        raise ModelLoadError(f"The plain_template of '{model}' is not a Jinja2 template: {error}.") from error


def _join_contents(messages: Sequence[Message], **_: Any) -> str:
    ordered = sorted(messages, key=lambda message: message["role"] != "system")  # stable: only the system goes first
    return "\n\n".join(str(message["content"]) for message in ordered if message["content"])


def _card(spec: ModelSpec) -> dict[str, Any]:
    """What our trainer wrote beside the weights (`trimtab.json`); empty for a model that it did not make."""
    path = Path(spec.path) / "trimtab.json"
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"'{path}' is not valid JSON: {error}.") from error
    return card if isinstance(card, dict) else {}


class TextModel:
    """A model as text sees it: tokenizer, templates, stop ids. Thread-safe once built.

    tokenizer: a transformers tokenizer. plain_template: Jinja2 over `messages` (each with `role` and text `content`)
    and `add_generation_prompt`. view: what the role view `auto` means on this model, `plain` or `chat`; None is the
    usual rule. eos_ids: ids that end an answer. max_length: positions the model was made for, None if not stated.
    """

    def __init__(
        self,
        id: str,
        tokenizer: Any,
        *,
        plain_template: str | None = None,
        view: str | None = None,
        eos_ids: Sequence[int] = (),
        max_length: int | None = None,
    ) -> None:
        if view not in (None, "auto", "plain", "chat"):
            raise ModelLoadError(f"The view of '{id}' is '{view}'; it may be auto, plain or chat.")
        self.id, self.tokenizer, self.view, self.max_length = id, tokenizer, view, max_length
        self.vocabulary = Vocabulary(tokenizer)
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *own]))
        self._plain = _compile_plain(id, plain_template)
        self._bos = self._leading_ids()
        self._agreements: weakref.WeakKeyDictionary[TextModel, int | None] = weakref.WeakKeyDictionary()

    @classmethod
    def load(cls, spec: ModelSpec, tokenizer_path: str | None = None) -> TextModel:
        """Loads tokenizer and configuration of a Hugging Face directory or hub id; the former may lie elsewhere.

        Raises ModelLoadError.
        """
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        source = tokenizer_path or spec.path
        try:
            config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=spec.trust_remote_code)
        except Exception as error:  # the library raises many kinds; for the operator they are one: this cannot load
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelLoadError(f"Cannot load the tokenizer of '{spec.id}' from '{source}': {reason[0]}") from error
        try:
            generation = GenerationConfig.from_pretrained(spec.path)
        except (OSError, ValueError):
            generation = None
        config = config.get_text_config()
        card = _card(spec)
        eos = getattr(generation, "eos_token_id", None)
        eos = getattr(config, "eos_token_id", None) if eos is None else eos
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        return cls(
            spec.id,
            tokenizer,
            plain_template=spec.plain_template or card.get("plain_template"),
            view=spec.view,
            eos_ids=[int(i) for i in ([] if eos is None else eos if isinstance(eos, list) else [eos])],
            max_length=spec.max_model_len or next((int(limit) for limit in limits if limit), None),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer carries a chat template."""
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text. With `bos`, after the ids the tokenizer starts a text with, unless they already stand there.

        Ids that a tokenizer adds at the end (EOS) are left out: the text is to be continued.
        """
        ids = [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]
        return ids if not bos or ids[: len(self._bos)] == self._bos else self._bos + ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, as the tokenizer decodes them."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def render(self, view: View, prompt: Prompt) -> list[int]:
        """Ids of a prompt under a view (design: views). Token-id prompts stay as they are. Raises BadRequest."""
        kind = self.view if view.kind == "auto" and self.view else view.kind
        if kind == "text":
            return self.encode(view.text)
        if kind == "messages":
            chat = prompt if isinstance(prompt, Chat) else Chat(())
            return self._render_chat(view.messages, chat)
        if isinstance(prompt, tuple):
            return self._render_ids(view, prompt)
        if kind == "prefix":
            return self.encode(view.text + (prompt if isinstance(prompt, str) else self._render_plain(prompt)))
        if isinstance(prompt, str):
            if kind == "system":
                return self.encode(f"{view.text}\n\n{prompt}")
            if kind == "chat":
                return self._render_chat(({"role": "user", "content": prompt},), Chat(()), needs_template=True)
            return self.encode(prompt)
        if kind == "plain":
            return self.encode(self._render_plain(prompt))
        messages = _under_system(view.text, prompt.messages) if kind == "system" else prompt.messages
        return self._render_chat(messages, prompt, needs_template=kind == "chat")

    def _render_ids(self, view: View, prompt: tuple[int, ...]) -> list[int]:
        ids = list(prompt)
        if view.kind == "system":
            raise BadRequest("A view with a system prompt needs a text prompt or messages, not token ids.", "prompt")
        if view.kind != "prefix":
            return ids
        return self.encode(view.text) + (ids[len(self._bos) :] if ids[: len(self._bos)] == self._bos else ids)

    def _render_plain(self, chat: Chat) -> str:
        messages = [{"role": _role(message), "content": content_text(message)} for message in chat.messages]
        try:
            return self._plain(messages=messages, add_generation_prompt=chat.add_generation_prompt)
        except Exception as error:
            raise BadRequest(
                f"The plain template of '{self.id}' refuses these messages: {error}", "messages"
            ) from error

    def _render_chat(self, messages: Sequence[Message], chat: Chat, needs_template: bool = False) -> list[int]:
        return self.encode(self.chat_text(messages, chat, needs_template))

    def chat_text(self, messages: Sequence[Message], chat: Chat, needs_template: bool = False) -> str:
        """What the chat template makes of messages, else the plain view; how, says `chat`. Raises BadRequest."""
        template = self.tokenizer.chat_template
        if not template:
            if needs_template:
                raise BadRequest(f"The model '{self.id}' has no chat template, so it has no view 'chat'.", "decoding")
            return self._render_plain(Chat(tuple(messages), chat.add_generation_prompt))
        keeps_developer = "developer" in str(template)
        roles = [_role(message) for message in messages]
        shown = [
            {**message, "role": message["role"] if keeps_developer else role, "content": content_text(message)}
            for message, role in zip(messages, roles, strict=True)
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                shown,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **dict(chat.template_kwargs),
            )
        except Exception as error:  # templates raise on messages they do not like, and fail on ones they do not expect
            raise BadRequest(f"The chat template of '{self.id}' refuses these messages: {error}", "messages") from error
        return str(text)

    def _leading_ids(self) -> list[int]:
        """The ids the tokenizer puts before a text, found by encoding one with and without them."""
        bare = list(self.tokenizer.encode("a", add_special_tokens=False))
        full = list(self.tokenizer.encode("a", add_special_tokens=True))
        starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
        return [int(i) for i in full[: next(starts, 0)]]


def _role(message: Message) -> str:
    """The role; templates older than `developer` know it as `system`."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise BadRequest("Every message needs a role and content.", "messages")
    return "system" if role == "developer" else role


def _under_system(system: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages under a system prompt; one that is there already follows it in the same message."""
    if messages and _role(messages[0]) == "system":
        merged = f"{system}\n\n{content_text(messages[0])}"
        return ({**messages[0], "content": merged}, *messages[1:])
    return ({"role": "system", "content": system}, *messages)


def shared_vocabulary(a: TextModel, b: TextModel) -> int | None:
    """How many ids the two tokenizers share (the shorter one's length), None if they differ on any of them. Cached."""
    if b not in a._agreements:
        mine, theirs = a.vocabulary.tokens, b.vocabulary.tokens
        size = min(len(mine), len(theirs))
        a._agreements[b] = size if mine is theirs or mine[:size] == theirs[:size] else None
    return a._agreements[b]


class StopStrings:
    """Cuts a stream of text at the first stop string that completes in it; nothing of it gets out.

    The result does not depend on how the text is cut into pieces. Where two stop strings complete at the same
    character, the longer one wins. With `include` the stop string ends the text. `matched` names it afterwards.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops), "stop strings are not empty"
        self._stops, self._include = tuple(stops), include
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Takes the next piece; returns what may be shown. After a match everything else is dropped."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back; the text ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The first position from which a stop string may still complete."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first_chars:
                tail = text[at:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return at
        return len(text)
