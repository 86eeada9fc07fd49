"""Where an embedded PostgreSQL lives: the folder `postgres` of a WHETSTONE_HOME, its lock, password, log and socket.

    postgres/data      the database, 0700        postgres/password   libpq's password file, 0600
    postgres/run       the socket, 0700          postgres/lock       held by the process that runs the server
    postgres/server.log

Invariant: folders are made with their final mode, and the mode of one that was there before is never changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from sqlalchemy import URL

from hpo.errors import WhetstoneError

USER = "postgres"
DATABASE = "whetstone"
REMEDIES = "set WHETSTONE_HOME to another folder, run as a normal user, or set DATABASE_URL to a server of your own"
_SOCKET = ".s.PGSQL.5432"
_SUN_PATH = 107  # bytes of a Unix socket's path on Linux


class EmbeddedError(WhetstoneError):
    """The embedded PostgreSQL cannot be started here; the message says why and what to do."""

    code = "embedded_postgres"


class Place:
    """Where everything of one home lies. Makes folders with mode 0700 and changes none that was there."""

    def __init__(self, home: Path) -> None:
        self.home = Path(os.path.abspath(home.expanduser()))
        self.folder = self.home / "postgres"
        self.data = self.folder / "data"
        self.unfinished = self.folder / "data.unfinished"
        self.password = self.folder / "password"
        self.lock_file = self.folder / "lock"
        self.log_file = self.folder / "server.log"
        self.made = False
        """Whether `lock` made the folder `postgres` just now."""

    def version(self) -> str | None:
        """PostgreSQL's major version that made the data, or None while there is none."""
        with contextlib.suppress(FileNotFoundError):
            return (self.data / "PG_VERSION").read_text().strip()
        return None

    def owner_of_data(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self.data.lstat().st_uid
        return None

    def socket_folder(self) -> Path:
        """`run` beside the data; in the temp folder where that path is too long for a socket or needs quoting."""
        near = self.folder / "run"
        if len(os.fsencode(near / _SOCKET)) <= _SUN_PATH and re.fullmatch(r"[A-Za-z0-9/._@+-]+", str(near)):
            return near
        name = hashlib.sha256(os.fsencode(os.path.realpath(self.folder))).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"whetstone-{os.geteuid()}-{name}"

    def url(self, socket_folder: Path) -> str:
        """Address for SQLAlchemy and libpq's clients. It names the password's file and holds no secret itself."""
        query = {"host": str(socket_folder), "passfile": str(self.password)}
        return URL.create("postgresql+psycopg2", username=USER, database=DATABASE, query=query).render_as_string()

    def lock(self) -> IO[str]:
        """Take the home for this process; the lock ends with the process, so a crash leaves nothing to clean up."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
                self.made = True
            handle = open(os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600), "r+")  # noqa: SIM115
        except OSError as error:
            raise EmbeddedError(f"cannot write to {self.folder}: {error.strerror}; {REMEDIES}") from None
        for _ in range(20):  # `locked` holds it for an instant
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.025)
            except OSError as error:  # some network file systems have no locks
                handle.close()
                raise EmbeddedError(f"cannot lock {self.lock_file}: {error.strerror}; {REMEDIES}") from None
            else:
                handle.truncate(0)
                handle.write(f"{os.getpid()}\n")
                handle.flush()
                return handle
        pid = handle.read().strip() or "unknown"
        handle.close()
        raise EmbeddedError(
            f"a Whetstone (pid {pid}) already runs its PostgreSQL in {self.folder}: "
            "use that one, stop it, or set WHETSTONE_HOME to another folder"
        )

    def locked(self) -> bool:
        """Whether some process holds this home now."""
        try:
            handle = open(self.lock_file)  # noqa: SIM115
        except OSError:
            return False
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def prepare(self, identity: str) -> tuple[int, int] | None:
        """Make the socket's folder, and see that it and the data are the server's own; returns the owner if not us."""
        owner = None if ":" not in identity else (int(identity.split(":")[0]), int(identity.split(":")[1]))
        uid = os.geteuid() if owner is None else owner[0]
        folder = self.socket_folder()
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            if owner is not None:
                os.chown(folder, *owner)
        # lstat: in a shared temp folder somebody may have put a link or a folder of theirs there first.
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
            raise EmbeddedError(
                f"{folder} must be a folder of uid {uid} with mode 0700 and is not: "
                f"remove it if it is yours, or {REMEDIES}"
            )
        if (owner_of_data := self.owner_of_data()) not in (None, uid):
            raise EmbeddedError(
                f"{self.data} belongs to uid {owner_of_data}, and PostgreSQL would have to run as uid {uid} here: "
                f"run as its owner, or {REMEDIES}"
            )
        return owner

    def open_log(self) -> IO[bytes]:
        """The server's log, begun afresh once it has grown past 8 MB."""
        with contextlib.suppress(FileNotFoundError):
            if self.log_file.stat().st_size > 8 << 20:
                self.log_file.replace(self.log_file.with_suffix(".log.1"))
        return open(os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

    def last_words(self) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        telling = [line for line in lines[-20:] if "FATAL" in line or "PANIC" in line or "ERROR" in line] or lines
        return telling[-1] if telling else "it left no message"

    def write_password(self, password: str) -> None:
        fresh = self.password.with_suffix(".new")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"*:*:*:{USER}:{password}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.password)


class Postmaster:
    """What postmaster.pid says: pid, data folder, start, port, socket folder, address, shared memory, status."""

    def __init__(self, lines: list[str]) -> None:
        self.pid = int(lines[0])
        self.socket_folder = Path(lines[4].strip()) if len(lines) > 4 else Path()
        self.shared_memory = [int(part) for part in lines[6].split()] if len(lines) > 6 else []
        """Key and id."""
        self.ready = len(lines) > 7 and lines[7].strip() == "ready"


def postmaster(data: Path) -> Postmaster | None:
    try:
        return Postmaster((data / "postmaster.pid").read_text().splitlines())
    except (OSError, ValueError, IndexError):
        return None


def end_orphan(place: Place, timeout_s: float, stopping: threading.Event) -> None:
    """Wait for a server that an earlier process left behind, and for what is left of a killed one, which may hang on a
    slow disk; drop its pid file if the pid is somebody else's by now. Returns early once `stopping` is set.

    We hold the home's lock, so whatever runs on this data folder has lost its owner and is on its way down.
    """
    deadline = time.monotonic() + timeout_s
    asked = False
    while (note := postmaster(place.data)) is not None and not stopping.is_set():
        late = time.monotonic() > deadline
        serves = _serves(note.pid, place.data)
        if not serves and (late or not _held(note.shared_memory)):
            # In a container pids come again soon, and PostgreSQL takes any living one for its rival.
            (place.data / "postmaster.pid").unlink(missing_ok=True)
            return
        if serves and not asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(note.pid, signal.SIGINT)
            asked = True
        if late:
            raise EmbeddedError(
                f"an earlier PostgreSQL (pid {note.pid}) still holds {place.data}: stop it (kill -INT {note.pid}), "
                "or set WHETSTONE_HOME to another folder"
            )
        stopping.wait(0.05)


def _held(shared_memory: Sequence[int]) -> bool:
    """Whether there are still processes with the memory of a killed postmaster: no other one starts beside them."""
    try:
        segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    except OSError:
        return False
    wanted = [part & 0xFFFFFFFF for part in shared_memory]  # a key is signed here, and unsigned there
    return any([int(part) & 0xFFFFFFFF for part in found[:2]] == wanted and int(found[6]) > 0 for found in segments)


def _serves(pid: int, data: Path) -> bool:
    """Whether `pid` is alive and a postmaster of this data folder (its working directory is the data folder)."""
    if not os.path.isdir("/proc/self"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    try:
        return os.path.samefile(f"/proc/{pid}/cwd", data)
    except OSError:
        return False
