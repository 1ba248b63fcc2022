"""Text in and out: rendering of views, streamed decoding of any ids, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from decoding.core import BadRequest, ModelLoadError, ModelSpec, View
from decoding.text import Chat, Detokenizer, StopStrings, TextModel, Vocabulary, shared_vocabulary

CHATML = (
    "{% for m in messages %}<|x|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|x|>assistant\n{% endif %}"
)
LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def byte_level(bos: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|x|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, 中文 and 😀 don't . 've been"] * 5, trainer)
    tokenizer.add_tokens([AddedToken("foo é", special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **kwargs)


def sentencepiece(decoder: Any, **kwargs: Any) -> PreTrainedTokenizerFast:
    words = ["▁", "▁▁", "▁a", "a", "n't", "▁'", "▁.", ".", "b▁c", "▁n't", "'", "s", "中", "�"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -10.0) for byte in range(256)] + [(word, -2.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **kwargs)


def word_level(decoder: Any = None) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "a", "b", "##c", ".", "'", "n't", "d</w>", "e</w>", "�", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True)


TOKENIZERS = {
    "byte-level": byte_level(),
    "llama": sentencepiece(decoders.Sequence(LLAMA_DECODER)),
    "llama, no strip": sentencepiece(decoders.Sequence(LLAMA_DECODER[:3])),
    "metaspace": sentencepiece(decoders.Metaspace()),
    "metaspace, never": sentencepiece(decoders.Metaspace(prepend_scheme="never")),
    "fallback, metaspace": sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "cleaned up": sentencepiece(decoders.Sequence(LLAMA_DECODER), clean_up_tokenization_spaces=True),
    "joined": word_level(),
    "wordpiece (window)": word_level(decoders.WordPiece()),
    "bpe suffix (window)": word_level(decoders.BPEDecoder(suffix="</w>")),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def streamed(name: str, pieces: Sequence[Sequence[int]], skip: bool) -> list[str]:
    detokenizer = Detokenizer(VOCABULARIES[name], skip_special_tokens=skip)
    return [*(detokenizer.push(ids) for ids in pieces), detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text(name: str, data: st.DataObject) -> None:
    size = len(VOCABULARIES[name].tokens)
    favourites = [i for i in (*range(3), *range(size - 16, size)) if 0 <= i < size]
    ids = data.draw(st.lists(st.integers(0, size + 3) | st.sampled_from(favourites), max_size=24))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    expected = TOKENIZERS[name].decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(name, pieces, skip)) == expected
    assert "".join(streamed(name, [[i] for i in ids], skip)) == expected


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_streams_whole(text: str) -> None:
    for name in ("byte-level", "llama"):
        ids = TOKENIZERS[name].encode(text, add_special_tokens=False)
        assert "".join(streamed(name, [[i] for i in ids], True)) == TOKENIZERS[name].decode(ids)


def test_an_unfinished_character_is_held_back_and_ends_as_a_replacement() -> None:
    ids = TOKENIZERS["byte-level"].encode("é𐍈")
    pieces = streamed("byte-level", [[i] for i in ids[:-1]], True)
    assert "�" not in "".join(pieces[:-1])
    assert pieces[-1] == "�"


def test_byte_tokens_wait_for_the_end_of_their_run() -> None:
    vocabulary = VOCABULARIES["llama"]
    ids = [vocabulary.tokens.index(f"<0x{byte:02X}>") for byte in "中".encode()]
    assert streamed("llama", [[i] for i in ids] + [[vocabulary.tokens.index("a")]], True) == ["", "", "", "中a", ""]


def test_long_run_of_bad_bytes_is_decoded_a_bounded_number_of_times() -> None:
    """The window is decoded again only when its new part has doubled."""
    calls = 0

    class Counting:
        clean_up_tokenization_spaces = False
        added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

        def get_vocab(self) -> dict[str, int]:
            return {"x": 0}

        def decode(self, ids: list[int], **_: Any) -> str:
            nonlocal calls
            calls += 1
            return "�" * len(ids)

        def _decode(self) -> None: ...

    detokenizer = Detokenizer(Vocabulary(Counting()))
    pieces = [detokenizer.push([0]) for _ in range(1000)] + [detokenizer.finish()]
    assert "".join(pieces) == "�" * 1000
    assert calls < 20


def test_token_bytes() -> None:
    level, llama = VOCABULARIES["byte-level"], VOCABULARIES["llama"]
    ids = TOKENIZERS["byte-level"].encode(" hello 😀")
    assert b"".join(level.token_bytes(i) for i in ids).decode() == " hello 😀"
    assert llama.token_bytes(llama.tokens.index("<0xE4>")) == b"\xe4"
    assert llama.token_bytes(llama.tokens.index("▁a")) == b" a"
    assert level.token_bytes(0) == b"<s>"
    assert level.token_bytes(10**6) == b""


# ---------------------------------------------------------------------------------------------------------------
# Stop strings


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None, int]:
    """The definition: the first position at which any stop string has completed; the longest of those."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop, end
    return text, None, len(text)


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_strings_equal_their_definition_whatever_the_pieces(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    before, matched, end = first_stop("".join(pieces), stops)
    cutter, shown = StopStrings(stops, include), ""
    for piece in pieces:
        shown += cutter.push(piece)
        assert before.startswith(shown) or (include and shown == "".join(pieces)[:end])
    shown += cutter.finish()
    assert cutter.matched == matched
    assert shown == ("".join(pieces)[:end] if include and matched else before)


def test_text_is_held_back_only_while_a_stop_string_may_complete() -> None:
    cutter = StopStrings(["END"])
    assert [cutter.push(piece) for piece in ("x", "E", "N", "x", "yE", "ND", "z")] == ["x", "", "", "ENx", "y", "", ""]
    assert cutter.matched == "END"


# ---------------------------------------------------------------------------------------------------------------
# Views


def text_model(id: str = "m", **kwargs: Any) -> TextModel:
    options = {key: kwargs.pop(key) for key in ("plain_template", "view") if key in kwargs}
    return TextModel(id, byte_level(**kwargs), **options)


def shown(model: TextModel, view: View, prompt: Any) -> str:
    return model.decode(model.render(view, prompt), skip_special_tokens=False)


TALK = Chat(({"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}))


def test_views_of_a_chat() -> None:
    model = text_model(chat_template=CHATML)
    templated = "<|x|>user\nhi</s><|x|>system\nbe kind</s><|x|>assistant\n"
    assert shown(model, View(), TALK) == shown(model, View("chat"), TALK) == templated
    assert shown(model, View("plain"), TALK) == "be kind\n\nhi"
    assert shown(model, View("prefix", "Well: "), TALK) == "Well: be kind\n\nhi"
    assert shown(model, View("text", "other"), TALK) == "other"
    other = View("messages", messages=({"role": "user", "content": [{"type": "text", "text": "no"}]},))
    assert shown(model, other, TALK) == "<|x|>user\nno</s><|x|>assistant\n"
    assert shown(model, View("system", "S"), TALK).startswith("<|x|>system\nS</s><|x|>user\nhi")


def test_a_system_view_joins_the_system_message_that_is_there() -> None:
    model = text_model(chat_template=CHATML)
    talk = Chat(({"role": "developer", "content": "old"}, {"role": "user", "content": "hi"}))
    assert shown(model, View("system", "new"), talk).startswith("<|x|>system\nnew\n\nold</s><|x|>user")


def test_views_without_a_chat_template() -> None:
    model = text_model()
    assert shown(model, View(), TALK) == "be kind\n\nhi"
    with pytest.raises(BadRequest, match="no chat template"):
        model.render(View("chat"), TALK)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert shown(text_model(plain_template=template), View(), TALK) == "user: hi\nsystem: be kind\n"


def test_views_of_a_text() -> None:
    model = text_model(chat_template=CHATML)
    assert shown(model, View(), "hi") == shown(model, View("plain"), "hi") == "hi"
    assert shown(model, View("chat"), "hi") == "<|x|>user\nhi</s><|x|>assistant\n"
    assert shown(model, View("prefix", "a "), "hi") == "a hi"
    assert shown(model, View("system", "S"), "hi") == "S\n\nhi"


def test_an_entry_may_say_what_auto_means() -> None:
    assert shown(text_model(chat_template=CHATML, view="chat"), View(), "hi").startswith("<|x|>user")
    assert shown(text_model(chat_template=CHATML, view="plain"), View(), TALK) == "be kind\n\nhi"
    with pytest.raises(ModelLoadError, match="may be auto, plain or chat"):
        text_model(view="fancy")


def test_token_ids_stay_as_they_are() -> None:
    model = text_model(bos=True)
    assert [model.render(View(kind), (5, 6)) for kind in ("auto", "plain", "chat")] == [[5, 6]] * 3  # type: ignore[arg-type]
    assert model.render(View("prefix", "a"), (0, 5)) == [*model.encode("a"), 5]
    with pytest.raises(BadRequest, match="not token ids"):
        model.render(View("system", "S"), (5,))


def test_bos_is_added_once_and_eos_never() -> None:
    model = text_model(bos=True, chat_template="<s>" + CHATML)
    assert shown(model, View(), "hi") == "<s>hi"
    assert shown(model, View(), "<s>hi") == "<s>hi"
    assert shown(model, View(), TALK).count("<s>") == 1
    assert shown(text_model(bos=True, chat_template=CHATML), View(), TALK).startswith("<s><|x|>user")
    assert model.render(View(), "") == [0]


def test_the_last_message_may_be_continued() -> None:
    model = text_model(chat_template=CHATML)
    talk = Chat(
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}), continue_final_message=True
    )
    assert shown(model, View(), talk).endswith("<|x|>assistant\nWell")


def test_template_arguments_and_failures() -> None:
    model = text_model(chat_template="{{ mood }}{% if not mood %}{{ raise_exception('no mood') }}{% endif %}")
    assert shown(model, View(), Chat(TALK.messages, template_kwargs=(("mood", "sad"),))) == "sad"
    with pytest.raises(BadRequest, match="no mood"):
        model.render(View(), TALK)
    with pytest.raises(BadRequest, match="text parts"):
        model.render(View(), Chat(({"role": "user", "content": [{"type": "image_url"}]},)))
    for message in ({"content": "x"}, {"role": 3}, {"role": "user", "content": 5}, "user"):
        with pytest.raises(BadRequest):
            model.render(View("messages", messages=(message,)), "hi")  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="not a Jinja2 template"):
        text_model(plain_template="{% for %}")


# ---------------------------------------------------------------------------------------------------------------
# Vocabularies, loading


def test_shared_vocabulary() -> None:
    a, b, wider, other = text_model(), text_model(), byte_level(), TextModel("o", TOKENIZERS["llama"])
    wider.add_tokens(["more"])
    assert shared_vocabulary(a, b) == len(a.vocabulary.tokens)
    assert shared_vocabulary(a, TextModel("w", wider)) == len(a.vocabulary.tokens)
    assert shared_vocabulary(a, other) is None


def test_load_reads_stop_ids_length_and_template(tmp_path: Any) -> None:
    from transformers import GenerationConfig, LlamaConfig

    byte_level(chat_template=CHATML).save_pretrained(tmp_path)
    LlamaConfig(vocab_size=400, max_position_embeddings=77, eos_token_id=9).save_pretrained(tmp_path)
    assert TextModel.load(ModelSpec("m", str(tmp_path))).eos_ids == (9, 1)
    GenerationConfig(eos_token_id=[2, 1]).save_pretrained(tmp_path)
    model = TextModel.load(ModelSpec("m", str(tmp_path)))
    assert (model.eos_ids, model.max_length, model.has_chat_template) == ((2, 1), 77, True)
    assert TextModel.load(ModelSpec("m", str(tmp_path), max_model_len=50)).max_length == 50


def test_load_explains_what_is_missing(tmp_path: Any) -> None:
    with pytest.raises(ModelLoadError, match="Cannot load the tokenizer of 'm'"):
        TextModel.load(ModelSpec("m", str(tmp_path)))
