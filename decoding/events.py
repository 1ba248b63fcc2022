"""What the engine tells: tokens, traces, usage, and what it holds and has done. Plain data that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from decoding.core import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the mix at T = 1, natural log, and of the best ones (id, log-prob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RoleTrace:
    """What one role thought of a token: its own log-probability at T = 1, and its weight in the mix."""

    role: str
    logprob: float
    weight: float


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """How a token came about: the mix's log-probability of it, its rank in the first role (0 is best), every role.

    `accepted`: the rule that accepted it, for a token that was drafted: the exact one, or the name of a lossy one.
    """

    token_id: int
    logprob: float
    rank: int
    roles: tuple[RoleTrace, ...]
    drafted: bool = False
    accepted: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice. `text` is what may be shown now; `finish_reason` is set on the last one.

    `stop_reason`: the stop string or stop id that ended the text, None for EOS and length.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    trace: tuple[TokenTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's ids under the mix; the first entry is None. Sent once, before any Delta."""

    request_id: str
    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is, in a sentence and numbers; sent to requests that ask for it."""

    request_id: str
    message: str
    numbers: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateReport:
    """One hypothesis of a search: its text, what it was ranked by, the scorer's own numbers, why it is no full answer.

    `answer`: what was extracted from it for a vote. `tokens`: how many it has.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None
    score: float | None = None
    scores: tuple[float, ...] = ()
    answer: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class SearchReport:
    """How a search went. `reason`: a sentence if it did not go as asked, with the budget that ran out, if one did.

    `generated`: tokens of all hypotheses, dropped ones too. `scored`: tokens that scorer models computed, by model.
    `candidates`: all of them, best first, if the request asks for them, else none. `read`: tokens of the prompts and of
    the scorers' texts that it opened, however many were computed; `cached`: those that the prefix cache held.
    """

    kind: str
    reason: str
    exhausted: str | None
    branches: int
    generated: int
    scored: tuple[tuple[str, int], ...]
    candidates: tuple[CandidateReport, ...] = ()
    details: tuple[tuple[str, Any], ...] = ()
    read: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. `forwards`: (model id, forward passes it took part in).

    `passes`: how often the policy was evaluated for it; tokens per pass is the block efficiency. `drafted` counts
    drafts that were verified, `accepted` those of them that became part of the text.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    preemptions: int = 0
    forwards: tuple[tuple[str, int], ...] = ()
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    search: SearchReport | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Every choice of the request has finished (or it was aborted); nothing more follows."""

    request_id: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended in an error; nothing more follows. `kind` is the exception's class name."""

    request_id: str
    kind: Literal["BadRequest", "UnknownModel", "Overloaded", "EngineFailure"]
    message: str
    param: str | None = None
    code: str | None = None


Event = Delta | PromptLogprobs | Progress | Done | Failed


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A loaded adapter: the model that it is on, a digest of its weights, its number of parameters."""

    of: str
    generation: str
    parameters: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine tells about a loaded model: `width` is the logits' width, `kv_tokens` the pool's capacity.

    An adapter names the model that it is `of`; all but id and parameters are then that model's. One of the kinds
    `SCORERS` can be no role of a policy.
    """

    id: str
    max_model_len: int
    width: int
    kv_tokens: int
    parameters: int
    dtype: str
    device: str
    of: str | None = None
    kind: str = "causal"


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Counters of one model since start, except `kv_used` (share of blocks in use now, 0 to 1)."""

    id: str
    forwards: int
    tokens: int
    forward_seconds: float
    kv_used: float
    prefix_hits: int
    prefix_queries: int


@dataclass(frozen=True, slots=True)
class DraftStats:
    """Drafts of one proposer for one model since start, by position in the draft (the first one first)."""

    draft: str
    target: str
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the engine: gauges `running`, `waiting` in sequences; the rest are counters since start."""

    running: int
    waiting: int
    ticks: int
    preemptions: int
    aborts: int
    models: tuple[ModelStats, ...]
    drafts: tuple[DraftStats, ...] = ()
