"""Who used the processor meanwhile: the API process, PostgreSQL, the load. From /proc; nothing is known elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path


def family(pid: int | None) -> list[int]:
    """A process and all that it started and that still run."""
    if pid is None:
        return []
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.parent.name)] = int(_fields(entry)[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


class Processor:
    """Cores in use by processes, by name, since the last look: 1.0 is one core all the time."""

    def __init__(self, pids: Mapping[str, int | None]) -> None:
        self._pids = dict(pids)
        self._at, self._used = time.monotonic(), {name: _seconds(pid) for name, pid in self._pids.items()}

    def cores(self) -> dict[str, float]:
        now, used = time.monotonic(), {name: _seconds(pid) for name, pid in self._pids.items()}
        passed = now - self._at
        cores = {name: round((used[name] - self._used[name]) / passed, 2) for name in used}
        self._at, self._used = now, used
        return cores


def said(cores: Mapping[str, float]) -> str:
    """For a note."""
    return "cores: " + ", ".join(f"{name} {share:.2f}" for name, share in cores.items())


def _seconds(pid: int | None) -> float:
    """Processor time of a process and its children, those that have ended too."""
    ticks = 0
    for one in family(pid):
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks += sum(int(field) for field in _fields(Path(f"/proc/{one}/stat"))[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def _fields(stat: Path) -> list[str]:
    """The fields of a stat file from its third on: the second one, the name, may hold anything."""
    return stat.read_text().rsplit(")", 1)[1].split()
