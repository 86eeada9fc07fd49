"""A process of its own for each thing that is measured: one core, one thread, its own memory and its own torch.

What must not share a process (huge pages are chosen before torch is loaded, peak memory is a process's own) still has
to be measured by turns, so that a noisy machine slows all contestants alike. `Child.ask` sends a child one request and
waits for its one answer; between requests a child sleeps and costs nothing. Invariant: a child does nothing that was
not asked for, and dies with its parent's pipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Set to 1 by `whetstone train` before it loads torch; a plain script does not have it."""


class Broken(Exception):
    """A measured process ended without an answer. What it said stands above, on stderr."""


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def environment(*, huge_pages: bool) -> dict[str, str]:
    """The environment of a measured process: one thread in every library, huge pages or none."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    inherited = {name: value for name, value in os.environ.items() if name != HUGE_PAGES}
    return inherited | one | ({HUGE_PAGES: "1"} if huge_pages else {})


class Child:
    """The parent's side of a process that runs `benchmarks.parts.PART`, pinned to `core`."""

    def __init__(self, part: str, *, core: int, huge_pages: bool = False, **arguments: Any) -> None:
        self.part = part
        self._process = subprocess.Popen(  # noqa: S603 - this very Python, and a module of ours
            [sys.executable, "-m", "benchmarks.child", part, str(core), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(huge_pages=huge_pages),
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to a request. Raises Broken where it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Broken(f"the measured process {self.part!r} ended with code {self._process.wait()} and no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Let it go, and wait until its memory is free."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that is worth a goodbye
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@contextmanager
def children(**each: Child) -> Iterator[dict[str, Child]]:
    """These children by name, gone when the block is left, however it is left."""
    try:
        yield each
    finally:
        for child in each.values():
            child.end()


class Channel:
    """The child's side: requests come in, one answer goes out for each."""

    def __init__(self) -> None:
        # Whatever a library prints must not be taken for an answer.
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def receive(self) -> dict[str, Any]:
        """The next request. Ends the process where there will be none."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, **answer: Any) -> None:
        """Answer the request received last."""
        try:
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()
        except BrokenPipeError:  # nobody is left to hear it
            os._exit(0)


def main() -> None:
    """`python -m benchmarks.child PART CORE ARGUMENTS`"""
    part, core, arguments = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core)})
    from benchmarks import parts  # only now: torch counts the cores when it is loaded

    try:
        parts.PARTS[part](Channel(), **json.loads(arguments))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
