"""The suggestions of one study, as its coordinator asks for them.

Invariant: `next` gives what `hpo.suggest.choose` gives on the same history. What is remembered, computed in the
sampling process or prepared ahead only makes it cheaper: a point is prepared for one state of the history, and is
dropped where there is another. The caller serves one ask of a study at a time and has just caught its history up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo.errors import WhetstoneError
from hpo.history import History
from hpo.protocol import Value, Workload
from hpo.samplers import Session
from hpo.sampling import Busy, Elsewhere, SamplerFailed, SamplingProcess
from hpo.snapshot import Snapshot, changed
from hpo.space import Flat
from hpo.spec import StudySpec
from hpo.suggest import Asking, Chooser, Suggestion
from hpo.tpe import MOST, Table

log = logging.getLogger("whetstone")

SLOW_S = 0.05
"""A TPE that would take longer works in the sampling process."""
TERM_S = 15e-9
"""What TPE takes for one candidate, one trial and one dimension;"""
DIMENSION_S = 0.7e-3
"""and for a dimension beside, where they are drawn one by one."""
LONGEST_REST = 31


@dataclass
class Worth:
    """Whether it is worth while to prepare after an event of some kind: the longer in vain, the longer it rests."""

    rest: int = 0
    longer: int = 0

    def due(self) -> bool:
        self.rest -= 1
        return self.rest < 0

    def proved(self, used: bool) -> None:
        self.longer = 0 if used else min(2 * self.longer + 1, LONGEST_REST)
        self.rest = self.longer


@dataclass(frozen=True)
class Prepared:
    """A point made ahead: of which trials, for which number, around which values."""

    snapshot: Snapshot
    number: int
    fixed: Mapping[str, Value]
    suggestion: Suggestion
    worth: Worth

    def serves(self, snapshot: Snapshot, number: int, fixed: Mapping[str, Value]) -> bool:
        mine = self.snapshot
        return (number, fixed) == (self.number, self.fixed) and (
            snapshot is mine
            or (
                len(snapshot.entries) == len(mine.entries)
                and not changed(mine.entries, snapshot.entries)
                and snapshot.attributes == mine.attributes
            )
        )


class Suggester:
    """Asks one study's sampler. Close it when the study is forgotten.

    Args:
        spec: the study.
        history: its trials.
        workload: says which points can be trained.
        process: where slow samplers work; one of its own by default.
    """

    def __init__(
        self,
        spec: StudySpec,
        history: History,
        workload: Workload | None = None,
        process: SamplingProcess | None = None,
    ) -> None:
        self.spec = spec
        self._history = history
        self._own = SamplingProcess() if process is None else None
        self._elsewhere = Elsewhere(process or self._own)  # type: ignore[arg-type]  # one of the two is there
        self._table = Table(spec.space)
        self._chooser = Chooser(spec, workload, self._open)
        self._choosing = threading.Lock()
        self._wanted = 0
        """Calls of `next` that wait or work: nothing is prepared beside them."""
        self._slow = False
        """Whether the last point came from the sampling process."""
        self._fixed: Mapping[str, Value] = {}
        """What was given when a new trial was last asked for."""
        self._prepared: Prepared | None = None
        self._preparing: threading.Thread | None = None
        self._after_ask, self._after_tell = Worth(), Worth()
        self._closed = False

    def next(
        self, number: int, fixed: Mapping[str, Value] | None = None, memory_bytes: int | None = None
    ) -> Suggestion:
        """Choose the point of trial `number` for a device with so much memory.

        Raises:
            TooSmall: the device is; nothing is wrong with the study.
            NothingFeasible: no point could be found, or the one that is given can never be trained.
            SamplerFailed: the sampler raised an exception, crashed or hung.
        """
        snapshot, given = self._history.snapshot(self.spec.space), dict(fixed or {})
        if not snapshot.entries or snapshot.entries[-1].number < number:
            self._fixed = given
        self._wanted += 1
        try:
            with self._choosing:
                prepared, self._prepared = self._prepared, None
                if prepared is not None:
                    used = prepared.serves(snapshot, number, given)
                    prepared.worth.proved(used)
                    # A point for any device is the one for this device, too, unless it is too large.
                    if used and self._chooser.marks.room(memory_bytes).holds(prepared.suggestion.params):
                        return prepared.suggestion
                self._slow = False
                return self._chooser.choose(snapshot, number, self.spec.seed, given, memory_bytes)
        finally:
            self._wanted -= 1

    def warm(self) -> None:
        """Read the history and take it in, so that the first `next` finds that done.

        Raises:
            NotFound: the study is gone.
            DatabaseUnavailable: PostgreSQL does not answer.
        """
        self._history.refresh()
        with self._choosing:
            snapshot = self._history.snapshot(self.spec.space)
            self._chooser.learn(snapshot)
            self._is_slow(self.spec, snapshot)  # fills the table where the sampler has one

    def fits(self, point: Flat, memory_bytes: int | None) -> bool:
        """Whether nothing says that a point, where it is complete, runs out of memory on such a device."""
        self._chooser.marks.update(self._history.snapshot(self.spec.space).entries)
        return len(point) < len(self.spec.space.names) or self._chooser.marks.room(memory_bytes).holds(point)

    def beyond(self, memory_bytes: int | None) -> list[int]:
        """The ids of the queued trials that such a device has no room for, as far as the history knows."""
        if memory_bytes is None or not self.marked:
            return []
        self._chooser.marks.update(self._history.snapshot(self.spec.space).entries)
        return self._chooser.marks.beyond(memory_bytes)

    @property
    def marked(self) -> bool:
        """Whether a trial has run out of memory: then not every device gets every point."""
        return len(self._chooser.marks) > 0

    def foresee(self, number: int | None = None) -> None:
        """Prepare what `next` may be asked for after an ask or a tell, if that is worth while; returns at once.

        Only what the sampling process makes is worth it, and what was prepared in vain of late is not.

        Args:
            number: of the next trial, after an ask; after a tell the one after the last.
        """
        worth = self._after_tell if number is None else self._after_ask
        busy = self._preparing is not None and self._preparing.is_alive()
        if self._closed or busy or self._wanted or not self._slow or not worth.due():
            return
        self._preparing = threading.Thread(
            target=self._prepare, args=(number, self._fixed, worth), name="whetstone-ahead", daemon=True
        )
        self._preparing.start()

    def close(self) -> None:
        """Let go of what was begun."""
        self._closed = True
        self._elsewhere.close()
        if self._own is not None:
            self._own.close()

    def _prepare(self, number: int | None, fixed: Mapping[str, Value], worth: Worth) -> None:
        try:
            self._history.refresh()
            snapshot = self._history.snapshot(self.spec.space)
            if number is None:
                number = snapshot.entries[-1].number + 1 if snapshot.entries else 0
            if self._wanted or not self._choosing.acquire(blocking=False):
                return
            try:
                earlier = self._prepared
                if earlier is not None and earlier.serves(snapshot, number, fixed):
                    return
                if earlier is not None:
                    earlier.worth.proved(False)
                self._prepared = None
                made = self._chooser.choose(snapshot, number, self.spec.seed, fixed)
                self._prepared = Prepared(snapshot, number, fixed, made, worth)
            finally:
                self._choosing.release()
        except Busy:
            pass
        except (WhetstoneError, SamplerFailed) as error:
            log.debug("nothing was prepared: %s", error)  # who asks in earnest is told
        except Exception:
            log.exception("a suggestion could not be prepared ahead")

    def _open(self, spec: StudySpec, snapshot: Snapshot, number: int, seed: int, fixed: Mapping[str, Any]) -> Asking:
        if not self._is_slow(spec, snapshot):
            return Session(spec, snapshot, number, seed, fixed, self._table)
        self._slow = True
        ahead = threading.current_thread() is self._preparing
        return self._elsewhere.open(spec, snapshot, number, seed, fixed, wait=not ahead)

    def _is_slow(self, spec: StudySpec, snapshot: Snapshot) -> bool:
        """Whether the sampler's work would be felt by others. A Gaussian process begins with random points."""
        sampler = spec.sampler
        if sampler.name not in ("tpe", "gp"):
            return False
        self._table.update(snapshot.entries)
        finished, start = self._table.finished(), sampler.options["n_startup_trials"]
        if finished < start - 1:
            return False
        if sampler.name == "gp":
            return True
        dimensions = len(spec.space.reduced)
        terms = min(finished, MOST) * sampler.options["n_ei_candidates"] * dimensions
        alone = 0.0 if sampler.options["multivariate"] else dimensions * DIMENSION_S
        return bool(terms * TERM_S + alone > SLOW_S)
