"""Nudging where base and nudger have different tokenizers: words go from one to the other as text.

Fei et al. 2024, Nudging: Inference-time Alignment via Model Collaboration, arXiv:2410.09300, section 3. With one
tokenizer a mix of rows does the same in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from decoding.core import Sampling, says
from decoding.search.common import concluded, drop, spent
from decoding.search.spec import SearchKind
from decoding.search.verbs import Branch, Candidate, Feed, Fork, Open, Run, Search, Steps, Top, Until
from decoding.strategies.spec import finite

ONE = Until(tokens=1, step=False)


@dataclass(frozen=True, slots=True)
class NudgingSearch:
    """Parameters of `nudging_search`."""

    nudger: str = field(metadata=says("The small aligned model, with a tokenizer of its own."))
    threshold: float = field(
        default=0.4, metadata=says("The nudger speaks where the base's best probability is below this.")
    )


def run(search: Search, params: NudgingSearch) -> Steps:
    """The base's token where max p_base >= threshold, else a word of the nudger's, fed to the base as text."""
    base, nudger = search.root, (yield Open(search.prompt, params.nudger))
    nudges = told = 0  # told: characters of the base's text that the nudger knows
    while not base.finished and not spent(search):
        ((token, lp),) = yield Top(base, 1)
        if math.exp(lp) >= params.threshold:
            yield Feed(base, [token]) if likeliest(search.sampling) else Run(base, ONE)
            continue
        if said := base.text[told:]:
            yield Feed(nudger, said)
            told = len(base.text)
        speaker: Branch | None = ((yield Fork(nudger, 1)) or [None])[0]
        word = (yield from _word(search, speaker)) if speaker else ""
        if speaker and speaker.finished == "stop" and not word:  # the nudger ends the text
            yield from drop([base, nudger])
            return concluded(search, [Candidate(speaker)], details={"nudges": nudges + 1})
        yield from drop([speaker] if speaker else [])
        yield Feed(base, word) if word else Run(base, ONE)
        nudges += bool(word)
        search.progress(f"{nudges} words by the nudger", nudges=nudges, tokens=len(base.tokens))
    yield from drop([nudger])
    return concluded(search, [Candidate(base)], details={"nudges": nudges})


def _word(search: Search, speaker: Branch) -> Generator[Any, Any, str]:
    """What the nudger says up to the last token before the next one that starts with a space or newline, or its end."""
    start = len(speaker.text)
    while not speaker.finished and not spent(search):
        before = speaker.text
        yield Run(speaker, ONE)
        if before[start:] and speaker.text[len(before) :].startswith((" ", "\n")):
            return before[start:]
    return speaker.text[start:]


def likeliest(sampling: Sampling) -> bool:
    """Whether the next token is always the policy's likeliest one."""
    unchanged = (
        sampling.presence_penalty == sampling.frequency_penalty == 0.0
        and sampling.repetition_penalty == 1.0
        and not sampling.logit_bias
    )
    return sampling.temperature == 0.0 and unchanged and not sampling.min_tokens and not sampling.allowed_token_ids


def check(params: NudgingSearch, _sampling: Sampling) -> None:
    """Raises BadRequest for a threshold that is no probability."""
    finite("threshold", params.threshold, 0.0, 1.0)


KIND = SearchKind(
    "nudging_search",
    "Where the base is unsure, a small aligned model with another tokenizer gives one word.",
    NudgingSearch,
    run,
    "base's token, or one word of the nudger's where max p_base < threshold",
    check,
    models=lambda params: (params.nudger,),
    answers=lambda _params: 1,
    needs=("nudger: a small aligned model, whatever its tokenizer",),
    paper="Fei et al. 2024, arXiv:2410.09300",
)
