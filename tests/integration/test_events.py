"""What news between processes promises: heard once it is true, and never missed without a word."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from hpo import database
from hpo.database import transaction
from hpo.embedded import EmbeddedPostgres
from hpo.events import Event, Listener, notify

RESYNC = Event("resync", None)


@pytest.fixture
def heard() -> queue.Queue[Event]:
    return queue.Queue()


@pytest.fixture
def listener(engine: Engine, heard: queue.Queue[Event]) -> Iterator[Listener]:
    with Listener(engine.url, heard.put) as made:
        assert heard.get(timeout=60) == RESYNC
        yield made


def nothing(heard: queue.Queue[Event], seconds: float = 0.3) -> bool:
    try:
        event = heard.get(timeout=seconds)
    except queue.Empty:
        return True
    raise AssertionError(f"heard {event}")


@pytest.mark.usefixtures("listener")
def test_what_is_said_is_heard(engine: Engine, heard: queue.Queue[Event]) -> None:
    with transaction(engine) as conn:
        notify(conn, "trial", 7)
        notify(conn, "worker")
    assert [heard.get(timeout=60), heard.get(timeout=60)] == [Event("trial", 7), Event("worker", None)]


@pytest.mark.usefixtures("listener")
def test_news_is_heard_after_its_transaction_and_only_if_it_commits(engine: Engine, heard: queue.Queue[Event]) -> None:
    def undone() -> None:
        with transaction(engine) as conn:
            notify(conn, "trial", 1)
            raise LookupError

    with pytest.raises(LookupError):
        undone()
    with transaction(engine) as conn:
        notify(conn, "work", 2)
        assert nothing(heard)
    assert heard.get(timeout=60) == Event("work", 2)


@pytest.mark.usefixtures("listener")
def test_the_same_said_twice_in_a_transaction_is_heard_once(engine: Engine, heard: queue.Queue[Event]) -> None:
    with transaction(engine) as conn:
        for _ in range(5):
            notify(conn, "work", 3)
    assert heard.get(timeout=60) == Event("work", 3)
    assert nothing(heard)


@pytest.mark.usefixtures("listener")
def test_what_others_say_on_the_channel_is_passed_over(engine: Engine, heard: queue.Queue[Event]) -> None:
    for payload in (
        "",
        "{",
        "[]",
        '{"kind": "drop", "study": 1}',
        '{"kind": "work"}',
        '{"kind": "work", "study": "1"}',
    ):
        with transaction(engine) as conn:
            conn.execute(sa.text("SELECT pg_notify('whetstone', :payload)"), {"payload": payload})
    with transaction(engine) as conn:
        notify(conn, "study", 4)
    assert heard.get(timeout=60) == Event("study", 4)


def test_a_callback_that_fails_does_not_end_the_listening(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    heard: queue.Queue[Event] = queue.Queue()

    def fail(event: Event) -> None:
        heard.put(event)
        raise LookupError("in the callback")

    with Listener(engine.url, fail):
        assert heard.get(timeout=60) == RESYNC
        for study in (1, 2):
            with transaction(engine) as conn:
                notify(conn, "work", study)
            assert heard.get(timeout=60) == Event("work", study)
    assert "in the callback" in caplog.text


def test_a_listener_that_was_cut_off_says_so_when_it_hears_again(
    engine: Engine, heard: queue.Queue[Event], listener: Listener
) -> None:
    with transaction(engine) as conn:
        cut = "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = current_database()"
        assert conn.execute(sa.text(cut + " AND application_name = 'whetstone listener'")).all() == [(True,)]
    assert heard.get(timeout=60) == RESYNC
    assert listener.connected
    with transaction(engine) as conn:
        notify(conn, "trial", 6)
    assert heard.get(timeout=60) == Event("trial", 6)


def test_it_hears_again_after_the_server_was_killed(tmp_path: Path, heard: queue.Queue[Event]) -> None:
    with EmbeddedPostgres(tmp_path / "home", settings={"fsync": "off"}) as server, Listener(server.url, heard.put):
        assert heard.get(timeout=60) == RESYNC
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert heard.get(timeout=120) == RESYNC
        engine = database.connect(server.url)
        with transaction(engine) as conn:
            notify(conn, "work", 1)
        assert heard.get(timeout=60) == Event("work", 1)
        engine.dispose()


def test_without_a_server_it_keeps_trying_quietly_and_can_be_stopped(
    heard: queue.Queue[Event], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql://somebody:hidden@127.0.0.1:{taken.getsockname()[1]}/d"
        listener = Listener(url, heard.put)
        listener.start()
        deadline = time.monotonic() + 60
        while "not listening to PostgreSQL" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not listener.wait_until_connected(1.0)
        listener.stop()
        listener.stop()
        assert not listener._thread.is_alive()
    assert heard.empty()
    assert caplog.text.count("not listening to PostgreSQL") == 1
    assert "hidden" not in caplog.text


def test_stopping_leaves_no_thread_and_no_connection(engine: Engine, listener: Listener) -> None:
    listener.stop()
    assert not listener._thread.is_alive()
    deadline = time.monotonic() + 60
    count = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'whetstone listener'"
        " AND datname = current_database()"
    )
    while True:
        with engine.connect() as connection:
            if connection.execute(count).scalar() == 0:
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
