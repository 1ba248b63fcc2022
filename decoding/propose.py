"""Proposers: who drafts, token by token, before the policy is evaluated.

Draft models of all sequences run together, one packed forward per model and step; a role of the policy drafts on its
own track, and the rows that it computes on the way serve the mix. Drafts are drawn from the drafter's distribution
after the request's own processors, evaluated with the drafted prefix.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from decoding.choose import choose, draft_of
from decoding.hosting import Rows, SpanInput
from decoding.pace import Clock, Pace
from decoding.plan import Plan
from decoding.sampling import Position, hard_mask
from decoding.state import Draft, Group, Sequence

logger = logging.getLogger("trimtab.engine")


class _Lost:
    """In place of a constraint whose state is unknown: whoever asks it fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def allowed(self, width: int) -> torch.Tensor:
        """Raises."""
        raise self._error

    def advance(self, token: int) -> None:
        """Raises."""
        raise self._error

    def rollback(self, count: int) -> None:
        """Raises."""
        raise self._error


Forward = Callable[[str, list[SpanInput], set[Group]], Rows]


class Proposer:
    """Fills in the drafts of a plan. `forward` runs a model; `clock` is told what each draft step took.

    `pace` says how likely a draft of a given confidence passes: an adaptive draft ends where that gets too little.
    kernel: see `decoding.mix.mix`; with one, a draft step waits once for the device.
    """

    def __init__(
        self, forward: Forward, generator: torch.Generator, clock: Clock, pace: Pace, kernel: bool | None = None
    ) -> None:
        self._forward, self._generator, self._clock, self._pace = forward, generator, clock, pace
        self._kernel = kernel

    def propose(self, plan: Plan) -> None:
        """Draft up to `planned` tokens for every sequence of the plan that drafts, then settle the plan's rows.

        A drafter that fails drafts nothing: its requests go on without.
        """
        active: list[Sequence] = []
        for sequence in plan.drafting:
            draft = sequence.draft
            assert draft is not None
            if sequence.constraint is not None:
                try:
                    draft.masks.append(sequence.constraint.allowed(sequence.group.width))
                except Exception:
                    logger.exception("request %s cannot draft", sequence.group.request.id)
                    self._give_up(sequence)
                    continue
            for token in draft.lookup.propose(draft.planned) if draft.lookup else ():
                if not self._takes(sequence, token):
                    break
            if draft.lookup is None:
                active.append(sequence)
        while active:
            active = self._step(active)
        for sequence in plan.drafting:
            self._roll_back(sequence)
        plan.pack()

    def _step(self, active: list[Sequence]) -> list[Sequence]:
        """One more draft for every sequence; those that may go on."""
        by_model: dict[str, list[Sequence]] = {}
        for sequence in active:
            track = sequence.draft and sequence.draft.track
            assert track
            by_model.setdefault(track.model, []).append(sequence)
        left: list[Sequence] = []
        for model, members in by_model.items():
            began = time.perf_counter()
            try:
                left += self._draft(model, members)
            except Exception:
                # Whose fault it is shows when each drafts alone; what the failed step has left behind is undone.
                logger.exception("'%s' failed to draft for %d sequences", model, len(members))
                for sequence in members:
                    left += self._draft_alone(model, sequence)
                continue
            self._clock.saw(("draft", model), len(members), time.perf_counter() - began)
        return left

    def _draft_alone(self, model: str, sequence: Sequence) -> list[Sequence]:
        """One more draft for one sequence; if that fails, it drafts no more."""
        draft = draft_of(sequence)
        made = len(draft.tokens)
        for record in (draft.probs, draft.logprobs, draft.confidence):
            del record[made:]
        if draft.broken or made >= draft.planned:
            return []
        try:
            return self._draft(model, [sequence])
        except Exception:
            logger.exception("request %s drafts no more", sequence.group.request.id)
            self._give_up(sequence)
            return []

    def _draft(self, model: str, members: Seq[Sequence]) -> list[Sequence]:
        spans = []
        for sequence in members:
            draft = sequence.draft
            assert draft
            assert draft.track
            end = sequence.known(draft.track) + len(draft.tokens)
            start = draft.track.num_computed
            ids = sequence.ids(draft.track, start, end)
            spans.append(SpanInput(ids, start, draft.track.blocks, [end - start - 1], draft.track.adapter))
        logits = self._forward(model, spans, {sequence.group for sequence in members}).logits  # [n, V]
        z = _rows(logits, [s.group.width for s in members])
        chosen = self._choose(z, members)
        left = []
        for row, (sequence, token) in enumerate(zip(members, chosen, strict=True)):
            draft = sequence.draft
            assert draft
            assert draft.track
            if token is None or not self._takes(sequence, token):
                continue
            draft.track.num_computed = spans[row].start + len(spans[row].token_ids)
            if draft.role is not None:
                draft.rows.append(logits[row])
            if len(draft.tokens) < draft.planned and not _ends(sequence, token) and self._pays(sequence, draft):
                left.append(sequence)
        return left

    def _pays(self, sequence: Sequence, draft: Draft) -> bool:
        """Whether a next draft is likely enough to be reached, and to pass."""
        if draft.spec.tokens != "auto":
            return True
        draft.reached *= self._pace.chance(sequence, draft.confidence[-1])
        made = len(draft.tokens)
        return made >= len(draft.worth) or draft.reached * self._pace.acceptance(sequence) >= draft.worth[made]

    def _choose(self, z: torch.Tensor, members: Seq[Sequence]) -> list[int | None]:
        """One draft per row of z [n, W], and what the rules want to know of its distribution; None: nothing allowed."""
        if self._kernel is None:
            found = choose(z, members, self._generator)
        else:
            from decoding.device_draft import choose_on_device  # needs triton

            found = choose_on_device(z, members, self._generator, self._kernel)
        for row, (sequence, token) in enumerate(zip(members, found.tokens, strict=True)):
            if token is not None:
                found.record(row, sequence)
        return list(found.tokens)

    def _takes(self, sequence: Sequence, token: int) -> bool:
        """`_take`; a constraint that raises, which is the embedder's code, ends the drafts of its own request only."""
        try:
            return self._take(sequence, token)
        except Exception:
            logger.exception("request %s drafts no more", sequence.group.request.id)
            self._give_up(sequence)
            return False

    def _take(self, sequence: Sequence, token: int) -> bool:
        """Draft `token`, if the request's hard constraints allow it there."""
        draft = draft_of(sequence)
        width = sequence.group.width
        if token >= width:
            return False  # a token of one model that the mix cannot say
        if sequence.constraint is None:
            draft.tokens.append(token)
            return True
        mask = hard_mask(Position(sequence, tuple(draft.tokens)), width, draft.masks[0].device)
        if mask is not None and not bool(mask[token]):
            return False
        sequence.constraint.advance(token)
        draft.tokens.append(token)
        draft.masks.append(sequence.constraint.allowed(width))
        return True

    def _roll_back(self, sequence: Sequence) -> None:
        """The constraint is where the output ends again. One that cannot do that ends its request when it is asked."""
        draft = draft_of(sequence)
        if sequence.constraint is None or not draft.tokens:
            return
        try:
            sequence.constraint.rollback(len(draft.tokens))
        except Exception as error:
            logger.exception("request %s: its constraint does not roll back", sequence.group.request.id)
            sequence.constraint = _Lost(error)
            draft.masks.clear()

    def _give_up(self, sequence: Sequence) -> None:
        """Nothing is drafted in this tick, nor later: a drafter that failed once is not asked again."""
        draft = draft_of(sequence)
        self._roll_back(sequence)
        planned = draft.planned
        draft.clear()
        draft.planned, draft.broken = planned, True
        if draft.track is not None:
            draft.track.num_computed = min(draft.track.num_computed, sequence.known(draft.track) - 1)


def _rows(logits: torch.Tensor, widths: Seq[int]) -> torch.Tensor:
    """The drafter's rows [n, W] fp32 as the mixes see them: -inf beyond a mix's width and the drafter's own."""
    width = max(widths)
    if min(widths) == width <= logits.shape[1]:
        z = logits[:, :width].to(torch.float32, copy=True)
    else:
        z = torch.full((len(widths), width), -torch.inf, device=logits.device)
        for row, own in enumerate(widths):
            own = min(own, logits.shape[1])
            z[row, :own] = logits[row, :own]
    return z.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _ends(sequence: Sequence, token: int) -> bool:
    """Nothing follows this token, so nothing is drafted behind it."""
    request = sequence.group.request
    if token in request.sampling.stop_token_ids:
        return True
    return token in request.eos_ids and not request.sampling.ignore_eos
