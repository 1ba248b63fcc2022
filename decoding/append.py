"""Tokens become part of a sequence: its output, text, states, and why it ends."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from decoding.core import FinishReason
from decoding.events import Delta
from decoding.sampling import Drawn
from decoding.state import Sequence


def append(sequence: Sequence, drawn: Seq[Drawn], weights: Seq[Seq[float]] | None) -> Delta:
    """Append the drawn tokens, up to the first stop or the end of a search's goal; returns what is told of them.

    weights: a solver's for each token. Penalty counts, solver and constraint move on with every token.
    """
    group, sampling, goal = sequence.group, sequence.group.request.sampling, sequence.goal
    ids: list[int] = []
    pieces: list[str] = []
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    for i, each in enumerate(drawn):
        token = each.token
        assert token is not None, "the caller has looked"
        if goal is not None and not goal.budget.take():
            goal.ended = True
            break
        sequence.output.append(token)
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
        if group.policy.solver is not None and weights is not None:
            sequence.solver_state = group.policy.solver.advance(sequence.solver_state, weights[i], token)
        if sequence.constraint is not None:
            sequence.constraint.advance(token)
        piece, reason, stop_reason = _progress(sequence, token)
        ids.append(token)
        pieces.append(piece)
        if goal is not None:
            parted = goal.sees(sequence.text.raw)
            goal.ended = reason is not None or parted or len(sequence.output) == goal.length
        if reason is not None or (goal is not None and goal.ended):
            break
    sequence.next_row = len(sequence.output) - 1
    told = drawn[: len(ids)]
    return Delta(
        group.request.id,
        sequence.index,
        tuple(ids),
        "".join(pieces),
        tuple(each.logprob for each in told if each.logprob) if sampling.logprobs is not None or goal else (),
        reason,
        stop_reason,
        tuple(each.trace for each in told if each.trace),
    )


def _progress(sequence: Sequence, token: int) -> tuple[str, FinishReason | None, int | str | None]:
    """The text that `token`, just appended, lets out; why the sequence ends with it, if it does; which stop did it."""
    group, text, length = sequence.group, sequence.text, len(sequence.output)
    sampling = group.request.sampling
    if length > sampling.min_tokens:
        if token in sampling.stop_token_ids:
            return text.push(token) if sampling.include_stop_str_in_output else "", "stop", token
        if token in group.request.eos_ids and not sampling.ignore_eos:
            return text.push(token), "stop", None
    shown = text.push(token, stops_apply=length >= sampling.min_tokens)
    if text.stopped():
        return shown, "stop", text.matched
    return shown, "length" if length >= group.max_output else None, None
