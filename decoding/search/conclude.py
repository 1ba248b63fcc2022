"""What a finished search tells: the winners as choices, and the report."""

from __future__ import annotations

from decoding.events import CandidateReport, Delta, SearchReport
from decoding.search.driver import Driver
from decoding.search.verbs import Candidate


def conclude(driver: Driver) -> tuple[list[Delta], SearchReport]:
    """One delta per choice, whole, the best candidate first; and how the search went.

    A choice for which there is no candidate is empty, cut by length.
    """
    outcome, plan = driver.outcome, driver.plan
    assert outcome is not None, "it has ended"
    request = driver.group.request
    deltas = [
        _choice(driver, i, outcome.candidates[i])
        if i < len(outcome.candidates)
        else Delta(request.id, i, (), "", finish_reason="length", stop_reason=driver.exhausted)
        for i in range(driver.n)
    ]
    report = SearchReport(
        plan.kind,
        outcome.reason,
        driver.exhausted,
        driver.branches,
        driver.generated,
        tuple(driver.scored.items()),
        tuple(_report(driver, each) for each in outcome.candidates) if plan.candidates else (),
        tuple(outcome.details.items()),
        driver.group.read,
        driver.group.read_cached,
    )
    return deltas, report


def _choice(driver: Driver, index: int, candidate: Candidate) -> Delta:
    branch, id = candidate.branch, driver.group.request.id
    if candidate.text is not None:  # the search's own words are whole; an answer within a text may have been cut
        cut = candidate.answer is not None and branch.finished != "stop"
        why = driver.exhausted if cut and not branch.finished else branch.stop_reason
        return Delta(id, index, (), candidate.text, finish_reason="length" if cut else "stop", stop_reason=why)
    told = driver.told_of(branch)
    # Of what was fed without asking for log-probs there are none, and a list with gaps would be a wrong one.
    whole = all(len(delta.logprobs) == len(delta.token_ids) for delta in told)
    wanted = driver.group.request.sampling.logprobs is not None and whole
    return Delta(
        id,
        index,
        tuple(branch.tokens),
        driver.text_of(branch),
        tuple(entry for delta in told for entry in delta.logprobs) if wanted else (),
        branch.finished or "length",
        branch.stop_reason if branch.finished else driver.exhausted,
        tuple(entry for delta in told for entry in delta.trace),
    )


def _report(driver: Driver, candidate: Candidate) -> CandidateReport:
    branch = candidate.branch
    text = driver.text_of(branch) if candidate.text is None else candidate.text
    return CandidateReport(
        text, len(branch.tokens), branch.finished, candidate.score, candidate.scores, candidate.answer, candidate.note
    )
