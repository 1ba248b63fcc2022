"""`POST /tokenize`, `/detokenize`, `GET /tokenizer_info`: a model's tokenizer for clients that have none."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from decoding.core import BadRequest, View
from decoding.prepare import Entry
from decoding.text import Chat
from server.catalog import Served
from server.routes.body import GONE, documented, parse
from server.schema import DetokenizeBody, TokenizeBody
from server.state import Shared

router = APIRouter()


def _entry(served: Served, name: str | None) -> Entry:
    """The model behind a name; scorers have tokenizers too."""
    return served.catalog[served.model_of(name)]


@router.post("/tokenize", **documented(TokenizeBody, "Ids of a text or a conversation."))
async def tokenize(request: Request, services: Shared) -> Any:
    """Ids as the model would see them; `add_special_tokens: false` leaves out the start of a text."""
    try:
        body = parse(await request.body(), TokenizeBody)
    except ClientDisconnect:
        return GONE
    entry = _entry(services.served, body.model)
    if body.messages is not None:
        messages = tuple(message.plain() for message in body.messages)
        generation = body.add_generation_prompt is not False
        chat = Chat(messages, add_generation_prompt=generation)
        ids = await asyncio.to_thread(entry.text.render, View(), chat)
    else:
        bos = body.add_special_tokens is not False
        ids = await asyncio.to_thread(entry.text.encode, body.prompt or "", bos)
    made: dict[str, Any] = {"count": len(ids), "max_model_len": entry.info.max_model_len, "tokens": ids}
    if body.return_token_strs:
        made["token_strs"] = [entry.text.vocabulary.tokens[token_id] for token_id in ids]
    return made


@router.post("/detokenize", **documented(DetokenizeBody, "The text of ids."))
async def detokenize(request: Request, services: Shared) -> Any:
    """The text, special tokens included."""
    try:
        body = parse(await request.body(), DetokenizeBody)
    except ClientDisconnect:
        return GONE
    entry = _entry(services.served, body.model)
    size = len(entry.text.vocabulary.tokens)
    if any(token_id >= size for token_id in body.tokens):
        raise BadRequest(f"A token id is outside the vocabulary (0 to {size - 1}).", "tokens")
    return {"prompt": await asyncio.to_thread(entry.text.decode, body.tokens, False)}


@router.get("/tokenizer_info", summary="What a client needs to know of a tokenizer.")
async def tokenizer_info(services: Shared, model: str | None = None) -> dict[str, Any]:
    """Special tokens, chat template and sizes."""
    entry = _entry(services.served, model)
    tokenizer = entry.text.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(entry.text.vocabulary.tokens),
        "model_max_length": entry.info.max_model_len,
        "chat_template": tokenizer.chat_template,
        **{name: None if (token := getattr(tokenizer, name)) is None else str(token) for name in names},
    }
