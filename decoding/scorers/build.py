"""Scorers from what requests say: `check_scorer` where requests are taken, `make_scorer` where they are served."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from decoding.core import MAX_WEIGHT, BadRequest, EngineFailure, ModelLoadError
from decoding.scorers.pages import Tongue
from decoding.scorers.patterns import compiled
from decoding.scorers.readings import Guard, Head, Judge, Reward, SelfEvaluation, StepReward, check_question
from decoding.scorers.rules import Keywords, Measure, Regex, ValidJson, WordRange
from decoding.scorers.spec import Reading, Remote, Rule, Scorer, ScorerParams, ScorerSpec, Sum
from decoding.text import TextModel

ASKED = ("causal", "adapter")  # kinds that are asked a question in words
KINDS = ("reward", "prm", "guard", "self_eval", *ASKED)  # kinds that can score
WHAT = ("model", "remote", "rule", "keywords", "words", "regex", "json", "parts")
_MEANT_FOR = {
    "weights": ("reward",),
    "principles": ("reward",),
    "question": ("self_eval", *ASKED),
    "taxonomy": ("guard",),
}
MAX_PARTS, MAX_DEPTH, MAX_KEYWORDS = 16, 4, 256


@dataclass(frozen=True, slots=True, eq=False)
class ScorerModel:
    """A served model as a scorer: text side, kind, and how the configuration says that it is read.

    head: of a reward model or PRM. width: ids of its logits. rendering, step_marker, score_tokens: see docs/scorers.md.
    """

    id: str
    text: TextModel
    kind: str
    width: int
    head: Head | None = None
    step_marker: str | None = None
    score_tokens: tuple[str, ...] = ()
    rendering: str | None = None


def check_scorer(spec: ScorerSpec, kinds: Mapping[str, str], remotes: Container[str], param: str) -> None:
    """Raises BadRequest, naming `param` or a field of it, for a scorer that cannot be served.

    kinds: of all served models, by id. remotes: ids of the scorers elsewhere that are configured.
    """
    _check(_full(spec, remotes), kinds, remotes, param, 0)


def make_scorer(
    spec: ScorerSpec, models: Mapping[str, ScorerModel], remotes: Mapping[str, Remote], default: str
) -> Scorer:
    """The scorer that a request asks for, sums flattened.

    default: the request's own model; a question without a model is asked of it, and token-id prompts are its ids.
    Raises BadRequest, and EngineFailure for a model whose configuration does not fit it (`check_model` says so at the
    start).
    """
    params = _full(spec, remotes)
    _check(params, {id: model.kind for id, model in models.items()}, remotes, "scorer", 0)
    try:
        parts = [(weight, part, _build(part, models, remotes, default)) for weight, part in _flat(params, 1.0)]
    except ModelLoadError as error:
        raise EngineFailure(str(error)) from error
    _same_count([(_name(part), scorer) for _, part, scorer in parts])
    if not params.parts and params.weight == 1.0:
        return parts[0][2]
    return Sum(tuple((weight, scorer) for weight, _, scorer in parts))


def bounds(spec: ScorerSpec) -> tuple[float, float] | None:
    """The least and the greatest number that a scorer without models can give; None for others, and for open ends."""
    if not isinstance(spec, ScorerParams):
        return None
    if spec.parts:
        found = [bounds(part) for part in spec.parts]
        ends = [each for each in found if each is not None]
        if len(ends) < len(found):
            return None
        low, high = sum(low for low, _ in ends), sum(high for _, high in ends)
    elif what_is_set(spec) in (["keywords"], ["words"], ["regex"], ["json"]):
        low, high = 0.0, 1.0
    else:
        return None
    return (spec.weight * low, spec.weight * high) if spec.weight >= 0 else (spec.weight * high, spec.weight * low)


def check_model(model: ScorerModel) -> None:
    """Raises ModelLoadError if the model cannot score as its kind and configuration say, at the start already."""
    tongue = Tongue(model.text)
    if model.kind == "reward":
        _head(model)
    elif model.kind == "prm":
        _steps(model, tongue)
    elif model.kind == "self_eval":
        SelfEvaluation(model.id, tongue, model.width, model.score_tokens)
    elif model.kind == "guard":
        Guard(model.id, tongue, model.width)


def _full(spec: ScorerSpec, remotes: Container[str]) -> ScorerParams:
    if isinstance(spec, ScorerParams):
        return spec
    return ScorerParams(remote=spec) if spec in remotes else ScorerParams(model=spec)


def _flat(params: ScorerParams, weight: float) -> list[tuple[float, ScorerParams]]:
    weight *= params.weight
    return [(weight, params)] if not params.parts else [leaf for part in params.parts for leaf in _flat(part, weight)]


def _name(params: ScorerParams) -> str:
    named = params.model or params.remote or params.rule
    return f"'{named}'" if named else f"'{what_is_set(params)[0]}'" if what_is_set(params) else "'question'"


# -- checks ----------------------------------------------------------------------------------------------------------


def what_is_set(params: ScorerParams) -> list[str]:
    """Which of the fields that say what a scorer is are set; none where it only says how a model is asked."""
    words = params.min_words is not None or params.max_words is not None
    return [name for name in WHAT if (words if name == "words" else getattr(params, name) not in (None, (), False))]


def _check(
    params: ScorerParams, kinds: Mapping[str, str], remotes: Container[str], param: str, depth: int
) -> str | None:
    """Raises BadRequest; returns the kind of the model that is asked, if it is one."""
    what = what_is_set(params)
    if len(what) > 1 or (not what and params.question is None):
        told = f"not {' and '.join(what)}" if what else "none is given"
        choices = "model, remote, rule, keywords, min_words/max_words, regex, json and parts"
        raise BadRequest(f"'{param}' must be exactly one of {choices}; {told}.", param)
    if not math.isfinite(params.weight) or abs(params.weight) > MAX_WEIGHT:
        raise BadRequest(f"'weight' must be within {MAX_WEIGHT:g} of 0, not {params.weight}.", f"{param}.weight")
    kind = _kind(params, kinds, remotes, param)
    for name, meant in _MEANT_FOR.items():
        if getattr(params, name) in (None, ()):
            continue
        if kind not in meant:
            of = " or ".join(meant)
            raise BadRequest(f"'{name}' is for models of kind {of}, which '{param}' does not name.", f"{param}.{name}")
    if params.question is not None and kind in ASKED:
        check_question(params.question, f"{param}.question")
    if params.weights is not None and not all(math.isfinite(weight) for weight in params.weights):
        raise BadRequest("'weights' must be finite numbers.", f"{param}.weights")
    _check_rule(params, param)
    if params.parts:
        _check_parts(params, kinds, remotes, param, depth)
    return kind


def _kind(params: ScorerParams, kinds: Mapping[str, str], remotes: Container[str], param: str) -> str | None:
    if params.remote is not None and params.remote not in remotes:
        listed = f" Configured: {', '.join(remotes)}." if isinstance(remotes, Iterable) and list(remotes) else ""
        raise BadRequest(f"The remote scorer '{params.remote}' is not configured.{listed}", f"{param}.remote")
    if params.model is None:
        return "causal" if not what_is_set(params) else None
    kind = kinds.get(params.model)
    if kind not in KINDS:
        served = [id for id, known in kinds.items() if known in KINDS]
        served += list(remotes) if isinstance(remotes, Iterable) else []
        wrong = f"is of kind {kind}, which scores no texts" if kind else "is not loaded"
        said = f"Scorers that are served: {', '.join(served)}." if served else "No scorer is served."
        raise BadRequest(f"The scorer '{params.model}' {wrong}. {said}", param)
    return kind


def _check_rule(params: ScorerParams, param: str) -> None:
    if len(params.keywords) > MAX_KEYWORDS or not all(word.strip() for word in params.keywords):
        raise BadRequest(f"'keywords' are 1 to {MAX_KEYWORDS} words, none of them empty.", f"{param}.keywords")
    low, high = params.min_words, params.max_words
    for name, words in (("min_words", low), ("max_words", high)):
        if words is not None and words < 1:
            raise BadRequest(f"'{name}' must be at least 1, not {words}.", f"{param}.{name}")
    if low is not None and high is not None and low > high:
        raise BadRequest(f"'min_words' must be at most 'max_words', not {low} and {high}.", f"{param}.min_words")
    if params.regex is not None:
        compiled(params.regex, f"{param}.regex")


def _check_parts(
    params: ScorerParams, kinds: Mapping[str, str], remotes: Container[str], param: str, depth: int
) -> None:
    if len(params.parts) > MAX_PARTS or depth >= MAX_DEPTH:
        raise BadRequest(f"A sum has at most {MAX_PARTS} parts, and sums nest {MAX_DEPTH} deep.", f"{param}.parts")
    for i, part in enumerate(params.parts):
        _check(part, kinds, remotes, f"{param}.parts.{i}", depth + 1)
    leaves = [part for _, part in _flat(params, 1.0) if part.remote is None]
    steps = [part for part in leaves if part.model is not None and kinds.get(part.model) == "prm"]
    single = [part for part in leaves if part not in steps]
    if steps and single:
        raise _mismatch(_name(steps[0]), _name(single[0]), f"{param}.parts")


def _mismatch(steps: str, single: str, param: str) -> BadRequest:
    return BadRequest(
        f"The scorer {steps} gives one number per step and {single} gives one number: they cannot be added.", param
    )


def _same_count(parts: Sequence[tuple[str, Scorer]]) -> None:
    """Raises BadRequest where parts are known to give different numbers of numbers."""
    known = [(name, getattr(scorer, "one_number", None)) for name, scorer in parts]
    steps = [name for name, one in known if one is False]
    single = [name for name, one in known if one is True]
    if steps and single:
        raise _mismatch(steps[0], single[0], "scorer.parts")


# -- construction ----------------------------------------------------------------------------------------------------


def _build(
    params: ScorerParams, models: Mapping[str, ScorerModel], remotes: Mapping[str, Remote], default: str
) -> Scorer:
    if params.remote is not None:
        return remotes[params.remote]
    rule = _rule(params)
    return rule if rule is not None else _reading(params, models, default)


def _rule(params: ScorerParams) -> Rule | None:
    if params.rule is not None:
        return Measure(params.rule)
    if params.keywords:
        return Keywords(params.keywords)
    if params.min_words is not None or params.max_words is not None:
        return WordRange(params.min_words or 0, params.max_words)
    if params.regex is not None:
        return Regex(params.regex)
    return ValidJson() if params.json else None


def _reading(params: ScorerParams, models: Mapping[str, ScorerModel], default: str) -> Reading:
    id = params.model or default
    if id not in models:
        raise BadRequest(f"The scorer '{id}' is not loaded. Scorers that are served: {', '.join(models)}.", "scorer")
    model = models[id]
    asker = models[default].text if default in models else None
    tongue = Tongue(model.text, asker)
    if model.kind == "reward":
        return Reward(id, tongue, _head(model), params.weights, params.principles)
    if model.kind == "prm":
        return _steps(model, tongue)
    if model.kind == "guard":
        return Guard(id, tongue, model.width, params.taxonomy)
    if model.kind == "self_eval":
        return SelfEvaluation(id, tongue, model.width, model.score_tokens, params.question)
    return Judge(id, tongue, model.width, params.question)


def _head(model: ScorerModel) -> Head:
    if model.head is None:
        raise ModelLoadError(
            f"'{model.id}' is a causal language model without a head that scores: its kind is causal, guard or "
            "self_eval, or prm with two score_tokens, not reward."
        )
    return model.head


def _steps(model: ScorerModel, tongue: Tongue) -> StepReward:
    return StepReward(model.id, tongue, model.width, model.head, model.rendering, model.step_marker, model.score_tokens)
