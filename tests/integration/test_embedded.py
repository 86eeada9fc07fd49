"""What the embedded PostgreSQL promises, tried on real servers with real kills."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa

from hpo import database, embedded, launcher, schema
from hpo.embedded import EmbeddedPostgres
from hpo.pghome import EmbeddedError, Place

KEEP = """
import sys, time
from pathlib import Path
from hpo.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
print(server.start(), server.pid, flush=True)
sys.stdin.read()
server.stop()
"""
USE = """
import sys
from pathlib import Path
import sqlalchemy as sa
from hpo.embedded import EmbeddedError, EmbeddedPostgres
try:
    with EmbeddedPostgres(Path(sys.argv[1])) as server:
        uid = open(f"/proc/{server.pid}/status").read().split("Uid:")[1].split()[0]
        with sa.create_engine(server.url).connect() as connection:
            print(connection.execute(sa.text("SELECT 40 + 2")).scalar(), uid)
except EmbeddedError as error:
    print(error)
"""
FAST = {"fsync": "off"}


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a path short enough for a socket in it, wherever the tests' own folders are."""
    with tempfile.TemporaryDirectory(prefix="wst-") as folder:
        yield Path(folder)


@pytest.fixture
def home(short_path: Path) -> Path:
    return short_path / "home"


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A home that every user of this machine can reach (pytest's own folders are closed)."""
    with tempfile.TemporaryDirectory(prefix="whetstone-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "home"


def ask(url: str, statement: str = "SELECT 1") -> object:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        result = connection.execute(sa.text(statement))
        return result.scalar() if result.returns_rows else None


def eventually(check: Callable[[], object], seconds: float = 120.0) -> object:
    """The first answer of `check` that is true; its last error where there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = check()
            if answer:
                return answer
            problem: Exception = AssertionError(f"still {answer!r}")
        except (sa.exc.OperationalError, OSError) as error:
            problem = error
        if time.monotonic() > deadline:
            raise problem
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def keeper(home: Path) -> tuple[subprocess.Popen[str], str, int]:
    """Another process that runs a server in `home`: it, the URL and the postmaster's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url, pid = process.stdout.readline().split()
    return process, url, int(pid)


def test_a_killed_server_comes_back_with_what_was_committed(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        ask(server.url, "CREATE TABLE kept AS SELECT 7 AS number")
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: server.pid not in (None, first) and ask(server.url, "SELECT number FROM kept")) == 7


def children(pid: int) -> list[int]:
    found = []
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat_file.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat_file.parent.name))
    return found


