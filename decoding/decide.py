"""What the rows of a tick say: mixed, prompts scored, drafts verified, tokens drawn, traces written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from decoding.accept import Check, verify
from decoding.download import Download
from decoding.events import TokenLogprob
from decoding.hosting import Rows
from decoding.judge import JudgeHead
from decoding.mix import Mixed, mix
from decoding.plan import Sample
from decoding.sampling import Drawn, Position, hard_mask, processes, reported
from decoding.state import Group, Sequence, Told
from decoding.tell import score_fed, score_prompts, tell_goals
from decoding.text import TextModel
from decoding.trace import Chosen, trace
from decoding.upload import uploaded


@dataclass(slots=True)
class Decision:
    """tokens: what each sequence that is due gets, drafts first. weights: a solver's, [J] per token of a sequence.

    scored: log-probs of prompt ids, by request. told, fed: what goals of searches want to know of the next row, and the
    log-probs of ids that were fed.
    """

    tokens: dict[Sequence, list[Drawn]] = field(default_factory=dict)
    weights: dict[Sequence, list[list[float]]] = field(default_factory=dict)
    scored: list[tuple[Group, list[TokenLogprob]]] = field(default_factory=list)
    told: dict[Sequence, Told] = field(default_factory=dict)
    fed: dict[Sequence, list[float]] = field(default_factory=dict)


class _Due(NamedTuple):
    """Rows [n, W] that draw tokens, which of them are processed already, and each one's maximum if that is known."""

    z: torch.Tensor
    processed: Set[int]
    best: torch.Tensor | None


_Answer = tuple[Decision, list[list[Drawn]], dict[int, list[float]]]  # what is told, drawn, and solvers' weights by row


class Decider:
    """`text_of` gives a model's text side, for solvers that look at words; `judges` the judge heads by model.

    kernel: see `decoding.mix.mix`.
    """

    def __init__(
        self,
        device: torch.device,
        generator: torch.Generator,
        text_of: Callable[[str], TextModel],
        judges: Mapping[str, JudgeHead],
        kernel: bool | None = None,
    ) -> None:
        self._kernel = kernel
        self._device, self._generator, self._text_of, self._judges = device, generator, text_of, judges
        self._word_starts: dict[tuple[str, int], torch.Tensor] = {}

    def decide(self, samples: Seq[Sample], rows: Mapping[str, Rows]) -> Decision:
        """Everything that the samples' rows decide. Changes nothing: a batch that failed may be tried again."""
        mixed = mix(samples, rows, self._allowed, self._starts, self._kernel, self._processed)
        index: list[int] = []  # the rows of z that draw tokens
        checks: list[Check] = []
        row = 0
        for sample in samples:
            row += sample.count
            if sample.draws:
                checks.append(Check(sample.sequence, len(index), self._scores(sample, rows)))
                index += range(row - sample.drafts - 1, row)
        due = self._due(mixed, index)
        answer = self._on_host if self._kernel is None else self._on_device
        decision, found, weights = answer(samples, mixed, due, checks)
        for check, drawn in zip(checks, found, strict=True):
            decision.tokens[check.sequence] = drawn
            first = index[check.start]
            if first in weights:
                decision.weights[check.sequence] = [weights[first + i] for i in range(len(drawn))]
        _trace([sample for sample in samples if sample.draws], decision, rows)
        return decision

    def _due(self, mixed: Mixed, index: Seq[int]) -> _Due:
        """The rows of the mix that draw tokens."""
        processed = {i for i, row in enumerate(index) if row in mixed.processed}
        if len(index) == len(mixed.z):
            return _Due(mixed.z, processed, mixed.best)
        at = uploaded(list(index), self._device, torch.int64)
        return _Due(mixed.z[at], processed, None if mixed.best is None else mixed.best[at])

    def _on_host(self, samples: Seq[Sample], mixed: Mixed, due: _Due, checks: Seq[Check]) -> _Answer:
        scored, fed = score_prompts(samples, mixed.z), score_fed(samples, mixed.z)
        decision = Decision(scored=scored, fed=fed, told=tell_goals(samples, mixed.z))
        if not checks:
            return decision, [], {}
        found, down = verify(due.z, checks, self._generator), Download()
        weights = mixed.weights(down)
        down.fetch()
        return decision, found, weights()

    def _on_device(self, samples: Seq[Sample], mixed: Mixed, due: _Due, checks: Seq[Check]) -> _Answer:
        """The same, in one download."""
        from decoding.device_tell import Tellings  # these need triton
        from decoding.device_verify import verify_on_device

        assert self._kernel is not None
        down = Download()
        tellings = Tellings(samples, mixed.z, down, self._kernel)
        verified = partial(verify_on_device, due.z, checks, self._generator, down, self._kernel)
        found = verified(due.processed, due.best) if checks else list
        weights = mixed.weights(down) if checks else dict
        down.fetch()
        scored, fed, told = tellings.told()
        return Decision(scored=scored, fed=fed, told=told), found(), weights()

    def forget(self, model: str) -> None:
        """The text side of `model` has changed."""
        self._word_starts = {key: mask for key, mask in self._word_starts.items() if key[0] != model}

    def _scores(self, sample: Sample, rows: Mapping[str, Rows]) -> torch.Tensor | None:
        """The judge head's logits at the drafts' own positions, [k], if the request's rule asks for a judge."""
        draft = sample.sequence.draft
        if draft is None or not judged(sample):
            return None
        track = sample.sequence.group.term_tracks[0]
        model = sample.sequence.tracks[track].model
        hidden = rows[model].hidden
        assert hidden is not None, "the forward was asked for hidden states"
        last = sample.offsets[track] + sample.count
        return self._judges[sample.sequence.group.request.text_model].score(hidden[last - sample.drafts : last])

    def _allowed(self, sample: Sample, i: int) -> torch.Tensor | None:
        """Ids that hard constraints leave at the sample's i-th row; those that score the prompt have none."""
        behind = sample.first + i - (len(sample.sequence.output) - 1)
        if behind < 0:
            return None
        drafts = sample.sequence.draft.tokens if sample.sequence.draft else []
        return hard_mask(Position(sample.sequence, tuple(drafts[:behind])), sample.sequence.group.width, self._device)

    def _processed(self, sample: Sample, i: int) -> Position | None:
        """Where the sample's i-th row is, if it is drawn from and nobody reads it before the processors change it.

        Log-probs are of the row before, and so is what rules that compare models or judge see of drafted rows.
        """
        sequence = sample.sequence
        behind = sample.first + i - (len(sequence.output) - 1)
        if behind < 0 or not sample.draws or reported(sequence) is not None:
            return None
        rule = Check(sequence, 0).rule
        if behind < sample.drafts and (rule.compares or rule.judges):
            return None
        at = Position(sequence, tuple(sequence.draft.tokens[:behind]) if sequence.draft else ())
        return at if processes(at) else None

    def _starts(self, model: str, width: int) -> torch.Tensor:
        """Ids that begin a new word of `model`'s text, or end it: [width] bool. Made once per model and width."""
        if (model, width) not in self._word_starts:
            text = self._text_of(model)
            size = len(text.vocabulary.tokens)
            ends = set(text.eos_ids)
            begins = [
                i in ends or (i < size and text.vocabulary.token_bytes(i)[:1] in (b" ", b"\n")) for i in range(width)
            ]
            self._word_starts[model, width] = uploaded(begins, self._device, torch.bool)
        return self._word_starts[model, width]


