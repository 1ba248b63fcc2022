"""From a request to the sequences and tracks that the engine runs, or to the sentence that says why not."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from decoding.core import LOOKUPS, BadRequest, ModelSpec, Policy, Request, Role, UnknownModel
from decoding.events import AdapterInfo
from decoding.hosting import ModelRunner
from decoding.kv import BlockPool, root_key
from decoding.lookup import Lookup, Source
from decoding.output import OutputText
from decoding.rules import RULES
from decoding.state import Draft, Group, Sequence, Track
from decoding.text import TextModel


@dataclass(frozen=True, slots=True)
class Hosted:
    """A model as the engine holds it: weights, text side, and the KV memory in bytes that the operator set, if any.

    An adapter is held like a model, with its model's runner. `spec`: what the operator said of it.
    """

    runner: ModelRunner
    text: TextModel
    kv_memory: int | None = None
    adapter: AdapterInfo | None = None
    kind: str = "causal"
    spec: ModelSpec | None = None


def make_group(
    request: Request,
    serial: int,
    hosted: Mapping[str, Hosted],
    pools: Mapping[str, BlockPool],
    judges: Container[str] = (),
) -> Group:
    """The request's sequences, not yet queued. `judges`: models with a judge head. Raises BadRequest, UnknownModel."""
    spec = request.program.speculation
    judged = spec is not None and RULES[spec.accept or "rejection"].judges
    if judged and request.text_model not in judges:
        message = f"No judge head of '{request.text_model}' is loaded; it is a model entry of kind 'judge'."
        raise BadRequest(message, "decoding.speculation.accept")
    policy, prompts = _needed(request)
    if judged and policy.terms[0].name != request.program.policy.terms[0].name:
        message = f"'{request.text_model}' has weight 0 in this policy, so that there is nothing for its judge to read."
        raise BadRequest(message, "decoding.speculation.accept")
    policy = replace(policy, terms=tuple(replace(term, role=resolve(term.role, hosted)) for term in policy.terms))
    views: dict[tuple[str, str | None, tuple[int, ...]], str] = {}
    for term, prompt in zip(policy.terms, prompts, strict=True):
        views.setdefault((term.role.model, term.role.adapter, prompt), term.name)
    order = {key: i for i, key in enumerate(views)}
    term_tracks = tuple(
        order[term.role.model, term.role.adapter, prompt] for term, prompt in zip(policy.terms, prompts, strict=True)
    )
    roles = [(name, model, prompt) for (model, _, prompt), name in views.items()]
    room = _max_output(request.sampling.max_tokens, roles, hosted, pools)
    group = Group(request, serial, policy, term_tracks, request.width, room, seed=_seed(request))
    if request.sampling.prompt_logprobs is not None:
        group.prompt_logprobs = [None]
    source = None
    if spec is not None and spec.draft in LOOKUPS:
        source = Source(request.prediction if spec.draft == "prediction" else request.prompts[0])
    searches = request.program.search is not None
    for index in range(request.sequences):
        tracks = [
            Track(model, prompt, _root(model, adapter, request.salt, hosted), adapter)
            for model, adapter, prompt in views
        ]
        text = OutputText(hosted[request.text_model].text, request)
        sequence = Sequence(group, index, () if searches else (index,), tracks, text, request.sampling)
        if request.sampling.prompt_logprobs is not None and index == 0:
            sequence.next_row = -_scored(request.prompts[0], tracks) - 1
        if request.constraint is not None:
            sequence.constraint = request.constraint()
        sequence.draft = _draft(sequence, source, hosted)
        group.sequences.append(sequence)
    return group


def _seed(request: Request) -> int | None:
    """The request's seed; a rule that shares noise between models needs one in any case."""
    spec = request.program.speculation
    if request.sampling.seed is None and spec is not None and RULES[spec.accept or "rejection"].keyed:
        return int.from_bytes(os.urandom(8), "little")
    return request.sampling.seed


def _draft(sequence: Sequence, source: Source | None, hosted: Mapping[str, Hosted]) -> Draft | None:
    """How the sequence drafts; `source` is where lookups look. Raises BadRequest, UnknownModel.

    A model that is a role of the policy drafts as that role; another one is shown what the main model is shown.
    """
    request, spec = sequence.group.request, sequence.group.request.program.speculation
    if spec is None:
        return None
    rule = RULES[spec.accept or "rejection"]
    bonus = rule.bonus if spec.bonus is None else spec.bonus
    if source is not None:
        predicted = spec.draft == "prediction"
        return Draft(spec, lookup=Lookup(request.prompts[0], source, spec.max_ngram, predicted), bonus=bonus)
    role = resolve(Role(spec.draft), hosted)
    for term, track in zip(sequence.group.policy.terms, sequence.group.term_tracks):
        if track > 0 and (term.role.model, term.role.adapter) == (role.model, role.adapter):
            return Draft(spec, sequence.tracks[track], track, bonus=bonus)
    root = _root(role.model, role.adapter, request.salt, hosted)
    return Draft(spec, Track(role.model, request.prompts[0], root, role.adapter), bonus=bonus)


