"""The tokenizer: any text survives, digits and line breaks stand alone, prompts are cut like their continuations."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.chats import chat_document, encode, render
from training.demo import tokenizer as demo_tokenizer
from training.demo.dialogues import conversations
from training.demo.text import documents
from training.demo.tokenizer import ASSISTANT, END, PLAIN_TEMPLATE, SPECIAL, SYSTEM, USER, fast_tokenizer
from training.demo.world import make_world

WORLD = make_world(seed=0, people=100, tuned=30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The chat tokenizer, through a save and a load by AutoTokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    learned = demo_tokenizer.train_tokenizer(itertools.islice(documents(WORLD, 0), 1500), vocabulary=600)
    fast_tokenizer(learned, chat=True, max_length=128).save_pretrained(directory, save_jinja_files=False)
    assert {path.name for path in directory.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    loaded = AutoTokenizer.from_pretrained(directory)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@given(text=st.text(max_size=80))
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["", " ", "\n\n", "Zürich — 東京 🙂\r\n\t", "a  b", "é", "<|end|>", "don't"])
def test_awkward_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


@given(number=st.integers(min_value=0))
def test_one_token_a_digit(tokenizer: PreTrainedTokenizerFast, number: int) -> None:
    assert len(encode(tokenizer, str(number))) == len(str(number))
    assert len(encode(tokenizer, f" {number}")) == len(str(number)) + 1


def test_special_tokens_are_single_and_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [encode(tokenizer, token) for token in SPECIAL] == [[0], [1], [2], [3]]
    assert tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer.bos_token is None


def test_a_prompt_is_cut_like_the_text_that_continues_it(tokenizer: PreTrainedTokenizerFast) -> None:
    """Else the bases would meet a prefix in serving that they never met in training."""
    for text in itertools.islice(documents(WORLD, 1), 200):
        prompt, blank, rest = text.partition("\n\n")
        assert encode(tokenizer, prompt + blank) + encode(tokenizer, rest) == encode(tokenizer, text)


def test_templates(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(tokenizer, chat, prompt=True) == f"{SYSTEM}Be brief.{USER}Hi{ASSISTANT}"
    assert render(tokenizer, chat, prompt=True, template=PLAIN_TEMPLATE) == "Be brief.\n\nHi\n\n"
    done = [*chat, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]
    assert render(tokenizer, done, prompt=True) == (
        f"{SYSTEM}Be brief.{USER}Hi{ASSISTANT}Hello!{END}{USER}Bye{ASSISTANT}"
    )
    assert fast_tokenizer(tokenizer.backend_tokenizer, chat=False, max_length=8).chat_template is None


def test_chat_documents_count_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast) -> None:
    for chat in itertools.islice(conversations(WORLD, 0), 50):
        document = chat_document(tokenizer, chat)
        assert document.targets is not None
        spoken = [i for i, counted in zip(document.ids, document.targets, strict=True) if counted]
        said = END.join(message["content"] for message in chat if message["role"] == "assistant")
        assert tokenizer.decode(spoken) == said
        assert tokenizer.decode(document.ids) + END == render(tokenizer, chat, prompt=False)
