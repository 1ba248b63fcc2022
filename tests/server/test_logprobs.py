"""Log-prob formats by themselves: keys that collide, bytes that are no text, offsets."""

from __future__ import annotations

import math

from decoding.events import TokenLogprob
from server.logprobs import TextLogprobs, chat_logprobs, joined, token_string
from tests.decoding.test_text import TOKENIZERS, VOCABULARIES


def test_bytes_that_are_no_text_are_written_out() -> None:
    vocabulary = VOCABULARIES["llama"]
    assert token_string(vocabulary, vocabulary.tokens.index("<0xE4>")) == "bytes:\\xe4"
    assert token_string(vocabulary, vocabulary.tokens.index("▁a")) == " a"


def test_equal_strings_are_told_apart_and_the_actual_token_keeps_its_own() -> None:
    vocabulary = VOCABULARIES["llama"]
    byte, plain = vocabulary.tokens.index("<0x61>"), vocabulary.tokens.index("a")  # both are "a"
    entry = TokenLogprob(byte, -1.5, ((plain, -0.5), (byte, -1.5), (vocabulary.tokens.index("▁a"), -math.inf)))
    made = TextLogprobs(vocabulary, True).answer([entry])
    assert made["tokens"] == ["a"]
    assert made["top_logprobs"] == [{f"token_id:{plain}": -0.5, "a": -1.5, " a": -9999.0}]
    absent = TextLogprobs(vocabulary, True).answer([TokenLogprob(byte, -7.0, ((plain, -0.5),))])
    assert absent["top_logprobs"] == [{f"token_id:{plain}": -0.5, "a": -7.0}]


def test_offsets_count_characters_of_the_text() -> None:
    vocabulary, ids = VOCABULARIES["byte-level"], TOKENIZERS["byte-level"].encode("é𐍈 x</s>y")
    entries = [TokenLogprob(token, -1.0) for token in ids]
    made = TextLogprobs(vocabulary, skip_special_tokens=True).answer(entries)
    text = TOKENIZERS["byte-level"].decode(ids, skip_special_tokens=True)
    assert made["text_offset"][-1] == text.index("y")
    assert made["text_offset"] == sorted(made["text_offset"])


def test_chat_bytes_join_to_the_text() -> None:
    ids = TOKENIZERS["byte-level"].encode("é𐍈 x")
    content = chat_logprobs(VOCABULARIES["byte-level"], [TokenLogprob(token, -1.0) for token in ids])["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é𐍈 x"


def test_joined() -> None:
    assert joined([]) is None
    assert joined([{"a": [1]}, {"a": [2, 3]}]) == {"a": [1, 2, 3]}
