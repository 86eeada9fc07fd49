"""`whetstone serve`: the coordinator, its API and pages, and (without DATABASE_URL) the PostgreSQL they need."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output, presets, settings, store
from hpo.errors import WhetstoneError

if TYPE_CHECKING:
    import uvicorn

    from hpo.coordinator import Coordinator

Host = Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1: this machine only.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 picks a free one. Default 8000.")]


KEEP_ALIVE_S = 60
"""A worker that reports every ten seconds keeps its connection."""


class CannotListen(WhetstoneError):
    """The address is taken, or is not ours."""


def serve(
    host: Host = None,
    port: Port = None,
    json_line: Annotated[
        bool, typer.Option("--json", help="Print one JSON line with url and token once it answers, and nothing else.")
    ] = False,
    migrate: Annotated[bool, typer.Option(help="Upgrade the database at DATABASE_URL first.")] = True,
) -> None:
    """Run the server: REST API, pages and coordinator.

    Without DATABASE_URL it starts a PostgreSQL of its own in WHETSTONE_HOME and stops it again.
    """
    gc.disable()  # until it serves: all that is made on the way there stays
    chosen = settings.load(host=host, port=port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    for noisy in ("uvicorn.error", "alembic", "optuna", "httpx2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # also while the database starts: leave through the finally blocks
        signal.signal(number, lambda *_: _leave(stopping))
    _many_files()
    listener = listen(chosen.host, chosen.port)
    if not chosen.database_url:
        _refuse_second(chosen.home_dir)
    with listener, store.open_store(chosen, migrate=migrate) as engine:
        _serve(chosen, engine, listener, json_line=json_line, stopping=stopping)


def _many_files() -> None:
    """Allow as many open files as the system does: a thousand workers are as many connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems say "unlimited" and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _refuse_second(home: Path) -> None:
    """One server for an embedded database: it ends with the server that started it."""
    from hpo.embedded import running

    if running(home):
        other = settings.noted_server(home)
        who = f"the server at {other['url']}" if other else "a server or a demo"
        raise CannotListen(f"{who} already runs in {home}: stop it, or set WHETSTONE_HOME or DATABASE_URL for this one")


def _leave(stopping: threading.Event) -> None:
    if not stopping.is_set():
        stopping.set()
        raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, made before the slow things, so that a taken port is known at once. Raises `CannotListen`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only a socket that says it is TCP gets TCP_NODELAY from asyncio: without it every answer waits 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)  # until somebody listens, a second server could bind the same port
    except OSError as error:
        made.close()
        raise CannotListen(
            f"cannot listen on {host}:{port} ({error.strerror or error}): "
            "choose another port with --port, or --port 0 for a free one"
        ) from None
    return made


def _url(chosen: settings.Settings, listener: socket.socket) -> str:
    if chosen.public_url:
        return chosen.public_url.rstrip("/")
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  (compared, not bound)
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _serve(
    chosen: settings.Settings, engine: object, listener: socket.socket, *, json_line: bool, stopping: threading.Event
) -> None:
    from hpo.coordinator import Coordinator
    from model.spec import SiameseWorkload

    coordinator = Coordinator(
        engine,  # type: ignore[arg-type]
        {"siamese": SiameseWorkload()},
        term_s=chosen.term_s,
        heartbeat_s=chosen.heartbeat_s,
        stall_s=chosen.stall_s,
    )
    # PostgreSQL is at work on it while the rest is imported.
    threading.Thread(target=_read_ahead, args=(coordinator,), name="whetstone-ahead", daemon=True).start()

    import uvicorn

    from api.app import create_app
    from api.auth import OneTimeLink
    from api.methods import http_protocol
    from hpo.expiry import Reaper
    from hpo.tokens import Principal

    admin = f"wst_{secrets.token_urlsafe(32)}"
    granted = {_sha256(admin): Principal(id=f"process:{secrets.token_hex(4)}", role="admin", name="this server")}
    if chosen.admin_token:
        granted[_sha256(chosen.admin_token)] = Principal(
            id="environment:admin", role="admin", name="WHETSTONE_ADMIN_TOKEN"
        )
    if chosen.worker_token:
        granted[_sha256(chosen.worker_token)] = Principal(
            id="environment:worker", role="worker", name="WHETSTONE_WORKER_TOKEN"
        )
    local = home_token(chosen.home_dir)
    granted[_sha256(local)] = Principal(id=f"home:{_sha256(local)[:12]}", role="worker", name="workers of this home")
    link = OneTimeLink()
    url = _url(chosen, listener)
    app = create_app(
        coordinator,
        engine,  # type: ignore[arg-type]
        presets=presets.load_all(),
        artifacts=chosen.artifacts_root,
        process_tokens=granted,
        one_time=link,
        version=package_version("whetstone"),
    )

    class Server(uvicorn.Server):
        """Ends waiting claims and event streams the moment it is told to exit, so that they do not hold it up."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            stopping.set()
            app.state.waiting.close()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=KEEP_ALIVE_S,
        lifespan="on",
        http=http_protocol(),
        ws="none",
    )
    server = Server(config)
    gc.freeze()
    gc.enable()
    with Reaper(coordinator, chosen.term_s / 3), _noted(chosen.home_dir, url, admin, local):
        threading.Thread(
            target=_announce, args=(server, url, admin, link.path, json_line), name="announce", daemon=True
        ).start()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            stopping.set()
    if not server.started:
        raise CannotListen("the server did not start; the log above says why")


def _read_ahead(coordinator: Coordinator) -> None:
    try:
        coordinator.read_ahead()
    except Exception as error:  # also where the server stops meanwhile; an ask that needs it reads for itself
        logging.getLogger("whetstone").info("nothing more was read ahead: %s", error)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def home_token(home: Path) -> str:
    """The token of this home's own workers: made once and kept, for a worker outlives the server that it works for."""
    kept = home / "worker.token"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if len(secret := kept.read_text().strip()) >= 40:
            return secret
    secret = f"wst_{secrets.token_urlsafe(32)}"
    _write_private(kept, secret + "\n")
    return secret


def _write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its user may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


@contextmanager
def _noted(home: Path, url: str, token: str, worker: str) -> Iterator[None]:
    """Leave address and tokens in the home (0600), so that commands of the same user need no configuration."""
    note = settings.server_note(home)
    if settings.noted_server(home):  # another server's, on a database of its own: commands go on finding that one
        yield
        return
    _write_private(note, json.dumps({"url": url, "token": token, "worker": worker, "pid": os.getpid()}))
    try:
        yield
    finally:
        if f'"pid": {os.getpid()}' in (note.read_text() if note.exists() else ""):
            note.unlink(missing_ok=True)


def _announce(server: uvicorn.Server, url: str, token: str, login: str, json_line: bool) -> None:
    """Say where the server is, once it answers."""
    while not server.started:
        if server.should_exit:
            return
        threading.Event().wait(0.02)
    if json_line:
        sys.stdout.write(json.dumps({"url": url, "token": token}) + "\n")
        sys.stdout.flush()
        return
    output.err.print(f"\n[bold green]Whetstone is ready[/] at [bold]{url}[/]\n")
    output.err.print("  Open this link to sign in (once, as an administrator):")
    output.err.print(f"    {url}{login}\n", soft_wrap=True)
    output.err.print("  In another terminal:")
    output.err.print("    whetstone study launch --preset mini    [dim]launch a study[/]")
    output.err.print("    whetstone worker                        [dim]train its trials; one for each GPU or core[/]\n")
    output.err.print("  Ctrl-C stops it; studies are kept.\n")
