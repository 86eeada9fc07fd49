"""Where the coordinator is measured: a real PostgreSQL with durable settings, databases in it, and API processes.

The server is the embedded one with its own defaults: every commit is on the disk. An API process is `whetstone serve`
as people start it, or the same kind of server over stock Optuna (benchmarks/stock.py). Whatever is started here ends
with the block that it was started in.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.child import cores
from benchmarks.measure import say
from benchmarks.processor import family
from hpo import database, schema
from hpo.coordinator import Coordinator
from hpo.embedded import EmbeddedPostgres
from hpo.tokens import Principal
from model.spec import SiameseWorkload

WORKER = Principal(id="token:0", role="worker", name="bench")
CONNECTIONS = "200"
"""Two API processes and the measuring one, each with its pool."""


@dataclass(frozen=True)
class Served:
    """An API process that answers. `exec_s` is what it took from its start until it said so."""

    url: str
    token: str
    pid: int
    exec_s: float


class Place:
    """A PostgreSQL in a folder of its own; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = EmbeddedPostgres(folder / "pg", settings={"max_connections": CONNECTIONS})
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Place:
        self._stack.enter_context(self._server)
        self.engine = database.connect(self._server.url)
        self._stack.callback(self.engine.dispose)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int | None:
        """Of PostgreSQL's first process."""
        return self._server.pid

    @property
    def version(self) -> str:
        with self.engine.connect() as connection:
            return str(connection.exec_driver_sql("SHOW server_version").scalar_one())

    def database(self, name: str, *, ours: bool = True) -> sa.Engine:
        """A new database, with the coordinator's tables or with nothing in it (stock Optuna makes its own)."""
        name = f"{name}_{uuid.uuid4().hex[:8]}"
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        made = database.connect(self.engine.url.set(database=name).render_as_string(hide_password=False))
        self._stack.callback(made.dispose)
        if ours:
            schema.upgrade(made)
        return made

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """No autovacuum while the block runs: it writes, and its transactions would be counted as somebody's."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in ("ALTER SYSTEM SET autovacuum = off", "SELECT pg_reload_conf()"):
                connection.exec_driver_sql(statement)
            try:
                yield
            finally:
                for statement in ("ALTER SYSTEM RESET autovacuum", "SELECT pg_reload_conf()"):
                    connection.exec_driver_sql(statement)

    @contextlib.contextmanager
    def pinned(self) -> Iterator[int | None]:
        """PostgreSQL and this process on the last core while the block runs; the first one is yielded, for a server.

        None, and nothing is pinned, where there is one core only.
        """
        every = cores()
        if len(every) < 2:
            yield None
            return
        pids = [0, *family(self._server.pid)]
        try:
            for pid in pids:
                _pin(pid, {every[-1]})
            yield every[0]
        finally:
            for pid in {0, *family(self._server.pid)}:
                _pin(pid, set(every))

    @contextlib.contextmanager
    def serve(self, engine: sa.Engine, *, core: int | None = None, stock: str = "") -> Iterator[Served]:
        """`whetstone serve` on a database, or with `stock` (a study's name) stock Optuna's API over it."""
        home = self.folder / f"home-{uuid.uuid4().hex[:8]}"
        home.mkdir()
        url = address(engine)
        if stock:
            command = [sys.executable, "-m", "benchmarks.stock", url, stock]
        else:
            command = [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--json"]
        began = time.perf_counter()
        with (home / "log").open("w") as log:
            process = subprocess.Popen(  # noqa: S603 - this very Python, and modules of ours
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment() | {"DATABASE_URL": url, "WHETSTONE_HOME": str(home)},
                preexec_fn=(lambda: _pin(0, {core})) if core is not None else None,
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the API process ended with {process.wait()}: {(home / 'log').read_text()[-2000:]}")
            answer = json.loads(line)
            yield Served(answer["url"], answer["token"], process.pid, time.perf_counter() - began)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
            _complain((home / "log").read_text())


def _complain(log: str) -> None:
    """Say what an API process complained of: its folder does not last."""
    count, first = log.count(" ERROR "), log.find(" ERROR ")
    if count:
        say.print(f"[yellow]the server's log has {count} errors, the first:[/]")
        say.print(log[first : first + 8000], markup=False)


def coordinator(engine: sa.Engine) -> Coordinator:
    """A coordinator in this process, as `whetstone serve` builds it. Nothing expires: no reaper runs."""
    workloads: dict[str, Any] = {"siamese": SiameseWorkload()}  # it fits by its shape; its faults are its own
    return Coordinator(engine, workloads)


def address(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WHETSTONE_", "PG"))}
    return inherited | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def _pin(pid: int, to: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.sched_setaffinity(pid, to)
