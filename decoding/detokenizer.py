"""Ids to text, piece by piece, for streams.

A piece is final: the pieces of a stream, joined, are `tokenizer.decode(ids, skip_special_tokens=...)`, whatever
the ids. So bytes of an unfinished character are held back, and so is a run of SentencePiece byte tokens until it
ends, because one bad byte turns the whole run into U+FFFD. Work per token is O(1), amortised.

The decoders of the `tokenizers` library are rebuilt here as stages, each a little machine from pieces to pieces;
`stages_of` reads them from the tokenizer's own JSON. A tokenizer whose decoder is not known (or is Python code) is
decoded in a sliding window instead. Knows nothing about models, prompts or requests.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: each of 256 printable characters stands for one byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; a token written otherwise stands for itself."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def byte_token(token: str) -> int | None:
    """The byte of a SentencePiece byte token such as `<0x0A>`, None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


class Stage(Protocol):
    """One decoder as a machine from pieces to pieces. `finish` is called once, after the last push."""

    def push(self, piece: str) -> list[str]: ...
    def finish(self) -> list[str]: ...


class ByteLevel:
    """Byte-level BPE: all tokens' bytes as one UTF-8 text. Python and Rust replace the same maximal sub-parts."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        return [self._decoder.decode(byte_level_bytes(piece))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", True)]


class ByteFallback:
    """A run of byte tokens is one UTF-8 text, or, if any of it is bad, one U+FFFD a byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        byte = byte_token(piece)
        if byte is not None:
            self._run.append(byte)
            return []
        return [*self.finish(), piece]

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(run)


class Map:
    """A function of each piece and of whether it is the first one (Replace, Metaspace, a joining space)."""

    def __init__(self, function: Callable[[str, bool], str]) -> None:
        self._function, self._first = function, True

    def push(self, piece: str) -> list[str]:
        first, self._first = self._first, False
        return [self._function(piece, first)]

    def finish(self) -> list[str]:
        return []


