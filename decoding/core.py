"""What the engine is asked: programs, requests, settings; and the exceptions that users see.

Frozen plain data that may cross a process boundary; what changes while a request runs is in `decoding.state`. Nothing
here knows about HTTP, JSON or a strategy's name.

Exception tree::

    TrimtabError
    ├── BadRequest          the request cannot be served as asked (HTTP 400); `param` names the field
    ├── UnknownModel        a model id that is not served (HTTP 404)
    ├── Overloaded          the queue is full (HTTP 503 with Retry-After)
    ├── ModelLoadError      a model directory cannot be loaded or would be served wrongly (start-up)
    │   └── AdapterInUse    an adapter cannot be replaced or unloaded now (HTTP 409)
    └── EngineFailure       a request failed inside the engine (HTTP 500)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

Message = Mapping[str, Any]  # a chat message as OpenAI defines it: {"role": ..., "content": ...}
FinishReason = Literal["stop", "length", "abort", "error"]
ViewKind = Literal["auto", "plain", "chat", "system", "prefix", "messages", "text"]
MAX_WEIGHT = 1e6  # of a term; beyond it, differences of logits overflow
SCORERS = ("reward", "prm")  # kinds of models that score texts and give no next-token distribution


class TrimtabError(Exception):
    """Base of every error that Trimtab raises for its users."""


class BadRequest(TrimtabError):
    """The request cannot be served as asked.

    `param` names the field in the request, `code` is OpenAI's machine-readable code if there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class UnknownModel(BadRequest):
    """A model id that this server does not serve."""

    def __init__(self, model: str, known: Seq[str] = (), param: str | None = "model") -> None:
        served = f" Served: {', '.join(known)}." if known else ""
        super().__init__(f"The model '{model}' does not exist.{served}", param, "model_not_found")


