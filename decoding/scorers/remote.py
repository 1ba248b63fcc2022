"""Scorers on other servers, which the operator configures: vLLM's pooling endpoints, or a judge behind OpenAI's API.

No URL ever comes from a client. `httpx` is imported when a scorer is first asked, so that the engine starts fast.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from decoding.core import BadRequest, EngineFailure, Message, ModelLoadError
from decoding.scorers.renderings import JUDGE_QUESTION
from decoding.scorers.spec import Hypothesis
from decoding.text import Chat, content_text

RemoteKind = Literal["pooling", "score", "classify", "openai"]
_PATHS = {"pooling": "/pooling", "score": "/score", "classify": "/classify", "openai": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """A scorer elsewhere, as the operator configures it.

    url: the server's root, with or without /v1. kind: which of its endpoints is asked. model: its name there.
    api_key_env: the environment variable that holds the key. timeout: seconds a call may take. label: which class's
    number counts where there are several (-1: the last). step_marker: pooling only; a PRM's, put after each step, whose
    answer has one row per step. question: openai only; holds {answer} once, and {prompt}.
    """

    id: str
    url: str
    kind: RemoteKind = "pooling"
    model: str = ""
    api_key_env: str | None = None
    timeout: float = 60.0
    label: int = -1
    step_marker: str | None = None
    question: str = JUDGE_QUESTION

    def __post_init__(self) -> None:
        if self.kind not in _PATHS:
            raise ModelLoadError(f"The remote scorer '{self.id}' is of kind '{self.kind}'; use {', '.join(_PATHS)}.")
        if not re.match(r"https?://[^/]", self.url):
            raise ModelLoadError(f"The remote scorer '{self.id}' needs a URL that begins with http:// or https://.")
        if self.step_marker is not None and self.kind != "pooling":
            raise ModelLoadError(f"The remote scorer '{self.id}' has a step_marker, which is for kind pooling.")
        if self.question.count("{answer}") != 1:
            raise ModelLoadError(f"The question of the remote scorer '{self.id}' must hold {{answer}} just once.")
        if not self.timeout > 0:
            raise ModelLoadError(f"The timeout of the remote scorer '{self.id}' must be above 0 seconds.")


class RemoteScorer:
    """Asks a scorer elsewhere; safe to call from several threads.

    blocks: it waits for another machine. approximate: its number comes from the likeliest tokens only.
    """

    blocks = True

    def __init__(self, spec: RemoteSpec, transport: Any = None) -> None:
        self.spec = spec
        self.one_number = spec.step_marker is None
        self.approximate = spec.kind == "openai"
        self._transport, self._lock = transport, threading.Lock()
        self._client: Any = None

    def score(self, text: Hypothesis) -> list[float]:
        """One number, or with `step_marker` one per step. Raises EngineFailure, and BadRequest for token-id prompts."""
        body: dict[str, Any] = {"model": self.spec.model} if self.spec.model else {}
        answer = self._ask(body | self._question(text))
        try:
            values = self._numbers(answer, len(text.steps or ("",)))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineFailure(
                f"The remote scorer '{self.spec.id}' gave an answer that a {self.spec.kind} endpoint does not give."
            ) from error
        if not all(math.isfinite(value) for value in values):
            raise EngineFailure(f"The remote scorer '{self.spec.id}' gave a number that is not finite.")
        return values

    def _question(self, text: Hypothesis) -> dict[str, Any]:
        spec, messages = self.spec, _messages(text)
        if spec.kind == "score":
            return {"text_1": _transcript(messages), "text_2": text.text}
        if spec.kind == "classify":
            return {"input": f"{_transcript(messages)}\n\n{text.text}"}
        if spec.kind == "openai":
            before, after = (
                part.replace("{prompt}", _transcript(messages)) for part in spec.question.split("{answer}")
            )
            asked = {"role": "user", "content": f"{before}{text.text}{after}"}
            return {"messages": [asked], "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        steps = list(text.steps) or [""]
        if isinstance(text.prompt, Chat) and text.prompt.continue_final_message:
            steps[0] = messages.pop()["content"] + steps[0]  # the answer goes on with what the prompt began
        marker = spec.step_marker
        said = "".join(steps) if marker is None else "".join(step.strip() + marker for step in steps)
        return {"messages": [*messages, {"role": "assistant", "content": said}], "add_generation_prompt": False}

    def _ask(self, body: Mapping[str, Any]) -> Any:
        import httpx

        spec = self.spec
        key = os.environ.get(spec.api_key_env, "") if spec.api_key_env else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        root = spec.url.rstrip("/").removesuffix("/v1")
        with self._lock:
            if self._client is None:
                self._client = httpx.Client(timeout=spec.timeout, transport=self._transport)
        try:
            response = self._client.post(root + _PATHS[spec.kind], json=dict(body), headers=headers)
        except httpx.HTTPError as error:
            reason = "took too long" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
            raise EngineFailure(f"The remote scorer '{spec.id}' {reason}: {type(error).__name__}.") from error
        if response.status_code != 200:
            said = " ".join(response.text.split())[:200]
            raise EngineFailure(f"The remote scorer '{spec.id}' answered with status {response.status_code}: {said}")
        try:
            return response.json()
        except ValueError as error:
            raise EngineFailure(f"The remote scorer '{spec.id}' answered with something that is not JSON.") from error

    def _numbers(self, answer: Any, steps: int) -> list[float]:
        if self.spec.kind == "openai":
            return [self._expected_digit(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"])]
        (found,) = answer["data"]
        if self.spec.kind == "score":
            return [float(found["score"])]
        if self.spec.kind == "classify":
            return [float(found["probs"][self.spec.label])]
        rows = found["data"] if isinstance(found["data"][0], list) else [found["data"]]
        values = [float(row[self.spec.label]) for row in rows]
        if self.spec.step_marker is None:
            return values[-1:]
        if len(values) != steps:
            raise EngineFailure(f"The remote scorer '{self.spec.id}' gave {len(values)} numbers for {steps} steps.")
        return values

    def _expected_digit(self, likeliest: Sequence[Mapping[str, Any]]) -> float:
        """sum_i i P(i) / sum_j P(j) over the digits among the likeliest tokens."""
        found = [(int(e["token"]), float(e["logprob"])) for e in likeliest if re.fullmatch(r"\s*[0-9]", e["token"])]
        if not found:
            raise EngineFailure(f"The remote scorer '{self.spec.id}' was asked for a digit and gave none.")
        best = max(logprob for _, logprob in found)
        weights = [math.exp(logprob - best) for _, logprob in found]
        return sum(weight * digit for weight, (digit, _) in zip(weights, found)) / sum(weights)


def _messages(text: Hypothesis) -> list[Message]:
    prompt = text.prompt
    if isinstance(prompt, Chat):
        return [{"role": message.get("role"), "content": content_text(message)} for message in prompt.messages]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    raise BadRequest("A remote scorer needs a text prompt or messages, not token ids.", "prompt")


def _transcript(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