class StripStart:
    """Drops up to `count` times `char` from the start of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char, self._left = char, count

    def push(self, piece: str) -> list[str]:
        while self._left and piece:
            if piece[0] != self._char:
                self._left = 0
            else:
                piece, self._left = piece[1:], self._left - 1
        return [piece]

    def finish(self) -> list[str]:
        return []


class CleanUp:
    """transformers' `clean_up_tokenization`: " ." becomes "." and so on.

    Every pattern consists of the characters of `_ALPHABET` only, and a replacement never removes another one, so
    the text may be cut after any character outside of it.
    """

    _ALPHABET = frozenset(" .?!,'ntmsver")

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._held: list[str] = []

    def push(self, piece: str) -> list[str]:
        cut = next((i for i in range(len(piece), 0, -1) if piece[i - 1] not in self._ALPHABET), 0)
        if not cut:
            self._held.append(piece)
            return []
        text, self._held = "".join([*self._held, piece[:cut]]), [piece[cut:]]
        return [self._clean(text)]

    def finish(self) -> list[str]:
        return [self._clean("".join(self._held))]


StageMaker = Callable[[], Stage]


def _stage_maker(spec: dict[str, Any], fused: bool) -> StageMaker | None:
    match spec:
        case {"type": "ByteLevel"}:
            return ByteLevel
        case {"type": "ByteFallback"}:
            return ByteFallback
        case {"type": "Metaspace", "replacement": str(mark)}:
            strips = spec.get("prepend_scheme", "always") != "never"
            return lambda: Map(lambda piece, first: piece.replace(mark, "" if first and strips else " "))
        case {"type": "Fuse"}:
            return lambda: Map(lambda piece, first: piece)
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
            return lambda: Map(lambda piece, first: piece.replace(old, new))
        case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if fused:
            return lambda: StripStart(char, start)
        case _:
            return None


def stages_of(decoder: dict[str, Any] | None) -> list[StageMaker] | None:
    """The stages of a decoder as the `tokenizers` library serialises it; None for one that is not known here."""
    if decoder is None:  # the library joins the tokens by a space
        return [lambda: Map(lambda piece, first: piece if first else f" {piece}")]
    makers, fused = [], False
    for spec in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        maker = _stage_maker(spec, fused)
        if maker is None or (fused and spec["type"] in ("ByteLevel", "ByteFallback", "Metaspace")):
            return None
        fused = fused or spec["type"] in ("Fuse", "ByteLevel")
        makers.append(maker)
    return makers


class Vocabulary:
    """A tokenizer seen from its ids: token strings, which ids are special, the bytes of each.

    tokens: [highest id + 1], None where an id has no token. Built once per model; `tokenizer` is a transformers one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        ids = {i: token for token, i in tokenizer.get_vocab().items()}
        self.tokens: tuple[str | None, ...] = tuple(ids.get(i) for i in range(max(ids, default=-1) + 1))
        added = tokenizer.added_tokens_decoder
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.makers: list[StageMaker] | None = None
        cleans = bool(tokenizer.clean_up_tokenization_spaces)
        backend = getattr(tokenizer, "_tokenizer", None)
        if backend is not None and type(tokenizer)._decode.__module__.startswith("transformers.tokenization_utils"):
            spec = json.loads(backend.to_str())
            self.makers = stages_of(spec.get("decoder"))
            forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", 0)
            cleans = cleans and (spec["model"]["type"] != "BPE" or bool(forced))
        self.clean_up: Callable[[str], str] | None = tokenizer.clean_up_tokenization if cleans else None
        kinds = [maker().__class__ for maker in self.makers or ()]
        self._byte_level, self._byte_fallback = ByteLevel in kinds, ByteFallback in kinds

    def visible(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether the id shows in the text at all: it has a token, and not a special one that is skipped."""
        known = 0 <= token_id < len(self.tokens) and self.tokens[token_id] is not None
        return known and not (skip_special_tokens and token_id in self.special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token adds to a text, with its leading space; a special token's own name; empty if unknown."""
        token = self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None
        if token is None:
            return b""
        if token_id in self.special_ids:
            return token.encode()
        if self._byte_level:
            return byte_level_bytes(token)
        if self._byte_fallback and (byte := byte_token(token)) is not None:
            return bytes([byte])
        if self.makers is None:
            return str(self.tokenizer.decode([token_id])).encode()
        return token.replace("\u2581", " ").encode()


class _Window:
    """Decodes with the tokenizer itself: an anchor of ids already shown, then the new ones.

    The anchor takes up whatever the tokenizer does to a first token. While the text ends in U+FFFD nothing is
    shown, and the window is decoded again only when its new part has doubled.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._anchor: list[int] = []
        self._new: list[int] = []
        self._shown, self._retry = "", 1

    def push_id(self, token_id: int) -> str:
        self._new.append(token_id)
        if len(self._new) < self._retry:
            return ""
        text = self._decode(self._anchor + self._new)
        if text.endswith(REPLACEMENT) or not text.startswith(self._shown):
            self._retry = 2 * len(self._new) if len(self._new) >= 4 else len(self._new) + 1
            return ""
        piece = text[len(self._shown) :]
        self._anchor, self._new, self._retry = self._new[-4:], [], 1
        self._shown = self._decode(self._anchor)
        return piece

    def finish(self) -> str:
        return self._decode(self._anchor + self._new)[len(self._shown) :] if self._new else ""


class Detokenizer:
    """Text of one stream of ids. `push` and `finish` return what may be shown now; joined it is the decoded text."""

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True) -> None:
        self._vocabulary, self._skip = vocabulary, skip_special_tokens
        self._window: _Window | None = None
        self._stages: list[Stage] = [maker() for maker in vocabulary.makers or ()]
        if vocabulary.makers is None:
            decode = functools.partial(vocabulary.tokenizer.decode, clean_up_tokenization_spaces=False)
            self._window = _Window(decode)
        if vocabulary.clean_up is not None:
            self._stages.append(CleanUp(vocabulary.clean_up))

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that is final with them, possibly empty."""
        vocabulary, pieces = self._vocabulary, []
        for token_id in ids:
            if not vocabulary.visible(token_id, self._skip):
                continue
            if self._window is not None:
                pieces.append(self._window.push_id(token_id))
            else:
                pieces.append(vocabulary.tokens[token_id] or "")
        return "".join(_through(self._stages, pieces))

    def finish(self) -> str:
        """The rest of the text; an unfinished character becomes U+FFFD, as decode gives it. Call it once."""
        text = _through(self._stages, [self._window.finish()] if self._window is not None else [])
        for i, stage in enumerate(self._stages):
            text += _through(self._stages[i + 1 :], stage.finish())
        return "".join(text)


def _through(stages: Sequence[Stage], pieces: list[str]) -> list[str]:
    for stage in stages:
        if not pieces:
            break
        pieces = [out for piece in pieces for out in stage.push(piece)]
    return pieces