class Overloaded(TrimtabError):
    """The queue is full; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelLoadError(TrimtabError):
    """A model cannot be loaded, or could be loaded but would be served wrongly."""


class AdapterInUse(ModelLoadError):
    """An adapter cannot be replaced or unloaded while something uses it."""


class EngineFailure(TrimtabError):
    """A request failed inside the engine through no fault of its own."""


# ---------------------------------------------------------------------------------------------------------------
# Programs: what a request asks for


@dataclass(frozen=True, slots=True)
class View:
    """What a role is shown of the request (design: views).

    auto      chat request: the model's chat template, else the plain view; text prompt: the text
    plain     message contents joined by blank lines (or the model's `plain_template`)
    chat      a text prompt becomes the user turn of the model's chat template
    system    as auto, under the system prompt `text`
    prefix    `text` stands before the plain view or the text prompt
    messages  another conversation altogether
    text      another text altogether
    """

    kind: ViewKind = "auto"
    text: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Role:
    """A model as one term of a policy uses it: the model, an adapter on it or none, and a view of the request."""

    model: str
    adapter: str | None = None
    view: View = View()


@dataclass(frozen=True, slots=True)
class Gate:
    """The tokens on which a term counts: the top-p set of term `of` at temperature 1, the crossing token included.

    `outside` says what the other tokens keep: "base" the ungated terms alone, "of" the log-probs of term `of`, "drop"
    nothing (they are masked).
    """

    of: str
    top_p: float
    outside: Literal["base", "of", "drop"] = "base"


@dataclass(frozen=True, slots=True)
class Plausibility:
    """Tokens whose probability under term `of` is below `ratio` times the best allowed token's are masked."""

    of: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Term:
    """One weighted summand of the mixed logits; with a gate, on the gate's tokens only."""

    name: str
    role: Role
    weight: float = 1.0
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """A weighted mix of models' rows, fp32: sum of ungated terms w_j z_j + 1[v in gate_j] w_j z_j of the gated ones.

    A term of weight 0 is dropped, not multiplied. `logprobs`: rows are log-softmaxed first (whatever is not shift
    invariant on raw logits needs it; gates imply it). `solver`: an entry of `decoding.solvers` that sets the weights
    row by row; the terms' own weights then only say which of them count as steering the text.
    """

    terms: tuple[Term, ...]
    logprobs: bool = False
    plausibility: Plausibility | None = None
    solver: Solver | None = None

    def __post_init__(self) -> None:
        assert self.terms, "a policy has at least one term"
        names = [term.name for term in self.terms]
        assert len(set(names)) == len(names), f"term names repeat: {names}"
        used = [term.gate.of for term in self.terms if term.gate] + (
            [self.plausibility.of] if self.plausibility else []
        )
        assert set(used) <= set(names), f"a gate or the plausibility names no term: {used}"


class Solver(Protocol):
    """Sets a policy's weights per row. Frozen and hashable; its state changes with accepted tokens only.

    `stateful` False promises that no row's weights depend on the state.
    """

    @property
    def stateful(self) -> bool: ...

    def weights(self, rows: Seq[torch.Tensor], states: Seq[Any], starts: torch.Tensor) -> torch.Tensor:
        """Weights [n, J] from the J terms' log-prob rows [n, W]; `starts` [W]: ids that begin a new word (or EOS)."""
        ...

    def advance(self, state: Any, weights: Seq[float], token: int) -> Any:
        """The state after `token` was accepted from a row mixed with `weights`; None is the first state."""
        ...


def says(description: str) -> dict[str, str]:
    """Metadata of a parameter's field: what schemas and documentation say about it."""
    return {"description": description}


AcceptKind = Literal["rejection", "coupled", "judge", "kl", "mixture", "typical"]
LOOKUPS = ("ngram", "prediction")  # proposers that are no model


@dataclass(frozen=True, slots=True)
class Speculation:
    """Who drafts tokens ahead of the policy, and which drafts are accepted (rules: `decoding.rules`)."""

    draft: str = field(default="auto", metadata=says('A model\'s id, "ngram", "prediction" or "auto".'))
    tokens: int | Literal["auto"] = field(
        default="auto", metadata=says('Drafts per pass; "auto": by measured acceptance and cost, down to 0.')
    )
    accept: AcceptKind | None = field(
        default=None, metadata=says('The acceptance rule; by default "coupled" with a seed, else "rejection".')
    )
    threshold: float | None = field(
        default=None,
        metadata=says("judge: probability from which a draft counts as right; kl: nats within which models agree."),
    )
    weight: float = field(default=0.5, metadata=says("mixture: the policy's share in what is verified against."))
    kappa: float = field(
        default=3.0, metadata=says("judge of a mix: how many nats below the best token a draft may be.")
    )
    certain: float | None = field(
        default=None, metadata=says("kl: the exact rule alone where the policy's best probability is above it.")
    )
    epsilon: float = field(default=0.09, metadata=says("typical: accept where p > min(epsilon, delta exp(-entropy))."))
    delta: float = field(default=0.3, metadata=says("typical: see epsilon."))
    bonus: bool | None = field(
        default=None,
        metadata=says("Whether the policy adds a token of its own when all drafts pass; by default all but judge."),
    )
    max_ngram: int = field(default=3, metadata=says("ngram, prediction: the longest run that is looked up."))


class Constraint(Protocol):
    """Which ids may come next, token by token, with roll-back: what a grammar looks like to the engine."""

    def allowed(self, width: int) -> torch.Tensor:
        """Ids that may come next: [width] bool."""
        ...

    def advance(self, token: int) -> None:
        """`token`, which was allowed, was chosen (or drafted)."""
        ...

    def rollback(self, count: int) -> None:
        """Undo the last `count` calls of `advance`."""
        ...


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """A search on top of a policy: its `kind`, an entry of the dict of searches, and that kind's parameters.

    Budgets: `max_total_tokens` of all hypotheses together (a scorer's own not counted), `max_candidates` branches that
    may ever be forked or opened, `max_seconds`. `progress`: whether the client is told how far it is. `candidates`:
    whether the report lists all of them. `sampled`: whether the request sets a temperature of its own.
    """

    kind: str
    params: Any
    max_total_tokens: int | None = None
    max_candidates: int | None = None
    max_seconds: float | None = None
    progress: bool = False
    candidates: bool = False
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """What the next-token distribution of a request is. `strategy` is a label for reports only.

    `lossless` says whether the text is an exact sample of the policy; `trace` asks for every role's part in each token;
    `speculation` changes how fast tokens come, and with a lossy rule also which; `search` is what is done with several
    hypotheses.
    """

    strategy: str
    policy: Policy
    lossless: bool = True
    trace: bool = False
    speculation: Speculation | None = None
    search: SearchPlan | None = None

    @classmethod
    def plain(cls, model: str) -> Program:
        """The model's own next-token distribution."""
        return cls("plain", Policy((Term("base", Role(model)),)))

    @property
    def models(self) -> tuple[str, ...]:
        """Model ids that the program uses, in order of first use."""
        return tuple(dict.fromkeys(term.role.model for term in self.policy.terms))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from the mixed distribution, and when to stop. Defaults are OpenAI's.

    top_k 0, top_p 1, min_p 0 are off; temperature 0 is greedy. `logprobs` and `prompt_logprobs`: None is off,
    k >= 0 reports the chosen token and the k best. `max_tokens` None: as many as fit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A program with its prompts rendered to ids, ready for the engine.

    `prompts` has one id list per term of the policy, in order; `text_model` names the model whose tokenizer
    turns output ids into text; `eos_ids` are the stop ids of the mix, `width` its number of ids. The first term is
    the request's main one. `prediction`: ids that the client expects, if drafts come from them. `constraint` makes one
    constraint per choice. `prompt`: what the client sent (a `decoding.text.Prompt`), for searches, which show it to
    other models too.
    """

    id: str
    program: Program
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    text_model: str
    width: int
    eos_ids: tuple[int, ...] = ()
    n: int = 1
    salt: str = ""
    arrival: float = field(default_factory=time.monotonic)
    prediction: tuple[int, ...] = ()
    constraint: Callable[[], Constraint] | None = None
    prompt: Any = None

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.program.policy.terms), "one prompt per term"

    @property
    def sequences(self) -> int:
        """How many it puts into the queue: one per choice, of a search its root."""
        return self.n if self.program.search is None else 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One entry of the `models` section of the configuration: what to load and how to serve it."""

    id: str
    path: str
    kind: Literal["causal", "reward", "prm", "guard", "judge", "adapter", "self_eval"] = "causal"
    of: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    kv_memory: int | None = None
    plain_template: str | None = None
    view: str | None = None
    trust_remote_code: bool = False
    step_marker: str | None = None
    score_tokens: tuple[str, ...] | None = None
    rendering: str | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Engine-wide settings. Memory in bytes; `kv_memory` None takes a share of what is free after loading.

    `compile_from`: a model with fewer parameters is not compiled and starts at once, for half a millisecond a tick.
    `adapters`: some may be loaded while it serves, which `warm_up` then prepares for.
    `max_search_tokens`: what tokens that searches draw or try, and texts that scorers read, may take of a tick in
    which other requests wait for their next token, in units of the dearest model's tokens; or as much as these take,
    if that is more. None: 32 on a CPU, 512 on a GPU.

    `kernels`: what mixes and samples: "triton", "reference" (the kernels' specifications), "host", by default "triton"
    on CUDA and "host" elsewhere. `side_streams`: on CUDA, the models of a tick run beside each other.
    `batch_invariant`: forwards of one fixed shape, so that a row's logits do not depend on what else is in the batch.
    """

    kv_memory: int | None = None
    block_size: int = 16
    kernels: Literal["auto", "host", "triton", "reference"] = "auto"
    side_streams: bool = True
    batch_invariant: bool = False
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_logit_rows: int = 512
    max_search_tokens: int | None = None
    max_queue: int = 1024
    prefix_cache: bool = True
    compile: bool = True
    compile_from: int = 10_000_000
    self_check: bool = True
    threads: int | None = None
    adapters: bool = False
