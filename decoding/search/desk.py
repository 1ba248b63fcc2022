"""All searches that an engine runs: what a tick brought is handed to them, and they go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import wait

from decoding.events import Delta, SearchReport
from decoding.hosting import Rows
from decoding.plan import Span
from decoding.search.conclude import conclude
from decoding.search.driver import Driver, Emit
from decoding.search.host import Host
from decoding.search.spec import SearchKind
from decoding.state import Group, Sequence, Stream

POLL = 0.002  # seconds that a tick with nothing to compute waits for remote scorers


class Desk:
    """The running searches by request, in the order in which they came, which is the order in which they go on."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._running: dict[Group, Driver] = {}

    def begin(self, group: Group, kind: SearchKind, emit: Emit) -> None:
        """Run the search of a request; it makes its first step after the next tick."""
        self._running[group] = Driver(group, kind, self._host, emit)

    def __contains__(self, group: Group) -> bool:
        return group.payer in self._running

    def saw(self, sequence: Sequence, delta: Delta) -> None:
        """A hypothesis has become longer."""
        self._running[sequence.group.payer].saw(sequence, delta)

    def read(self, spans: Iterable[Span], rows: Rows) -> None:
        """Hand a model's rows of scorers' texts to their searches."""
        for span in spans:
            if not isinstance(span.sequence, Stream):
                continue
            driver = self._running[span.sequence.group.payer]
            model = span.track.adapter or span.track.model
            driver.scored[model] = driver.scored.get(model, 0) + span.count
            if span.marks:
                mine = slice(span.place, span.place + span.rows)
                hidden = rows.hidden[mine] if span.sequence.wants_hidden and rows.hidden is not None else None
                driver.read(span.sequence, span.marks, rows.logits[mine], hidden)

    def adapters(self, group: Group) -> set[str | None]:
        """Adapters that a request's search uses besides its own policy's."""
        driver = self._running.get(group)
        return set() if driver is None else {t.adapter for s in driver.states() for t in s.all_tracks}

    def go_on(self, idle: bool) -> Iterator[tuple[Group, tuple[list[Delta], SearchReport] | Exception]]:
        """Every search as far as it goes without another tick; those that have ended or failed, and how.

        They stay until they are dropped. idle: nothing was computed in this tick.
        """
        calls = [call for driver in self._running.values() for call in driver.scoring.calls]
        if idle and calls:
            wait(calls, POLL)
        for group, driver in list(self._running.items()):
            try:
                driver.advance()
                if driver.outcome is None:
                    continue
                yield group, conclude(driver)
            except Exception as error:
                yield group, error

    def drop(self, group: Group) -> None:
        """Forget a request's search, with everything that it holds. What its clean-up raises is passed on."""
        driver = self._running.pop(group, None)
        if driver is not None:
            driver.close()
