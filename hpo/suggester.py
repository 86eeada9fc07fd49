"""The suggestions of one study, as its coordinator asks for them.

`next` gives what `hpo.suggest.choose` gives on the same history: whatever is remembered, prepared or computed elsewhere
only makes it cheaper. The caller serves one ask of a study at a time and has just caught its history up.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpo.history import History
from hpo.protocol import Value, Workload
from hpo.space import Flat
from hpo.spec import StudySpec
from hpo.suggest import Chooser, Suggestion


class Suggester:
    """Asks one study's sampler. Close it when the study is forgotten."""

    def __init__(self, spec: StudySpec, history: History, workload: Workload | None = None) -> None:
        self.spec = spec
        self._history = history
        self._chooser = Chooser(spec, workload)

    def next(
        self, number: int, fixed: Mapping[str, Value] | None = None, memory_bytes: int | None = None
    ) -> Suggestion:
        """Choose the point of trial `number` for a device with so much memory.

        Raises:
            TooSmall: the device is; nothing is wrong with the study.
            NothingFeasible: no point could be found, or the one that is given can never be trained.
        """
        snapshot = self._history.snapshot(self.spec.space)
        return self._chooser.choose(snapshot, number, self.spec.seed, fixed, memory_bytes)

    def fits(self, point: Flat, memory_bytes: int | None) -> bool:
        """Whether nothing says that a point, where it is complete, runs out of memory on such a device."""
        self._chooser.board.update(self._history.snapshot(self.spec.space).entries)
        return len(point) < len(self.spec.space.names) or self._chooser.room(memory_bytes).holds(point)

    @property
    def marked(self) -> bool:
        """Whether a trial has run out of memory: then not every device gets every point."""
        return bool(self._chooser.board.marks)

    def foresee(self, number: int) -> None:
        """Prepare what `next` may be asked for next, if that is worth it; returns at once."""

    def close(self) -> None:
        """Let go of what was begun."""
