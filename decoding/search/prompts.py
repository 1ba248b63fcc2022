"""Prompts that searches make of the request's: with a system prompt, with earlier answers, or about its question.

A chat stays a chat and a text stays a text. Prompts of token ids cannot be rewritten: all raise BadRequest for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from decoding.core import BadRequest, Message
from decoding.text import Chat, Prompt, content_text


def question(prompt: Prompt) -> str:
    """What is asked, as a text: a lone user message by itself, a longer conversation with its roles."""
    if isinstance(prompt, Chat):
        said = [(str(message["role"]), content_text(message)) for message in prompt.messages]
        if len(said) == 1:
            return said[0][1]
        return "\n\n".join(f"{role}: {text}" for role, text in said)
    return _text(prompt)


def asked(prompt: Prompt, text: str) -> Prompt:
    """`text` in place of the request's prompt, in the form that it has."""
    if isinstance(prompt, Chat):
        return Chat(({"role": "user", "content": text},), template_kwargs=prompt.template_kwargs)
    _text(prompt)
    return text


def instructed(prompt: Prompt, system: str) -> Prompt:
    """The prompt under a system prompt; one that it has comes after it in the same message."""
    if not isinstance(prompt, Chat):
        return f"{system}\n\n{_text(prompt)}"
    first, rest = prompt.messages[0], prompt.messages
    if first["role"] == "system":
        system, rest = f"{system}\n\n{content_text(first)}", rest[1:]
    return replace(prompt, messages=({"role": "system", "content": system}, *rest))


def continued(prompt: Prompt, answers: Sequence[str], request: str) -> Prompt:
    """The prompt with earlier answers to it, `request` said after each of them."""
    if not isinstance(prompt, Chat):
        return _text(prompt) + "".join(f"{answer}\n\n{request}\n\n" for answer in answers)
    messages: list[Message] = list(prompt.messages)
    begun = content_text(messages.pop()) if prompt.continue_final_message else ""
    for answer in answers:
        messages.append({"role": "assistant", "content": begun + answer})
        messages.append({"role": "user", "content": request})
        begun = ""
    return Chat(tuple(messages), template_kwargs=prompt.template_kwargs)


def filled(template: str, values: Mapping[str, Any]) -> str:
    """A template with {name} replaced for every name in `values`; nothing else in it means anything."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: str(values[found[1]]), template)


def check_template(name: str, template: str, *holes: str) -> None:
    """BadRequest naming the parameter if a template lacks one of its places."""
    if missing := [hole for hole in holes if f"{{{hole}}}" not in template]:
        places = " and ".join(f"{{{hole}}}" for hole in missing)
        raise BadRequest(f"'{name}' must have {places} where that is to stand.", name)


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    raise BadRequest("This search writes prompts of its own: it needs messages or a text, not token ids.", "prompt")