def test_a_killed_server_comes_back_after_processes_that_outlive_it_for_a_while(home: Path) -> None:
    """One that waits for a slow disk, say. Until it has ended PostgreSQL starts no other server on this data."""
    with EmbeddedPostgres(home, settings=FAST) as server:
        first = server.pid
        assert first is not None
        hangs = children(first)[0]
        os.kill(hangs, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        threading.Timer(6.0, os.kill, (hangs, signal.SIGCONT)).start()
        assert eventually(lambda: server.pid not in (None, first) and ask(server.url)) == 1
        assert not alive(hangs)


def test_it_ends_with_a_killed_owner_and_the_next_owner_finds_its_data(home: Path) -> None:
    owner, url, pid = keeper(home)
    ask(url, "CREATE TABLE kept AS SELECT 7 AS number")
    held = sa.create_engine(url).connect()  # a client that is still connected delays nothing
    held.execute(sa.text("SELECT 1"))
    owner.kill()
    owner.wait()
    with EmbeddedPostgres(home) as server:
        assert not alive(pid)
        assert ask(server.url, "SELECT number FROM kept") == 7


def test_it_ends_by_itself_when_its_owner_is_killed(home: Path) -> None:
    owner, _, pid = keeper(home)
    owner.kill()
    owner.wait()
    eventually(lambda: not alive(pid))


def test_owner_and_server_killed_together_leave_nothing_in_the_way(home: Path) -> None:
    owner, url, pid = keeper(home)
    ask(url, "CREATE TABLE kept AS SELECT 7 AS number")
    owner.send_signal(signal.SIGSTOP)  # or it might start the server again before it is killed itself
    os.waitpid(owner.pid, os.WUNTRACED)
    os.kill(pid, signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert (home / "postgres" / "data" / "postmaster.pid").exists()
    with EmbeddedPostgres(home) as server:
        assert ask(server.url, "SELECT number FROM kept") == 7


def test_a_server_left_behind_by_its_owner_is_ended_first(home: Path) -> None:
    owner, _, pid = keeper(home)
    os.kill(pid, signal.SIGSTOP)  # it cannot hear that its owner has died
    owner.kill()
    owner.wait()
    threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()
    with EmbeddedPostgres(home) as server:
        assert not alive(pid)
        assert ask(server.url) == 1


def test_a_pid_that_is_somebody_elses_by_now_is_no_rival(home: Path) -> None:
    with EmbeddedPostgres(home, settings=FAST):
        pid_file = home / "postgres" / "data" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        with EmbeddedPostgres(home, settings=FAST) as server:
            assert ask(server.url) == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_it_outlives_the_thread_that_started_it(home: Path) -> None:
    server = EmbeddedPostgres(home, settings=FAST)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    pid = server.pid
    time.sleep(0.5)
    assert ask(server.url) == 1
    assert server.pid == pid
    server.stop()


def test_stopping_is_a_clean_shutdown_and_can_be_repeated(home: Path) -> None:
    server = EmbeddedPostgres(home, settings=FAST)
    url = server.start()
    pid = server.pid
    assert pid is not None
    held = sa.create_engine(url).connect()
    held.execute(sa.text("SELECT 1"))
    server.stop()
    server.stop()
    assert not alive(pid)
    assert "database system is shut down" in (home / "postgres" / "server.log").read_text()
    assert server.start() == url  # and it can be used again
    assert "recovery" not in (home / "postgres" / "server.log").read_text()
    server.stop()


def test_a_fork_that_ends_takes_no_server_along(home: Path) -> None:
    with EmbeddedPostgres(home, settings=FAST) as server:
        child = os.fork()
        if child == 0:
            try:
                server.stop()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert ask(server.url) == 1
        with pytest.raises(EmbeddedError, match=f"pid {os.getpid()}"):
            EmbeddedPostgres(home).start()


def test_a_second_server_on_one_home_is_refused_naming_the_first(home: Path) -> None:
    owner, _, _ = keeper(home)
    try:
        with pytest.raises(EmbeddedError, match=rf"pid {owner.pid}\b.*WHETSTONE_HOME") as refused:
            EmbeddedPostgres(home).start()
        assert "\n" not in str(refused.value)
    finally:
        owner.communicate("")
    assert owner.returncode == 0


def test_other_commands_find_the_running_server_and_only_that(home: Path) -> None:
    assert embedded.running(home) is None
    owner, url, _ = keeper(home)
    found = embedded.running(home)
    assert found == url
    assert ask(found) == 1
    owner.kill()
    owner.wait()
    assert embedded.running(home) is None
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert embedded.running(home) == server.url
    assert embedded.running(home) is None


def mode(path: Path) -> int:
    """A file's mode; 0 where the server has removed it meanwhile."""
    try:
        return stat.S_IMODE(path.lstat().st_mode)
    except FileNotFoundError:
        return 0


def destinations(folder: Path) -> list[str]:
    """Where the links in a folder lead, without those that are gone by now."""
    found = []
    for link in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def test_no_existing_folder_is_changed_and_nothing_of_ours_is_open_to_others(short_path: Path) -> None:
    above = short_path / "above"
    home = above / "home"
    home.mkdir(parents=True)
    above.chmod(0o711)
    home.chmod(0o755)
    before = {path: (path.stat().st_mode, path.stat().st_uid) for path in (home, *home.parents)}
    users = Path("/etc/passwd").read_text()
    with EmbeddedPostgres(home, settings=FAST):
        paths = [home / "postgres", *(home / "postgres").rglob("*")]
        exposed = [path for path in paths if mode(path) & 0o077 and not path.is_symlink()]
        # The socket's own mode is for PostgreSQL to choose; the folder around it is what keeps others out.
        assert [path.name for path in exposed if not path.is_socket()] == []
        assert {stat.S_IMODE((home / "postgres" / name).stat().st_mode) for name in ("run", "data")} == {0o700}
    assert {path: (path.stat().st_mode, path.stat().st_uid) for path in before} == before
    assert Path("/etc/passwd").read_text() == users


def test_it_listens_on_no_tcp_port_and_asks_for_its_password(home: Path) -> None:
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert ask(server.url, "SHOW listen_addresses") == ""
        listening = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
        descriptors = destinations(Path(f"/proc/{server.pid}/fd"))
        assert not [link for link in descriptors if link.removeprefix("socket:[").rstrip("]") in listening]
        password = (home / "postgres" / "password").read_text().strip().rsplit(":", 1)[1]
        assert len(password) > 30
        assert password not in server.url
        with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
            psycopg2.connect(host=str(home / "postgres" / "run"), user="postgres", passfile="/dev/null")
        with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
            psycopg2.connect(host=str(home / "postgres" / "run"), user="postgres", password="guess")


def test_a_lost_password_file_is_replaced_by_a_new_password(home: Path) -> None:
    with EmbeddedPostgres(home, settings=FAST) as server:
        ask(server.url, "CREATE TABLE kept AS SELECT 7 AS number")
    password = home / "postgres" / "password"
    old = password.read_text()
    password.unlink()
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert ask(server.url, "SELECT number FROM kept") == 7
    assert password.read_text() != old


def test_a_data_folder_that_was_left_half_made_is_made_anew(home: Path) -> None:
    half = home / "postgres" / "data.unfinished"
    half.mkdir(parents=True, mode=0o700)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert ask(server.url) == 1
    assert not half.exists()


def test_a_home_too_deep_for_a_socket_gets_one_in_a_closed_temporary_folder(tmp_path: Path) -> None:
    home = tmp_path / ("deep" * 20) / "with, a comma: and spaces {}%"
    with EmbeddedPostgres(home, settings=FAST) as server:
        folder = Place(home).socket_folder()
        assert home not in folder.parents
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
        assert ask(server.url) == 1
        assert ask(str(embedded.running(home))) == 1


def test_a_socket_folder_planted_by_somebody_else_is_refused(tmp_path: Path) -> None:
    home = tmp_path / ("deep" * 25)
    folder = Place(home).socket_folder()
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    folder.symlink_to(theirs)
    try:
        with pytest.raises(EmbeddedError, match="must be a folder of uid"):
            EmbeddedPostgres(home, settings=FAST).start()
        folder.unlink()
        folder.mkdir()
        folder.chmod(0o755)
        with pytest.raises(EmbeddedError, match="with mode 0700"):
            EmbeddedPostgres(home, settings=FAST).start()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    finally:
        folder.rmdir()


def test_a_server_that_cannot_come_up_says_why_in_one_line_and_frees_the_home(home: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"shared_buffers.*DATABASE_URL") as refused:
        EmbeddedPostgres(home, settings={"shared_buffers": "plenty"}).start()
    assert "\n" not in str(refused.value)
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert ask(server.url) == 1


def test_a_home_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match=r"cannot write to .*WHETSTONE_HOME"):
        EmbeddedPostgres(tmp_path / "file").start()


def test_a_damaged_data_folder_is_named_not_replaced(home: Path) -> None:
    with EmbeddedPostgres(home, settings=FAST):
        pass
    control = home / "postgres" / "data" / "global" / "pg_control"
    control.write_bytes(b"\0" * 64)
    with pytest.raises(EmbeddedError, match="does not come up"):
        EmbeddedPostgres(home, settings=FAST).start()
    assert control.exists()


# Who runs it: root has two ways, everybody else one.

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become others")


@ROOT
def test_a_user_who_is_not_root_runs_it_as_himself(home: Path) -> None:
    # In a user namespace of its own this whole process, not only the server, is uid 1000 and has none of root's rights.
    launch = [sys.executable, launcher.__file__, str(os.getpid()), "15", "namespace", "run", sys.executable, "-c", USE]
    done = subprocess.run([*launch, str(home)], capture_output=True, text=True, check=False)
    if done.returncode == launcher.REFUSED:
        pytest.skip("user namespaces are refused here")
    assert done.stdout.split() == ["42", str(launcher.INSIDE)], done.stderr
    assert (home / "postgres" / "data").stat().st_uid == os.geteuid()


def without_namespaces(*command: str) -> str:
    """What a command prints where root has all its rights and may make no user namespaces (as under Docker)."""
    ready, wait = os.pipe(), os.pipe()
    output = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if ctypes.CDLL(None).unshare(0x10000000) != 0:
                os._exit(99)
            os.write(ready[1], b".")
            os.read(wait[0], 1)
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
            os.dup2(output[1], 1)
            os.execv(command[0], command)
        finally:
            os._exit(99)
    os.close(output[1])
    os.close(ready[1])
    if os.read(ready[0], 1):
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text("0 0 65536")
    os.write(wait[1], b".")
    with open(output[0]) as stream:
        text = stream.read()
    for descriptor in (ready[0], *wait):
        os.close(descriptor)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99:
        pytest.skip("user namespaces cannot be made, or not be forbidden, here")
    return text


@ROOT
def test_root_without_user_namespaces_runs_it_as_nobody_where_nobody_can_reach_it(open_home: Path) -> None:
    nobody = str(pwd.getpwnam("nobody").pw_uid)
    if "cannot reach" in (first := without_namespaces(sys.executable, "-c", USE, str(open_home))):
        pytest.skip("the installed PostgreSQL is not readable by other users")
    assert first.split() == ["42", nobody]
    assert without_namespaces(sys.executable, "-c", USE, str(open_home)).split() == ["42", nobody]
    # What was made that way is opened that way again, also where namespaces are to be had.
    done = subprocess.run([sys.executable, "-c", USE, str(open_home)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["42", nobody]


@ROOT
def test_root_without_any_way_is_told_the_remedies(tmp_path: Path) -> None:
    home = tmp_path / "home"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    message = without_namespaces(sys.executable, "-c", USE, str(closed / "home"))
    assert "unprivileged user cannot reach" in message
    assert "DATABASE_URL" in message
    assert message.count("\n") == 1
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not home.exists()


def test_it_serves_a_whole_database_of_ours(home: Path) -> None:
    with EmbeddedPostgres(home, settings=FAST) as server:
        engine = database.connect(server.url)
        schema.upgrade(engine)
        assert schema.check(engine) == "current"
        engine.dispose()


def test_what_lets_us_in_is_on_the_disk_before_the_folder_looks_done(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(embedded.os, "fsync", spy)
    with EmbeddedPostgres(home, settings=FAST):
        assert synced == ["pg_hba.conf", "password.new", "postgres"]