def _trace(due: Seq[Sample], decision: Decision, rows: Mapping[str, Rows]) -> None:
    """Fill in the traces of requests that ask for them."""
    chosen: list[Chosen] = []
    filled: list[Drawn] = []
    for sample in due:
        if not sample.sequence.group.request.program.trace:
            continue
        weights = decision.weights.get(sample.sequence)
        first = sample.count - sample.drafts - 1
        for i, each in enumerate(decision.tokens[sample.sequence]):
            if each.token is not None and each.logprob:
                own = weights[i] if weights else None
                chosen.append(Chosen(sample, first + i, each.token, each.logprob.logprob, own, each.accepted))
                filled.append(each)
    if chosen:
        for each, entry in zip(filled, trace(chosen, rows), strict=True):
            each.trace = entry


def judged(sample: Sample) -> bool:
    """Whether its drafts are judged, for which the policy's main model gives its hidden states too."""
    return bool(sample.drafts) and Check(sample.sequence, 0).rule.judges


def add_drafted_rows(samples: Seq[Sample], rows: dict[str, Rows]) -> None:
    """Roles that drafted have computed rows on the way: put them, and the one from the forward, behind each other."""
    for model in list(rows):
        more: list[torch.Tensor] = []
        end = len(rows[model].logits)
        for sample in samples:
            draft = sample.sequence.draft
            if draft is None or draft.role is None or not draft.rows or sample.spans[draft.role].track.model != model:
                continue
            own = sample.offsets[draft.role]
            more += [torch.stack(draft.rows), rows[model].logits[own : own + 1]]
            sample.offsets[draft.role] = end
            end += len(draft.rows) + 1
        if more:
            rows[model] = Rows(torch.cat([rows[model].logits, *more]), rows[model].hidden)
