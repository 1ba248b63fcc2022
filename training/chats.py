"""From chats and JSON lines to documents: what a chat template writes, and which of its tokens an assistant spoke."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from training.data import Document

Message = dict[str, str]
Ids = tuple[int, ...]


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
    for where, entry in _entries(path):
        yield _document(entry, tokenizer, where)


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


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[list[Ids], list[Ids]]:
    """Prompts and texts of a JSON-lines file, as the token ids that a server would make of them.

    A prompt is {"prompt"} (a completion beside it is not read) or {"messages"} up to its last assistant turn; a text is
    {"text"}.

    Raises:
        ValueError: a line is none of these; the message names the line.
    """
    prompts: list[Ids] = []
    texts: list[Ids] = []
    for where, entry in _entries(path):
        if isinstance(entry.get("prompt"), str):
            prompts.append(tuple(tokenizer(entry["prompt"])["input_ids"]))
        elif isinstance(entry.get("messages"), list):
            prompts.append(_asked(entry["messages"], tokenizer, where))
        elif isinstance(entry.get("text"), str):
            texts.append(tuple(tokenizer(entry["text"])["input_ids"]))
        else:
            raise ValueError(f'{where} needs "prompt", "messages" or "text"')
    return prompts, texts


def read_tasks(path: Path) -> list[tuple[str, str | None]]:
    """Prompts and right answers (None where a line has none) of a JSON-lines file of {"prompt", "answer"}.

    Raises:
        ValueError: a line has no prompt; the message names the line.
    """
    tasks: list[tuple[str, str | None]] = []
    for where, entry in _entries(path):
        if not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{where} needs "prompt", and may have "answer"')
        tasks.append((entry["prompt"], None if entry.get("answer") is None else str(entry["answer"])))
    return tasks


def _asked(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, where: str) -> Ids:
    if not tokenizer.chat_template:
        raise ValueError(f"{where} holds messages, but the tokenizer has no chat template; add one or use prompts")
    asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    return tuple(encode(tokenizer, render(tokenizer, asked, prompt=True)))


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON: {error}") from error
                if not isinstance(entry, dict):
                    raise ValueError(f"{where} is not a JSON object")
                yield where, entry
