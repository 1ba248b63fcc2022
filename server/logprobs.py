"""Log-probs as the two endpoints report them.

Chat: a list of objects. Text: four parallel lists, whose dictionaries are keyed by token strings, so a string that two
tokens of one dictionary share is told apart. A masked token reports -9999.0, which JSON can carry and -inf it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoding.detokenizer import Detokenizer, Vocabulary
from decoding.events import TokenLogprob

FLOOR = -9999.0


def reported(logprob: float) -> float:
    """The number as it is sent."""
    return logprob if logprob > FLOOR else FLOOR  # NaN too


def token_string(vocabulary: Vocabulary, token_id: int) -> str:
    """A token's own text; bytes that are no text by themselves are written out as OpenAI does: `bytes:\\xe4\\xb8`."""
    raw = vocabulary.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(vocabulary: Vocabulary, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = vocabulary.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": reported(logprob), "bytes": list(raw)}

    content = [
        {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The `logprobs` object of a text choice, made piece by piece.

    `text_offset` counts characters of the choice's text. Bytes that are not a whole character yet stand where the
    character will.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary, self._skip = vocabulary, skip_special_tokens
        self._offset = 0
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens)

    def prompt(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None], text: str) -> dict[str, Any]:
        """The echoed prompt; the answer's offsets go on after its `text`."""
        made = self._lists(ids, entries)
        self._offset, self._detokenizer = len(text), Detokenizer(self._vocabulary, self._skip)
        return made

    def answer(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens of the answer."""
        return self._lists([entry.token_id for entry in entries], entries)

    def _lists(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        offsets = []
        for token_id in ids:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push((token_id,)))
        return {
            "tokens": [token_string(self._vocabulary, token_id) for token_id in ids],
            "token_logprobs": [None if entry is None else reported(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens, best first, and the actual one, under the string that `tokens` gives it."""
        own = token_string(self._vocabulary, entry.token_id)
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            name = token_string(self._vocabulary, token_id)
            if token_id == entry.token_id:
                top[own] = reported(entry.logprob)  # the identical float: clients compare the two
            elif name == own or name in top:
                top[f"token_id:{token_id}"] = reported(logprob)
            else:
                top[name] = reported(logprob)
        top.setdefault(own, reported(entry.logprob))
        return top


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Pieces of one choice's `logprobs` as one object, None if there are none."""
    if not parts:
        return None
    whole: dict[str, Any] = dict(parts[0])
    for part in parts[1:]:
        for key, value in part.items():
            whole[key] = None if value is None else [*whole[key], *value]
    return whole
