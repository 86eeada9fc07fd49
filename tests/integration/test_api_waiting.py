"""Claims that wait and event streams, behind a real uvicorn: woken at once, holding nothing, ending with the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from api import wait
from hpo import events
from tests.integration.api_server import BRANIN, EXTERNAL, SECRETS, bearer, make_app, served


@pytest.fixture
def server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """A server whose waiters hardly ever look by themselves: who finds something was woken."""
    monkeypatch.setattr(wait, "LOOK_AGAIN_S", 60.0)
    app = make_app(engine)
    with served(app) as (url, uvicorn):
        app.state.connections = uvicorn.server_state.connections
        until(lambda: app.state.waiting._listener.connected)
        yield url, app


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < end, "this did not become true in time"
        time.sleep(0.02)


def client(url: str, role: str = "admin") -> httpx2.Client:
    limits = httpx2.Limits(max_connections=None)
    return httpx2.Client(base_url=url + "/api/v1/", headers=bearer(role), timeout=60.0, limits=limits)


@contextmanager
def leaving(url: str, path: str, body: dict[str, Any]) -> Iterator[None]:
    """A request that is on its way while the block runs, and whose client then leaves without an answer."""
    connection = HTTPConnection(urlsplit(url).netloc)
    headers = bearer("admin") | {"Content-Type": "application/json"}
    connection.request("POST", f"/api/v1/{path}", json.dumps(body), headers)
    yield
    connection.close()


def test_a_waiting_claim_is_answered_as_soon_as_there_is_work(server: tuple[str, Any]) -> None:
    url, app = server
    with client(url) as http, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(http.post, "claims", json={"worker": "w", "wait_s": 20})
        until(lambda: app.state.waiting.waiters == 1)
        time.sleep(0.5)
        assert not waiting.done()
        assert http.post("studies", json=BRANIN).status_code == 201
        answer = waiting.result(60)
        assert answer.status_code == 200, "it was not told, and by itself it looks later than it waits"
    until(lambda: app.state.waiting.waiters == 0)


def test_a_claim_waits_as_long_as_it_said(server: tuple[str, Any]) -> None:
    url, _ = server
    with client(url) as http:
        began = time.monotonic()
        answer = http.post("claims", json={"worker": "w", "wait_s": 1.5})
        assert answer.status_code == 204
        assert 1.4 <= time.monotonic() - began < 15
        assert http.post("claims", json={"worker": "w", "wait_s": 21}).status_code == 422


def test_a_hundred_waiting_claims_and_streams_hold_neither_threads_nor_connections(
    server: tuple[str, Any], engine: Engine
) -> None:
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN | {"budget": {"trials": 1}}).json()["study"]
        lease = http.post("claims", json={"worker": "w"}).json()
        threads = threading.active_count()
        streams = [http.send(http.build_request("GET", f"studies/{study}/events"), stream=True) for _ in range(50)]
        with ThreadPoolExecutor(50) as pool:
            claims = [pool.submit(http.post, "claims", json={"worker": f"w{n}", "wait_s": 20}) for n in range(50)]
            until(lambda: app.state.waiting.waiters >= 100)
            until(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
            # 50 of our own pool; the server's may have grown to answer the claims' first look, by the slow lane only
            assert threading.active_count() - threads - 50 <= wait.SLOW_THREADS + 40
            report = http.post(f"leases/{lease['lease']}/report", json={"token": lease["token"], "reports": []})
            assert report.json()["verdict"] == "go_on"
            assert not any(each.done() for each in claims), "the report waited for them"
            app.state.waiting.close()
            assert {each.result(60).status_code for each in claims} == {204}
        for stream in streams:
            stream.read()


def test_a_claim_whose_client_has_gone_takes_no_trial(server: tuple[str, Any]) -> None:
    url, app = server
    with client(url) as http:
        began = time.monotonic()
        with leaving(url, "claims", {"worker": "gone", "wait_s": 20}):
            until(lambda: app.state.waiting.waiters == 1)
            time.sleep(0.5)
        until(lambda: app.state.waiting.waiters == 0)
        assert time.monotonic() - began < 20, "it waited to the end"
        study = http.post("studies", json=BRANIN).json()["study"]
        time.sleep(0.5)
        assert http.get(f"studies/{study}").json()["counts"]["leased"] == 0


@contextmanager
def locked(engine: Engine, study: int) -> Iterator[None]:
    """Nobody numbers a trial of this study meanwhile: whoever tries waits."""
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1 FROM public.studies WHERE study_id = :study FOR UPDATE"), {"study": study})
        yield
        connection.rollback()


def someone_waits(engine: Engine) -> bool:
    """Whether somebody waits for a lock of this database."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with engine.connect() as connection:
        return connection.execute(sa.text(waiting)).scalar_one() > 0


