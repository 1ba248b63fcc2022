"""The text of one sequence as it grows."""

from __future__ import annotations

import copy

from decoding.core import Request
from decoding.detokenizer import Detokenizer
from decoding.text import StopStrings, TextModel


class OutputText:
    """The text of one sequence: ids in, what may be shown out, cut at the first stop string."""

    def __init__(self, model: TextModel, request: Request) -> None:
        sampling = request.sampling
        self.raw = ""  # what the last token added to the text, stop strings or not
        self._vocabulary = model.vocabulary
        self._detokenizer = Detokenizer(model.vocabulary, sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched

    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.matched is not None

    def push(self, token: int, stops_apply: bool = True) -> str:
        """Text that is final with this token. Before `min_tokens`, stop strings do not apply."""
        piece = self.raw = self._detokenizer.push((token,))
        return self._stops.push(piece) if stops_apply else piece

    def fork(self) -> OutputText:
        """Another text with the same beginning."""
        shared = (self._vocabulary, self._vocabulary.tokenizer)
        return copy.deepcopy(self, {id(each): each for each in shared})

    def finish(self) -> str:
        """The rest of the text."""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()
