"""From chats and JSON lines to documents: what a chat template writes, and which of its tokens an assistant spoke."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from training.data import Document

Message = dict[str, str]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of `text` without any added special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, prompt: bool, template: str | None = None
) -> str:
    """The chat as text; with `prompt`, up to where an assistant would begin to speak.

    `template` replaces the tokenizer's own.
    """
    text = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    assert isinstance(text, str)
    return text


def chat_document(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> Document:
    """A chat as the tokenizer's own template writes it.

    Targets are the assistant's words and whatever the template ends them with.

    Raises:
        ValueError: the template rewrites earlier turns, so what was spoken cannot be told from what was shown.
    """
    ids: list[int] = []
    targets: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        shown = render(tokenizer, messages[:index], prompt=True) if message["role"] == "assistant" else done
        whole = render(tokenizer, messages[: index + 1], prompt=False)
        if not (shown.startswith(done) and whole.startswith(shown)):
            raise ValueError("this chat template rewrites earlier turns; train on prompt/completion pairs instead")
        for text, spoken in ((shown[len(done) :], False), (whole[len(shown) :], message["role"] == "assistant")):
            cut = encode(tokenizer, text)
            ids += cut
            targets += [spoken] * len(cut)
        done = whole
    if ids and ids[-1] == tokenizer.eos_token_id:  # `pack` ends every document itself
        ids, targets = ids[:-1], targets[:-1]
    return Document(tuple(ids), tuple(targets))


def read_documents(path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """Documents of a JSON-lines file in TRL's formats: {"text"}, {"messages"}, or {"prompt", "completion"}.

    Raises:
        ValueError: a line is none of these; the message names the line.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _document(json.loads(line), tokenizer, f"{path.name}, line {number}")


def _document(entry: dict[str, Any], tokenizer: PreTrainedTokenizerFast, where: str) -> Document:
    if isinstance(entry.get("text"), str):
        return Document(tuple(encode(tokenizer, entry["text"])))
    if isinstance(entry.get("messages"), list):
        if not tokenizer.chat_template:
            raise ValueError(
                f"{where} holds messages, but the tokenizer has no chat template; add one or use prompt/completion"
            )
        return chat_document(tokenizer, entry["messages"])
    if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        prompt, completion = encode(tokenizer, entry["prompt"]), encode(tokenizer, entry["completion"])
        return Document((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))
    raise ValueError(f'{where} needs "text", "messages", or "prompt" and "completion"')
