"""What a device's memory has room for, learnt from the trials that ran out of it.

A point that ran out on a device is not given to one as small again; nor, where the workload says how large points are
(`hpo.protocol.Sized`), is any that is as large as the smallest that ran out there. A device whose memory is unknown is
given anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpo.board import Key, Mark
from hpo.protocol import Sized, Workload
from hpo.space import Flat
from hpo.spec import StudySpec


class Sizes:
    """How large the points of one study are, as far as its workload can tell; each mark is measured once."""

    def __init__(self, spec: StudySpec, workload: Workload | None) -> None:
        self._spec = spec
        self._workload = workload if isinstance(workload, Sized) else None
        self._marked: dict[Key, float | None] = {}

    def of(self, point: Flat) -> float | None:
        if self._workload is None:
            return None
        return self._workload.footprint(self._spec.space.nest(point), self._spec.settings)

    def least(self, marks: Iterable[Mark]) -> float | None:
        """Return the size of the smallest marked point, or None where no size is known."""
        sizes = []
        for mark in marks:
            if mark.key not in self._marked:
                self._marked[mark.key] = self.of(mark.point)
            sizes.append(self._marked[mark.key])
        return min((size for size in sizes if size is not None), default=None)


class Room:
    """What fits one device."""

    def __init__(self, spec: StudySpec, sizes: Sizes, marks: Iterable[Mark], memory_bytes: int | None) -> None:
        relevant = [] if memory_bytes is None else [mark for mark in marks if mark.memory_bytes >= memory_bytes]
        self._space = spec.space
        self._sizes = sizes
        self._keys = {mark.key for mark in relevant}
        self._least = sizes.least(relevant)

    def holds(self, point: Flat) -> bool:
        """Whether nothing says that this complete point would run out of memory here."""
        if not self._keys:
            return True
        if self._space.key(point) in self._keys:
            return False
        if self._least is None:
            return True
        size = self._sizes.of(point)
        return size is None or size < self._least
