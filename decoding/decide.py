"""What the rows of a tick say: mixed, prompts scored, drafts verified, tokens drawn, traces written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from decoding.accept import Check, verify
from decoding.events import TokenLogprob
from decoding.hosting import Rows
from decoding.judge import JudgeHead
from decoding.mix import mix
from decoding.sampling import Drawn, Position, hard_mask, log_softmax_rows, processes, reported, token_logprobs
from decoding.state import Group, Sample, Sequence, Told
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
        decision = Decision(scored=_score_prompts(samples, mixed.z))
        _tell(samples, mixed.z, decision)
        due: list[Sample] = []
        index: list[int] = []  # the rows of z that draw tokens
        firsts: list[int] = []
        row = 0
        for sample in samples:
            row += sample.count
            if sample.draws:
                due.append(sample)
                firsts.append(row - sample.drafts - 1)
                index += range(row - sample.drafts - 1, row)
        if not due:
            return decision
        z, best = mixed.z, mixed.best
        if len(index) < len(z):
            at = uploaded(index, self._device)
            z, best = z[at], None if best is None else best[at]
        checks: list[Check] = []
        start = 0
        for sample in due:
            checks.append(Check(sample.sequence, start, self._scores(sample, rows)))
            start += sample.drafts + 1
        found = self._verify(z, checks, {i for i, row in enumerate(index) if row in mixed.processed}, best)
        decision.tokens = {sample.sequence: drawn for sample, drawn in zip(due, found, strict=True)}
        weights = mixed.weights()
        for sample, drawn, first in zip(due, found, firsts, strict=True):
            if first in weights:
                decision.weights[sample.sequence] = [weights[first + i] for i in range(len(drawn))]
        _trace(due, decision, rows)
        return decision

    def _verify(
        self, z: torch.Tensor, checks: Seq[Check], processed: Set[int], best: torch.Tensor | None
    ) -> list[list[Drawn]]:
        if self._kernel is None:
            return verify(z, checks, self._generator)
        from decoding.device_verify import verify_on_device  # needs triton

        return verify_on_device(z, checks, self._generator, self._kernel, processed, best)

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
            begins = [i < size and text.vocabulary.token_bytes(i)[:1] in (b" ", b"\n") for i in range(width)]
            mask = torch.tensor(begins, device=self._device)
            mask[torch.tensor([i for i in text.eos_ids if i < width], dtype=torch.int64, device=self._device)] = True
            self._word_starts[model, width] = mask
        return self._word_starts[model, width]


def _score_prompts(samples: Seq[Sample], z: torch.Tensor) -> list[tuple[Group, list[TokenLogprob]]]:
    """Log-probs of the prompt ids that z's rows [S, W] predict, of requests that ask for them."""
    found: list[tuple[Group, list[TokenLogprob]]] = []
    row = 0
    for sample in samples:
        group, k = sample.sequence.group, sample.sequence.group.request.sampling.prompt_logprobs
        prompt = group.request.prompts[0]
        scored = min(sample.count, -1 - sample.first)  # rows that predict a prompt id
        if k is not None and group.prompt_logprobs is not None and scored > 0:
            at = len(prompt) + sample.first + 1
            lp = log_softmax_rows(z, list(range(row, row + scored)))
            found.append((group, token_logprobs(lp, prompt[at : at + scored], k)))
        row += sample.count
    return found


def _tell(samples: Seq[Sample], z: torch.Tensor, decision: Decision) -> None:
    """What goals want to know of z's rows [S, W], before the processors edit them."""
    row = 0
    for sample in samples:
        first, row = row, row + sample.count
        sequence, goal = sample.sequence, sample.sequence.goal
        if goal is None:
            continue
        width = sequence.group.width
        fed = [i for i in range(sample.count - sample.drafts) if 0 <= sample.first + i + 1 < len(sequence.output)]
        if fed:
            lp = torch.log_softmax(z[first : first + len(fed), :width], 1)
            tokens = torch.tensor([sequence.output[sample.first + i + 1] for i in fed], device=z.device)
            decision.fed[sequence] = lp.gather(1, tokens[:, None])[:, 0].tolist()
        if sample.ends and goal.told is None and (goal.top or goal.choices):
            lp = torch.log_softmax(z[row - sample.drafts - 1, :width], 0)
            choices = lp[torch.tensor(goal.choices, dtype=torch.int64, device=z.device)].tolist()
            mask = hard_mask(Position(sequence), width, z.device)
            if mask is not None:
                lp = lp.masked_fill(~mask, -torch.inf)
            decision.told[sequence] = Told(_best(lp, goal.top), choices)


def _best(lp: torch.Tensor, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens of lp [W], best first, ties to the lower id; none that are impossible."""
    if not k:
        return []
    (entry,) = token_logprobs(lp[None], [0], k)
    return [(token, value) for token, value in entry.top if value > -torch.inf]


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
