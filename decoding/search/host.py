"""What the engine does for searches: hypotheses and scorers' texts made, copied, put to work and given up."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from decoding.admit import Hosted, copy_draft, make_group, stream_track
from decoding.append import append
from decoding.blocks import Copy
from decoding.core import BadRequest, Program, Sampling
from decoding.events import Delta
from decoding.hosting import ModelRunner
from decoding.output import OutputText
from decoding.prepare import Catalog, prepare
from decoding.sampling import Drawn
from decoding.scheduler import Scheduler
from decoding.scorers.pages import Tongue
from decoding.scorers.spec import Scorer, ScorerSpec
from decoding.state import Group, Sequence, Stream
from decoding.text import Prompt, TextModel, shared_vocabulary

MakeScorer = Callable[[ScorerSpec, str], Scorer]  # (what is asked for, the request's main model)


class Host:
    """Shared by all running searches. `catalog` gives what is served now; `make_scorer` raises BadRequest."""

    def __init__(
        self,
        hosted: Mapping[str, Hosted],
        runners: Mapping[str, ModelRunner],
        scheduler: Scheduler,
        judges: Container[str],
        catalog: Callable[[], Catalog],
        make_scorer: MakeScorer,
        serials: itertools.count[int],
    ) -> None:
        self.hosted, self.runners, self.scheduler, self.make_scorer = hosted, runners, scheduler, make_scorer
        self._judges, self._catalog, self._serials = judges, catalog, serials
        self._tongues: weakref.WeakKeyDictionary[TextModel, Tongue] = weakref.WeakKeyDictionary()

    def open(self, owner: Group, prompt: Prompt, program: Program | str | None, sampling: Sampling) -> Sequence:
        """A new root for a search of `owner`, resting. Raises BadRequest and UnknownModel."""
        request = owner.request
        if program is None:
            program = replace(request.program, search=None)
        elif isinstance(program, str):
            program = Program.plain(program)
        if program.models[0] != request.text_model:  # ids mean other tokens there
            sampling = replace(sampling, logit_bias=(), allowed_token_ids=None, stop_token_ids=())
        asked = sampling.max_tokens
        made = prepare(program, prompt, replace(sampling, max_tokens=None), self._catalog(), salt=request.salt)
        room = made.sampling.max_tokens
        assert room is not None, "prepare has filled it"
        room = room if asked is None else min(asked, room)
        made = replace(
            made,
            id=request.id,
            arrival=request.arrival,
            constraint=request.constraint,
            sampling=replace(made.sampling, max_tokens=room, min_tokens=min(made.sampling.min_tokens, room)),
        )
        group = make_group(made, next(self._serials), self.hosted, self.scheduler.pools, self._judges)
        group.owner = owner
        owner.read += len(made.prompts[0])
        group.seed = group.seed if owner.seed is None else owner.seed
        (sequence,) = group.sequences
        self.scheduler.rest(sequence)
        return sequence

    def copy(self, root: Sequence, path: tuple[int, ...]) -> Sequence:
        """A resting hypothesis that begins as `root` does and shares what that has computed."""
        group = root.group
        tracks = [replace(track, blocks=[], num_computed=0, keys=[], published=0) for track in root.tracks]
        child = Sequence(group, next(self._serials), path, tracks, root.text.fork(), group.request.sampling)
        child.output, child.counts, child.next_row = list(root.output), dict(root.counts), len(root.output) - 1
        child.solver_state = root.solver_state
        if group.request.constraint is not None:
            child.constraint = group.request.constraint()
            for token in child.output:
                child.constraint.advance(token)
        child.draft = copy_draft(root, child)
        child.goal = root.goal
        group.sequences.append(child)
        self._copy_blocks(self.scheduler.branch(root, child))
        return child

    def stream(self, owner: Group, model: str) -> Stream:
        """A text for the scorer `model` to read, empty and resting. Raises UnknownModel."""
        track = stream_track(model, owner.request.salt, self.hosted)
        group = Group(owner.request, next(self._serials), owner.policy, (0,), 0, 0, owner=owner)
        text = OutputText(self.hosted[model].text, owner.request)
        made = Stream(group, 0, (), [track], text, owner.request.sampling, next_row=-2)
        group.sequences.append(made)
        self.scheduler.rest(made)
        return made

    def copy_stream(self, root: Stream) -> Stream:
        """A text that begins as `root` does and shares what that has computed."""
        track = replace(root.tracks[0], blocks=[], num_computed=0, keys=[], published=0)
        child = Stream(root.group, next(self._serials), (), [track], root.text, root.sampling, next_row=-2)
        child.output, child.read = list(root.output), dict(root.read)
        root.group.sequences.append(child)
        self._copy_blocks(self.scheduler.branch(root, child))
        return child

    def rewrite(self, stream: Stream, ids: Seq[int], marks: Seq[int]) -> None:
        """Have a resting `stream` hold `ids`; the rows at `marks` that were not read yet are wanted.

        Raises BadRequest for a text that the scorer's context or memory has no room for.
        """
        track = stream.tracks[0]
        pool, limit = self.scheduler.pools[track.model], self.scheduler.drafts.limits[track.model]
        limit = min(limit, pool.num_blocks * pool.block_size)
        if len(ids) > limit:
            raise BadRequest(
                f"A text of {len(ids)} tokens was to be scored; the scorer '{track.model}' takes {limit}.",
                "max_tokens",
                "context_length_exceeded",
            )
        same = next(
            (i for i, (a, b) in enumerate(zip(stream.output, ids)) if a != b), min(len(stream.output), len(ids))
        )
        if same < len(stream.output):
            self._copy_blocks(self.scheduler.blocks.cut(track, same))
            stream.read = {mark: row for mark, row in stream.read.items() if mark < same}
        stream.group.payer.read += len(ids) - same
        stream.output[same:] = ids[same:]
        stream.marks = [mark for mark in marks if mark not in stream.read]
        if stream.marks:
            self._copy_blocks(self.scheduler.blocks.rewind(track, stream.marks[0]))
            self.resume(stream)

    def same_ids(self, a: str, b: str) -> bool:
        """Whether two models have one tokenizer."""
        return shared_vocabulary(self.hosted[a].text, self.hosted[b].text) is not None

    def encode(self, model: str, tokens: Seq[int] | str, first: bool = False) -> Seq[int]:
        """Ids of `tokens`, which may be a text to go on with.

        first: an answer begins with it. Its first word is then written as that of a text is, by some tokenizers with a
        space that decoding drops again.
        """
        if not isinstance(tokens, str):
            return tokens
        text = self.hosted[model].text
        if first and not tokens[:1].isspace():
            return text.encode(tokens, bos=False)
        if text not in self._tongues:
            self._tongues[text] = Tongue(text)
        return self._tongues[text].continued(tokens)

    def first_token(self, model: str, choice: str | int) -> int:
        """The id that `choice` begins with. Raises BadRequest if it has none."""
        if isinstance(choice, int):
            return choice
        ids = self.encode(model, choice)
        if not ids:
            raise BadRequest(f"'{choice}' is no token of '{model}'.", "decoding")
        return ids[0]

    def check_length(self, sequence: Sequence) -> None:
        """Raises BadRequest if there is no room for what was added to `sequence`."""
        taken, scheduler = len(sequence.output), self.scheduler
        fits = all(len(t.prompt) + taken <= scheduler.drafts.limits[t.model] for t in sequence.tracks)
        ends = {id(track): len(track.prompt) + taken for track in sequence.tracks}
        empty = [replace(track, blocks=[]) for track in sequence.tracks]
        needs = scheduler.blocks.missing(empty, dict(zip(map(id, empty), ends.values())))
        if not fits or any(need > scheduler.pools[model].num_blocks for model, need in needs.items()):
            raise BadRequest(
                f"There is no room to ask '{sequence.group.request.text_model}' about a text of {taken} tokens.",
                "max_tokens",
                "context_length_exceeded",
            )

    def feed(self, sequence: Sequence, tokens: Iterable[int]) -> Delta:
        """Lengthen a resting hypothesis by `tokens`, up to its end; what a constraint raises is passed on."""
        delta = append(sequence, [Drawn(token) for token in tokens], None)
        sequence.solver_state = None  # it depends on rows that were not mixed: as at the beginning of a text
        self.tell_drafter(sequence, delta.token_ids)
        return delta

    def rest_drafter(self, sequence: Sequence) -> None:
        """Its drafter is not needed for a while: it gives its memory back, and catches up when it is."""
        own = sequence.draft.own if sequence.draft else None
        if own is not None:
            self.scheduler.blocks.forget(own)

    def tell_drafter(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """`tokens` were appended to `sequence`."""
        draft = sequence.draft
        if draft is None:
            return
        for token in tokens:
            if draft.lookup:
                draft.lookup.push(token)
            elif draft.own and token >= self.runners[draft.own.model].width:
                self.scheduler.drafts.retire(draft)  # it has no such token, and could not go on behind it

    def resume(self, sequence: Sequence) -> None:
        """A resting sequence has something to do."""
        self._copy_blocks(self.scheduler.resume(sequence))

    def rest(self, sequence: Sequence) -> None:
        """A sequence that may be running has nothing to do for now."""
        self.scheduler.rest(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Give a sequence up, wherever it is."""
        sequence.finished = True
        sequence.group.sequences.remove(sequence)
        self.scheduler.remove(sequence)

    def _copy_blocks(self, copies: Iterable[Copy]) -> None:
        for model, source, target in copies:
            self.runners[model].copy_blocks([(source, target)])