def test_a_lease_that_nobody_heard_of_is_given_back(server: tuple[str, Any], engine: Engine) -> None:
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN).json()["study"]
        with locked(engine, study):
            with leaving(url, "claims", {"worker": "gone"}):
                until(lambda: someone_waits(engine))
            until(lambda: len(app.state.connections) == 1)  # ours
        until(lambda: http.get(f"studies/{study}").json()["counts"]["queued"] == 1)
        attempt = http.get(f"studies/{study}/trials/0").json()["history"][0]
        assert (attempt["worker"], attempt["state"]) == ("gone", "released")


def test_sixty_asks_that_take_long_leave_a_thread_to_a_report(server: tuple[str, Any], engine: Engine) -> None:
    url, _ = server
    with client(url) as http, ThreadPoolExecutor(60) as pool:
        slow = http.post("studies", json=EXTERNAL).json()["study"]
        http.post("studies", json=BRANIN)
        lease = http.post("claims", json={"worker": "w"}).json()
        with locked(engine, slow):
            asks = [pool.submit(http.post, f"studies/{slow}/ask", json={"worker": f"w{n}"}) for n in range(60)]
            time.sleep(2.0)
            assert not any(each.done() for each in asks)
            report = http.post(f"leases/{lease['lease']}/report", json={"token": lease["token"]})
            assert report.json()["verdict"] == "go_on"
            assert not any(each.done() for each in asks), "the report waited for them"
        assert {each.result(60).status_code for each in asks} == {201}


def lines(stream: httpx2.Response) -> Iterator[tuple[str, Any]]:
    """The events of a stream, which is over after two minutes: its pings are lines too."""
    end = time.monotonic() + 120
    event = ""
    for line in stream.iter_lines():
        assert time.monotonic() < end, "the stream told no more"
        if line.startswith("event:"):
            event = line.partition(":")[2].strip()
        elif line.startswith("data:"):
            yield event, json.loads(line.partition(":")[2])


def told(heard: Iterator[tuple[str, Any]], engine: Engine, study: int) -> list[tuple[str, Any]]:
    """What a stream tells of everything that was committed before this call. News arrives in the order of commits, so
    it ends with news of our own, of a trial: the tests that call this have none.
    """
    with engine.begin() as connection:
        events.notify(connection, "trial", study)
    found = [next(heard)]
    while found[-1][0] != "trial":
        found.append(next(heard))
    return found[:-1]


def test_a_stream_tells_what_changed_in_its_study_and_nothing_of_others(
    server: tuple[str, Any], engine: Engine
) -> None:
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN).json()["study"]
        other = http.post("studies", json=BRANIN | {"name": "other"}).json()["study"]
        with http.stream("GET", f"studies/{study}/events", headers=bearer("viewer")) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            heard = lines(stream)
            assert next(heard) == ("hello", {"study": study})
            until(lambda: app.state.waiting.waiters == 1)
            told(heard, engine, study)  # that it was launched
            http.patch(f"studies/{other}", json={"state": "paused"})
            assert "study" not in [kind for kind, _ in told(heard, engine, study)]
            http.patch(f"studies/{study}", json={"state": "paused"})
            assert [each for each in told(heard, engine, study) if each[0] == "study"] == [("study", {"study": study})]
        assert http.get("studies/999/events").status_code == 404


