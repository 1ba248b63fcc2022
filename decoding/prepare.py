"""From what a client asks for to what the engine runs: `prepare` renders, checks and limits one request.

Used by the HTTP server and by `Engine.generate` alike, so every refusal is a `BadRequest` whose `param` is named as
in OpenAI's API and whose sentence says what would be accepted.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from decoding.core import MAX_WEIGHT, SCORERS, BadRequest, Constraint, Program, Request, Sampling, Term, UnknownModel
from decoding.draft import settle_speculation
from decoding.events import ModelInfo
from decoding.text import Prompt, TextModel, shared_vocabulary


@dataclass(frozen=True, slots=True)
class Entry:
    """A served model as `prepare` sees it: its text side, and what the engine tells about its weights."""

    text: TextModel
    info: ModelInfo


Catalog = Mapping[str, Entry]
MAX_TERMS = 32  # each is rendered and tokenised, and takes a track


def prepare(
    program: Program,
    prompt: Prompt,
    sampling: Sampling,
    catalog: Catalog,
    *,
    n: int = 1,
    salt: str = "",
    request_id: str | None = None,
    prompt_param: str = "prompt",
    search_param: str = "decoding.search",
    prediction: str | None = None,
    constraint: Callable[[], Constraint] | None = None,
) -> Request:
    """Renders every term's view of the prompt and checks the request against the models that it uses.

    `sampling.max_tokens` None becomes what fits. `prompt_param` is what the prompt is called in errors, `search_param`
    where a search's parameters stand. `prediction` is text that the answer may repeat, `constraint` makes what
    restricts each choice's tokens. Raises BadRequest (code `context_length_exceeded` if the prompt is too long) and
    UnknownModel.
    """
    from decoding.search.settle import settle_search  # searches ask for prompts to be prepared themselves

    sampling = settle_search(program, sampling, n, catalog, search_param)
    terms = program.policy.terms
    if len(terms) > MAX_TERMS:
        raise BadRequest(f"The policy has {len(terms)} terms; at most {MAX_TERMS} can be mixed.", "decoding")
    for term in terms:
        check_term(term, terms[0].role.model, catalog, f"decoding.{term.name}")
    width = shared_width(program, catalog)
    check_sampling(sampling, width)
    prompts = []
    for term in terms:
        ids = _render(term, prompt, catalog[term.role.model].text)
        _check_prompt(ids, term, catalog[term.role.model].info, prompt_param)
        prompts.append(tuple(ids))
    main = catalog[terms[0].role.model].text
    longest = catalog[terms[0].role.model].info.max_model_len
    predicted = tuple(main.encode(prediction, bos=False)[:longest]) if prediction else ()
    program = settle_speculation(program, prompts, sampling, catalog, bool(predicted))
    by_text = program.speculation is not None and program.speculation.draft == "prediction"
    return Request(
        id=request_id or f"req-{uuid.uuid4().hex}",
        program=program,
        prompts=tuple(prompts),
        sampling=_limit_tokens(sampling, terms, prompts, catalog),
        text_model=terms[0].role.model,
        eos_ids=_eos_ids(terms, catalog, width),
        width=width,
        n=n,
        salt=salt,
        arrival=time.monotonic(),
        prediction=predicted if by_text else (),
        constraint=constraint,
        prompt=prompt if program.search is not None else None,
    )


def check_term(term: Term, main: str, catalog: Catalog, param: str) -> None:
    """Whether `term` can be mixed with `main`, the policy's first model; `param` is what names its model.

    Raises UnknownModel, and BadRequest for a model that gives no next-token distribution or one over other tokens.
    """
    model = term.role.model
    if model not in catalog:
        raise UnknownModel(model, tuple(catalog), param=param)
    kind = catalog[model].info.kind
    if kind in SCORERS:
        raise BadRequest(
            f"'{model}' is served as a scorer (kind {kind}): it scores whole texts and gives no next-token "
            "distribution. A policy needs causal language models here; a reward that steers every token has to be an "
            "autoregressive reward model, which is one. A scorer of whole texts belongs where a 'scorer' is asked for.",
            param,
        )
    if abs(term.weight) > MAX_WEIGHT:
        raise BadRequest(f"The weight of '{term.name}' is {term.weight:g}; weights go up to {MAX_WEIGHT:g}.", param)
    if main in catalog and shared_vocabulary(catalog[main].text, catalog[model].text) is None:
        raise BadRequest(
            f"The models '{main}' and '{model}' cannot be mixed: their tokenizers give different tokens to the same "
            "ids. Name models of one family.",
            param,
        )


def shared_width(program: Program, catalog: Catalog) -> int:
    """Width of the mixed logits of terms that `check_term` has passed: the narrowest model's.

    Where one tokenizer is shorter than another, its padding ids are the other's tokens, so it limits the width too.
    """
    models = program.models
    width = min(catalog[model].info.width for model in models)
    lengths = {len(catalog[model].text.vocabulary.tokens) for model in models}
    return width if len(lengths) == 1 else min(width, *lengths)


def check_sampling(sampling: Sampling, width: int) -> None:
    """Raises BadRequest for a value outside its range; `width` is the mixed logits' width."""

    def check(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
        if not (low <= value <= high) or (open_low and value == low) or math.isnan(value):
            span = f"{'above' if open_low else 'at least'} {low:g}"
            span += "" if math.isinf(high) else f" and at most {high:g}"
            raise BadRequest(f"{name} must be {span}; it is {value}.", name)

    infinity = math.inf
    check("temperature", sampling.temperature, 0, 1e4)
    check("top_p", sampling.top_p, 0, 1, open_low=True)
    check("top_k", sampling.top_k, 0, infinity)
    check("min_p", sampling.min_p, 0, 1)
    check("repetition_penalty", sampling.repetition_penalty, 0.01, 100)
    check("presence_penalty", sampling.presence_penalty, -1e4, 1e4)
    check("frequency_penalty", sampling.frequency_penalty, -1e4, 1e4)
    check("min_tokens", sampling.min_tokens, 0, infinity)
    check("max_tokens", 0 if sampling.max_tokens is None else sampling.max_tokens, 0, infinity)
    check("logprobs", sampling.logprobs or 0, 0, width)
    check("prompt_logprobs", sampling.prompt_logprobs or 0, 0, width)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise BadRequest(f"min_tokens is {sampling.min_tokens}, above max_tokens {sampling.max_tokens}.", "min_tokens")
    if sampling.allowed_token_ids == ():
        raise BadRequest("allowed_token_ids is empty, so no token may be chosen.", "allowed_token_ids")
    if any(not stop for stop in sampling.stop):
        raise BadRequest("A stop string is empty.", "stop")
    if any(not math.isfinite(bias) for _, bias in sampling.logit_bias):
        raise BadRequest("A bias in logit_bias is not a finite number.", "logit_bias")
    _check_ids([i for i, _ in sampling.logit_bias], width, "logit_bias")
    _check_ids(sampling.allowed_token_ids or (), width, "allowed_token_ids")
    _check_ids(sampling.stop_token_ids, width, "stop_token_ids")


def _check_ids(ids: Sequence[int], width: int, param: str) -> None:
    for token_id in ids:
        if not 0 <= token_id < width:
            raise BadRequest(f"Token id {token_id} in {param} is outside the vocabulary (0 to {width - 1}).", param)


def _render(term: Term, prompt: Prompt, text: TextModel) -> list[int]:
    try:
        return text.render(term.role.view, prompt)
    except BadRequest as error:
        if term.role.view.kind != "messages":
            raise
        raise BadRequest(f"In the messages of role '{term.name}': {error.message}", "decoding") from error


def _check_prompt(ids: Sequence[int], term: Term, info: ModelInfo, param: str) -> None:
    if not ids:
        raise BadRequest(
            f"The prompt is empty for role '{term.name}' (model '{info.id}'), which has no token to start a text with. "
            "Give at least one token.",
            param,
        )
    _check_ids(ids, info.width, param)


def _limit_tokens(
    sampling: Sampling, terms: Sequence[Term], prompts: Sequence[Sequence[int]], catalog: Catalog
) -> Sampling:
    """Fills `max_tokens` with what fits into every role; refuses what does not fit, naming the role."""
    room = None
    for term, ids in zip(terms, prompts, strict=True):
        limit = catalog[term.role.model].info.max_model_len
        least = 1 if sampling.max_tokens is None else sampling.max_tokens
        if len(ids) + least > limit:
            asked = f"{least} more were asked for" if sampling.max_tokens is not None else "nothing could follow it"
            raise BadRequest(
                f"The maximum length of '{term.role.model}' is {limit} tokens; for role '{term.name}' the prompt has "
                f"{len(ids)} and {asked}. Shorten the prompt or ask for fewer tokens.",
                "max_tokens" if len(ids) < limit else None,
                "context_length_exceeded",
            )
        room = limit - len(ids) if room is None else min(room, limit - len(ids))
    assert room is not None, "a policy has at least one term"
    max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
    return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))


def _eos_ids(terms: Sequence[Term], catalog: Catalog, width: int) -> tuple[int, ...]:
    """Union of the EOS ids of the roles with a positive weight."""
    eos: dict[int, None] = {}
    for term in terms:
        if term.weight <= 0:
            continue
        for token_id in catalog[term.role.model].text.eos_ids:
            if token_id >= width:
                raise BadRequest(
                    f"'{term.role.model}' ends its answers with token {token_id}, which the mix of these models cannot "
                    f"produce (shared width {width}).",
                    "decoding",
                )
            eos[token_id] = None
    return tuple(eos)
