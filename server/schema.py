"""The bodies of requests, checked: pydantic models of `/v1/chat/completions`, `/v1/completions` and the tokenizer's.

Unknown fields are refused, null means absent, and types are strict as OpenAI's are (no "0.5" for a number). Fields of
the API that this version cannot honour are known here and refused with a sentence, unless their value means "off".
Ranges that depend on a model or a setting are checked where those are known, in `server.generation`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """Strict: unknown fields, numbers in strings and NaN are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{message}", {"message": message})


def _invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{message}", {"message": message})


def _only(*accepted: Any, why: str) -> BeforeValidator:
    """A field of which only the values that mean "off" are served yet."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in accepted):
            raise _refuse(why)
        return value

    return BeforeValidator(check)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_prompt(value: Any) -> Any:
    """A text, texts, token ids, or lists of token ids; nothing mixed and nothing empty."""
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    lists = isinstance(value, list) and all(_is_ids(item) for item in value)
    if isinstance(value, str) or (value and (texts or _is_ids(value) or lists)):
        return value
    raise _invalid("prompt must be a text, a list of texts, a list of token ids, or a list of such lists, not empty")


def _check_stop(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(s, str) for s in value)):
        return value
    raise _invalid("stop must be a text or a list of texts")


def _check_content(value: Any) -> Any:
    """A text, or parts of which only those of text are served."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _invalid("content must be a text or a list of parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise _refuse(f"Message parts of type '{kind}' are not supported: the models here read text only.")
        if not isinstance(part.get(kind), str) or set(part) - {"type", kind}:
            raise _invalid(f"a part of type '{kind}' has one more field, '{kind}', a text")
    return [part if part["type"] == "text" else {"type": "text", "text": part["refusal"]} for part in value]


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_PROMPT = {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}
_STOP = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}

Prompt = Annotated[Any, BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT)]
Content = Annotated[Any, BeforeValidator(_check_content), WithJsonSchema(_CONTENT)]
Stop = Annotated[Any, BeforeValidator(_check_stop), WithJsonSchema(_STOP)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """The fields that chat and text completions have in common. `temperature` None is 1."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: Int64 | None = None
    stop: Stop = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: list[TokenId] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    decoding: dict[str, Any] | None = None
    moderation: Annotated[Any, _only(None, False, why="moderation is not available in this version.")] = None
    # Accepted and without effect, as the API says.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise _invalid("stream_options may only be given when stream is true")
        return self


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    annotations: list[dict[str, Any]] | None = None
    audio: Annotated[Any, _only(None, why="Audio is not supported.")] = None
    function_call: Annotated[Any, _only(None, why="function_call is deprecated; use tool_calls.")] = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise _invalid(f"a message of role '{self.role}' needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as a chat template sees it: only what is there."""
        return self.model_dump(exclude_none=True, exclude={"annotations"})


_OFF_FORMATS = ({"type": "text"}, None)
_FORMAT_TEXT = 'Only response_format {"type": "text"} is available in this version.'


class Prediction(Body):
    """Text that the answer will largely repeat: drafts come from it."""

    type: Literal["content"]
    content: Content

    def text(self) -> str:
        """The predicted text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content or ())


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[Any, _only(None, ["text"], why='Only the modality "text" is served.')] = None
    tools: Annotated[Any, _only(None, [], why="tools are not available in this version; leave them out.")] = None
    tool_choice: Annotated[Any, _only(None, "none", "auto", why="tool_choice needs tools, which do not work yet.")] = (
        None
    )
    response_format: Annotated[Any, _only(*_OFF_FORMATS, why=_FORMAT_TEXT)] = None
    prediction: Prediction | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise _invalid("top_logprobs may only be given when logprobs is true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise _invalid("continue_final_message needs a last message of role 'assistant'")
        if self.continue_final_message and self.add_generation_prompt:
            raise _invalid("add_generation_prompt and continue_final_message exclude each other")
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Annotated[Any, _only(None, 1, why="best_of above 1 is not a field here; use n.")] = None
    suffix: Annotated[Any, _only(None, why="suffix (filling in the middle) is not supported.")] = None


class ScorePair(Body):
    """One text to be scored: what it answers, as a text or messages, and the answer."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    response: str

    @model_validator(mode="after")
    def _one_of_both(self) -> ScorePair:
        if (self.prompt is None) == (self.messages is None):
            raise _invalid("give either prompt or messages")
        return self


OneOrMore = Annotated[Any, BeforeValidator(_check_stop), WithJsonSchema(_STOP)]


class ScoreBody(Body):
    """`POST /v1/score`: pairs of prompt and response, or vLLM's `text_1` and `text_2`."""

    model: str | None = None
    input: Annotated[list[ScorePair], Field(min_length=1)] | None = None
    text_1: OneOrMore = None
    text_2: OneOrMore = None
    scorer: dict[str, Any] | None = None
    aggregate: Literal["last", "min", "prod", "mean"] | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    cache_salt: str | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _texts_are_given_once(self) -> ScoreBody:
        if (self.input is None) == (self.text_1 is None and self.text_2 is None):
            raise _invalid("give either input, or text_1 and text_2")
        if self.input is None and (self.text_1 is None or self.text_2 is None):
            raise _invalid("text_1 and text_2 go together")
        return self


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or messages as the model's chat template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise _invalid("give either prompt or messages")
        return self


class AdapterBody(Body):
    """`POST /admin/adapters`."""

    id: str
    path: str
    of: str


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
