"""From a program and a prompt to a request, with fake tokenizers' models: every refusal names what to change."""

from __future__ import annotations

import math
from typing import Any

import pytest

from decoding.core import BadRequest, Policy, Program, Role, Sampling, Term, UnknownModel, View
from decoding.events import ModelInfo
from decoding.prepare import Entry, prepare
from decoding.text import Chat, TextModel
from tests.decoding.test_text import byte_level, sentencepiece

PLAIN = Program("plain", Policy((Term("main", Role("base")),)))


def info(id: str, max_model_len: int = 40, width: int = 330) -> ModelInfo:
    return ModelInfo(id, max_model_len, width, 1000, 1, "float32", "cpu")


def steered(*weights: float) -> Program:
    views = (View("plain"), View(), View("prefix", "well, well, "))
    models = ("base", "expert", "small")
    terms = (Term(m, Role(m, view=v), w) for m, v, w in zip(models, views, weights, strict=True))
    return Program("steered", Policy(tuple(terms)))


@pytest.fixture(scope="module")
def catalog() -> dict[str, Entry]:
    from tokenizers import decoders

    foreign = TextModel("foreign", sentencepiece(decoders.Metaspace()))
    return {
        "base": Entry(TextModel("base", byte_level()), info("base")),
        "expert": Entry(TextModel("expert", byte_level(), eos_ids=(7,)), info("expert", 30, 334)),
        "small": Entry(TextModel("small", byte_level(), eos_ids=(8,)), info("small", 20)),
        "foreign": Entry(foreign, info("foreign")),
        "far": Entry(TextModel("far", byte_level(), eos_ids=(331,)), info("far", 40, 334)),
        "with-bos": Entry(TextModel("with-bos", byte_level(bos=True)), info("with-bos")),
    }


def test_every_term_gets_its_own_prompt(catalog: dict[str, Entry]) -> None:
    request = prepare(steered(1, 1, -1), "hello", Sampling(), catalog, n=3, salt="s")
    texts = [entry.text.decode(ids) for ids, entry in zip(request.prompts, catalog.values())]
    assert texts == ["hello", "hello", "well, well, hello"]
    assert (request.text_model, request.n, request.salt) == ("base", 3, "s")
    assert request.id != prepare(PLAIN, "hello", Sampling(), catalog).id


def test_stop_ids_are_those_of_roles_with_positive_weight(catalog: dict[str, Entry]) -> None:
    assert prepare(steered(1, 1, -1), "hello", Sampling(), catalog).eos_ids == (1, 7)
    assert prepare(steered(1, 1, 1), "hello", Sampling(), catalog).eos_ids == (1, 7, 8)
    assert prepare(steered(1, 0, -1), "hello", Sampling(), catalog).eos_ids == (1,)
    program = Program("p", Policy((Term("a", Role("base")), Term("b", Role("far")))))
    with pytest.raises(BadRequest, match="'far' ends its answers with token 331"):
        prepare(program, "hello", Sampling(), catalog)


def test_max_tokens_is_what_fits_the_shortest_role(catalog: dict[str, Entry]) -> None:
    request = prepare(steered(1, 1, -1), "hello", Sampling(min_tokens=999), catalog)
    room = min(40 - len(request.prompts[0]), 30 - len(request.prompts[1]), 20 - len(request.prompts[2]))
    assert request.sampling.max_tokens == request.sampling.min_tokens == room
    assert prepare(PLAIN, (5,) * 40, Sampling(max_tokens=0), catalog).sampling.max_tokens == 0
    assert prepare(PLAIN, (5,) * 39, Sampling(max_tokens=1), catalog).sampling.max_tokens == 1


@pytest.mark.parametrize(("prompt", "max_tokens"), [((5,) * 40, None), ((5,) * 41, 0), ((5,) * 30, 11)])
def test_too_long_names_role_and_limit(catalog: dict[str, Entry], prompt: tuple[int, ...], max_tokens: Any) -> None:
    with pytest.raises(BadRequest, match=r"length of 'base' is 40 tokens; for role 'main'") as caught:
        prepare(PLAIN, prompt, Sampling(max_tokens=max_tokens), catalog)
    assert caught.value.code == "context_length_exceeded"


def test_models_with_different_tokenizers_are_refused_by_name(catalog: dict[str, Entry]) -> None:
    program = Program("p", Policy((Term("a", Role("base")), Term("b", Role("foreign")))))
    with pytest.raises(BadRequest, match="'base' and 'foreign' cannot be mixed"):
        prepare(program, "hello", Sampling(), catalog)
    alone = Program("p", Policy((Term("a", Role("foreign")),)))
    assert prepare(alone, (4, 5), Sampling(), catalog).prompts == ((4, 5),)


def test_unknown_model(catalog: dict[str, Entry]) -> None:
    with pytest.raises(UnknownModel, match=r"'nobody' does not exist\. Served: base, expert") as caught:
        prepare(Program("p", Policy((Term("main", Role("nobody")),))), "hello", Sampling(), catalog)
    assert caught.value.param == "decoding.main"


@pytest.mark.parametrize("token_id", [-1, 330, 10**12])
@pytest.mark.parametrize("param", ["prompt", "logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_token_ids_out_of_range(catalog: dict[str, Entry], param: str, token_id: int) -> None:
    sampling = {
        "prompt": Sampling(),
        "logit_bias": Sampling(logit_bias=((token_id, 1.0),)),
        "allowed_token_ids": Sampling(allowed_token_ids=(token_id,)),
        "stop_token_ids": Sampling(stop_token_ids=(token_id,)),
    }[param]
    prompt = (token_id,) if param == "prompt" else "hello"
    with pytest.raises(BadRequest, match="outside the vocabulary") as caught:
        prepare(PLAIN, prompt, sampling, catalog)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-0.1),
        Sampling(temperature=math.nan),
        Sampling(top_p=0.0),
        Sampling(top_p=1.1),
        Sampling(top_k=-1),
        Sampling(min_p=2.0),
        Sampling(repetition_penalty=0.0),
        Sampling(presence_penalty=math.inf),
        Sampling(max_tokens=-1),
        Sampling(min_tokens=3, max_tokens=2),
        Sampling(allowed_token_ids=()),
        Sampling(stop=("",)),
        Sampling(logit_bias=((1, math.inf),)),
        Sampling(logprobs=-1),
    ],
)
def test_values_out_of_range(catalog: dict[str, Entry], sampling: Sampling) -> None:
    with pytest.raises(BadRequest) as caught:
        prepare(PLAIN, "hello", sampling, catalog)
    assert caught.value.param


def test_an_empty_prompt_needs_a_token_to_start_with(catalog: dict[str, Entry]) -> None:
    for prompt in ("", (), Chat(())):
        with pytest.raises(BadRequest, match="prompt is empty for role 'main'"):
            prepare(PLAIN, prompt, Sampling(), catalog)
    program = Program("plain", Policy((Term("main", Role("with-bos")),)))
    assert prepare(program, "", Sampling(), catalog).prompts == ((0,),)