def test_a_burst_becomes_one_event(server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "GATHER_S", 2.0)  # also on a slow machine each report comes sooner after the last
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN).json()["study"]
        lease = http.post("claims", json={"worker": "w"}).json()
        with http.stream("GET", f"studies/{study}/events") as stream:
            heard = lines(stream)
            next(heard)
            began = time.monotonic()
            for epoch in range(10):
                report = {"token": lease["token"], "reports": [{"epoch": epoch, "value": 1.0}]}
                http.post(f"leases/{lease['lease']}/report", json=report)
            tell = {"token": lease["token"], "outcome": "complete", "value": 1.0}
            http.post(f"leases/{lease['lease']}/tell", json=tell)
            kinds = [next(heard)[0]]
            time.sleep(1.0)
            app.state.waiting.close()
            kinds += [kind for kind, _ in heard]
    assert 1 <= kinds.count("trial") <= 1 + (time.monotonic() - began) / wait.GATHER_S


def test_a_stream_works_with_the_session_cookie(server: tuple[str, Any]) -> None:
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN).json()["study"]
    session = app.state.auth.sign_in(SECRETS["viewer"])
    address = f"{url}/api/v1/studies/{study}/events"
    headers = {"Cookie": f"whetstone_session={session}"}
    with httpx2.stream("GET", address, headers=headers, timeout=60.0) as stream:
        assert stream.status_code == 200
        assert next(lines(stream))[0] == "hello"


def cut_listeners(engine: Engine) -> int:
    cut = sa.text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = 'whetstone listener' AND datname = current_database()"
    )
    with engine.connect() as connection:
        return int(connection.execute(cut).scalar_one())


def test_a_stream_is_told_to_look_again_after_the_listener_was_deaf(server: tuple[str, Any], engine: Engine) -> None:
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN).json()["study"]
        with http.stream("GET", f"studies/{study}/events") as stream:
            heard = lines(stream)
            next(heard)
            until(lambda: app.state.waiting.waiters == 1)
            assert cut_listeners(engine) == 1
            kinds: set[str] = set()
            while kinds < wait.STREAM_KINDS:
                kinds.add(next(heard)[0])
            app.state.waiting.close()  # ends the stream: what it said is all there is
            assert kinds | {kind for kind, _ in heard} == wait.STREAM_KINDS


def test_waiting_survives_a_lost_listen_connection(server: tuple[str, Any], engine: Engine) -> None:
    url, app = server
    with client(url) as http, ThreadPoolExecutor(1) as pool:
        assert cut_listeners(engine) == 1, "one LISTEN connection a process"
        waiting = pool.submit(http.post, "claims", json={"worker": "w", "wait_s": 20})
        until(lambda: app.state.waiting.waiters == 1)
        assert http.post("studies", json=BRANIN).status_code == 201
        assert waiting.result(60).status_code == 200


def test_a_server_that_ends_does_not_wait_for_those_who_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "LOOK_AGAIN_S", 60.0)
    app = make_app(engine)
    with ThreadPoolExecutor(2) as pool:
        with served(app) as (url, _):
            http = client(url)
            study = http.post("studies", json=BRANIN | {"budget": {"trials": 1}}).json()["study"]
            http.post("claims", json={"worker": "w"})
            stream = pool.submit(lambda: client(url).get(f"studies/{study}/events").read())
            began = time.monotonic()
            claim = pool.submit(http.post, "claims", json={"worker": "v", "wait_s": 20})
            until(lambda: app.state.waiting.waiters == 2)
        assert time.monotonic() - began < 20, "the claim would have waited for so long, and the stream for longer"
        assert claim.result(60).status_code == 204
        assert b"hello" in stream.result(60)


def test_a_client_that_leaves_ends_its_stream(server: tuple[str, Any]) -> None:
    url, app = server
    with client(url) as http:
        study = http.post("studies", json=BRANIN).json()["study"]
        with http.stream("GET", f"studies/{study}/events") as stream:
            heard = lines(stream)  # held on to: dropped, it would close the stream
            next(heard)
            until(lambda: app.state.waiting.waiters == 1)
    until(lambda: app.state.waiting.waiters == 0)
    assert app.state.waiting._open == 0