def copy_draft(root: Sequence, child: Sequence) -> Draft | None:
    """How `child`, which begins as `root` does, drafts."""
    theirs = root.draft
    if theirs is None:
        return None
    made = Draft(theirs.spec, bonus=theirs.bonus, broken=theirs.broken, role=theirs.role)
    if theirs.role is not None:
        made.track = child.tracks[theirs.role]
    elif theirs.track is not None:
        made.track = replace(theirs.track, blocks=[], num_computed=0, keys=[], published=0)
    elif theirs.lookup is not None:
        made.lookup = theirs.lookup.fork()
    return made


def stream_track(model: str, salt: str, hosted: Mapping[str, Hosted]) -> Track:
    """An empty track of `model`, which may be an adapter. Raises UnknownModel."""
    role = resolve(Role(model), hosted)
    return Track(role.model, (), _root(role.model, role.adapter, salt, hosted), role.adapter)


def resolve(role: Role, hosted: Mapping[str, Hosted]) -> Role:
    """The role on the model that computes it: an adapter's id, wherever a model's may stand, is that adapter.

    Raises UnknownModel, and BadRequest for an adapter that is not one of the model's.
    """
    if role.model not in hosted:
        raise UnknownModel(role.model, tuple(hosted))
    own = hosted[role.model].adapter
    if role.adapter is None:
        return role if own is None else replace(role, model=own.of, adapter=role.model)
    named = hosted.get(role.adapter)
    if named is None or named.adapter is None or named.adapter.of != role.model:
        raise BadRequest(f"No adapter '{role.adapter}' is loaded on '{role.model}'.", "decoding")
    return role


def _root(model: str, adapter: str | None, salt: str, hosted: Mapping[str, Hosted]) -> bytes:
    """Root of a track's prefix keys: an adapter that is loaded anew with other weights hits nothing of the old one."""
    info = hosted[adapter].adapter if adapter is not None else None
    return root_key(model, adapter or "", info.generation if info else "", salt)


def _needed(request: Request) -> tuple[Policy, list[tuple[int, ...]]]:
    """The policy and prompts without terms of weight 0 that nothing else refers to."""
    policy = request.program.policy
    keep = list(range(len(policy.terms)))
    if policy.solver is None:
        live = [term for term in policy.terms if term.weight != 0.0]
        if not live:
            raise BadRequest("Every term of the policy has weight 0.", "decoding")
        named = {term.gate.of for term in live if term.gate}
        named |= {policy.plausibility.of} if policy.plausibility else set()
        keep = [i for i in keep if policy.terms[i].weight != 0.0 or policy.terms[i].name in named]
    terms = tuple(policy.terms[i] for i in keep)
    return replace(policy, terms=terms), [request.prompts[i] for i in keep]


def _max_output(
    max_tokens: int | None,
    roles: Seq[tuple[str, str, tuple[int, ...]]],
    hosted: Mapping[str, Hosted],
    pools: Mapping[str, BlockPool],
) -> int:
    """Tokens that may follow: `max_tokens`, every role's context, and pools that must hold all roles at once."""
    room = max_tokens
    for name, id, prompt in roles:
        limit = hosted[id].runner.max_model_len
        left = limit - len(prompt)
        if not prompt:
            raise BadRequest(f"The prompt of role '{name}' is empty.", "prompt")
        if left < 0 or (left == 0 and room != 0):
            raise BadRequest(
                f"The prompt of role '{name}' has {len(prompt)} tokens; '{id}' takes {limit} with the answer.",
                "prompt",
                "context_length_exceeded",
            )
        room = left if room is None else min(room, left)
    assert room is not None
    for model, pool in pools.items():
        lengths = [len(prompt) for _, id, prompt in roles if id == model]
        if lengths:
            fits = _room(lengths, pool)
            if fits < min(room, 1):
                raise BadRequest(
                    f"The KV memory of '{model}' holds {pool.num_blocks * pool.block_size} tokens, too few for this "
                    f"prompt ({sum(lengths)} tokens). Raise --kv-memory.",
                    "prompt",
                    "context_length_exceeded",
                )
            room = min(room, fits)
    return room


def _room(lengths: Seq[int], pool: BlockPool) -> int:
    """The most output tokens for which tracks with prompts of these lengths all fit into the pool; -1: none do."""
    low, high = -1, pool.num_blocks * pool.block_size
    while low < high:  # the blocks needed never fall as the output grows
        middle = (low + high + 1) // 2
        if sum(pool.blocks_for(length + middle) for length in lengths) <= pool.num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _scored(main: tuple[int, ...], tracks: Seq[Track]) -> int:
    """How many ids of the request's prompt can be scored: all but the first, if every role's prompt ends with them."""
    for track in tracks:
        if len(track.prompt) < len(main) or track.prompt[len(track.prompt) - len(main) + 1 :] != main[1:]:
            raise BadRequest(
                "Log-probs of the prompt need every role to see the same prompt, but this policy shows them different "
                "ones. Send the prompt as text or token ids, without views of its own per role.",
                "echo",
            )
    return len(main) - 1
