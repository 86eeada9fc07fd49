"""The client's promises: two errors in one line each, and repetition only where it cannot do a thing twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from cli.serve import KEEP_ALIVE_S
from cli.settings import Settings
from hpo.protocol import ReportReply, ReportRequest
from hpo.rest import RESTS_S, ApiError, Backoff, Client, ServerUnreachable
from tests.unit.worker_server import Drop, Reply, Seen, Server, refusal, serving


def failing_once(first: Reply | None, then: Reply) -> tuple[list[int], object]:
    """An answer that fails at first (None: cuts the connection) and then is well."""
    calls = [0]

    def answer(_: Seen) -> Reply:
        calls[0] += 1
        if calls[0] == 1:
            if first is None:
                raise Drop
            return first
        return then

    return calls, answer


def test_a_connection_is_kept_from_report_to_report_and_given_up_before_the_server_does() -> None:
    heartbeat_s = Settings().heartbeat_s
    assert 2 * heartbeat_s < RESTS_S < KEEP_ALIVE_S / 1.5


def test_the_token_and_json_go_with_every_call() -> None:
    with serving(lambda _: (200, {"ok": True})) as server, Client(server.url, "wst_secret") as client:
        assert client.post("/api/v1/studies", json={"name": "a"}) == {"ok": True}
    (seen,) = server.seen
    assert seen.headers["Authorization"] == "Bearer wst_secret"
    assert seen.body == {"name": "a"}
    assert seen.headers["Idempotency-Key"]


def test_an_empty_answer_is_none() -> None:
    with serving(lambda _: (204, None)) as server, Client(server.url, "t") as client:
        assert client.delete("/api/v1/studies/1") is None


def test_the_servers_error_arrives_with_all_it_says() -> None:
    details = [{"at": "space[0].low", "fault": "must be below high"}]
    with (
        serving(lambda _: (422, refusal("invalid", "the study has 1 fault", details))) as server,
        Client(server.url, "t") as client,
        pytest.raises(ApiError) as caught,
    ):
        client.post("/api/v1/studies", json={})
    error = caught.value
    assert (error.status, error.code, error.message, error.details) == (
        422,
        "invalid",
        "the study has 1 fault",
        details,
    )
    assert len(server.seen) == 1, "a refusal is not repeated"


def test_nobody_there_is_one_line_with_address_and_remedy() -> None:
    server = Server(lambda _: (200, {}))
    server.start()
    server.stop()
    with Client(server.url, "wst_secret", patience_s=0.3) as client, pytest.raises(ServerUnreachable) as caught:
        client.get("/api/v1/studies")
    line = str(caught.value)
    assert server.url in line
    assert "whetstone serve" in line
    assert "\n" not in line
    assert "wst_secret" not in line
    assert caught.value.refused


@pytest.mark.parametrize("fault", [None, (503, refusal("database_unavailable")), (429, refusal("too_many"))])
def test_what_is_safe_is_repeated_until_it_is_answered(fault: Reply | None) -> None:
    for call in (
        lambda client: client.get("/api/v1/studies/1"),
        lambda client: client.patch("/api/v1/studies/1", json={"state": "paused"}),
        lambda client: client.post("/api/v1/studies", json={"name": "a"}),
        lambda client: client.post("/api/v1/anything", json={}, key="k1"),
    ):
        calls, answer = failing_once(fault, (200, {"study": 1}))
        with serving(answer) as server, Client(server.url, "t") as client:
            assert call(client) == {"study": 1}
        assert calls[0] == 2
        keys = {seen.headers.get("Idempotency-Key") for seen in server.seen}
        assert len(keys) == 1, "a repetition carries the same key"


def test_what_could_happen_twice_is_not_repeated() -> None:
    calls, answer = failing_once(None, (200, {}))
    with serving(answer) as server, Client(server.url, "t") as client, pytest.raises(ServerUnreachable):
        client.post("/api/v1/studies/1/trials/2/requeue")
    assert calls[0] == 1


def test_a_server_that_comes_back_within_patience_is_found() -> None:
    server = Server(lambda _: (200, {"state": "running"}))
    server.start()
    server.stop()
    threading.Timer(0.5, server.start).start()
    with Client(server.url, "t", patience_s=60) as client:
        assert client.get("/api/v1/studies/1") == {"state": "running"}
    server.stop()


def test_a_fault_of_the_servers_own_is_shown_at_once() -> None:
    with serving(lambda _: (500, "<h1>oops</h1>")) as server, Client(server.url, "t") as client:
        with pytest.raises(ApiError, match="500") as caught:
            client.get("/api/v1/studies")
        assert caught.value.code == "http_500"
        assert len(server.seen) == 1


def test_a_page_that_is_no_json_is_an_error_that_says_so() -> None:
    with (
        serving(lambda _: (200, "<html>")) as server,
        Client(server.url, "t") as client,
        pytest.raises(ApiError, match="Whetstone server"),
    ):
        client.get("/api/v1/studies")


def test_a_redirect_is_named_and_the_token_is_not_carried_along() -> None:
    with serving(lambda _: (200, {})) as other:
        with (
            serving(lambda _: (301, None, {"Location": other.url})) as server,
            Client(server.url, "t") as client,
            pytest.raises(ApiError, match="WHETSTONE_URL"),
        ):
            client.get("/api/v1/studies")
        assert not other.seen


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "", "http://", "http://user:secret@host", "http://h?x=1"]
)
def test_an_address_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:8000") as caught:
        Client(url, "t")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["with space", "new\nline", "ключ"])
def test_a_token_that_can_be_none_is_refused_without_repeating_it(token: str) -> None:
    with pytest.raises(ValueError, match="WHETSTONE_TOKEN") as caught:
        Client("http://127.0.0.1:1", token)
    assert token not in str(caught.value)


def test_pages_walks_the_list_and_stops_at_the_limit() -> None:
    def answer(seen: Seen) -> Reply:
        start = int(seen.path.split("cursor=")[1].split("&")[0]) if "cursor=" in seen.path else 0
        size = 2
        items = [{"n": n} for n in range(start, min(start + size, 5))]
        return 200, {"items": items, "next": str(start + size) if start + size < 5 else None}

    with serving(answer) as server, Client(server.url, "t") as client:
        assert [item["n"] for item in client.pages("/api/v1/studies", params={"state": None})] == [0, 1, 2, 3, 4]
        assert [item["n"] for item in client.pages("/api/v1/studies", params={"limit": 3})] == [0, 1, 2]


def test_a_download_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    body = "x" * 300_000
    with serving(lambda _: (200, body)) as server, Client(server.url, "t") as client:
        assert client.download("/api/v1/file", tmp_path / "a") == 300_000
    assert (tmp_path / "a").read_text() == body
    with (
        serving(lambda _: (200, body, {"Content-Length": "999999"})) as server,
        Client(server.url, "t", timeout_s=1) as client,
        pytest.raises(ServerUnreachable),
    ):
        client.download("/api/v1/file", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_server_that_hangs_is_given_up_in_time() -> None:
    given_up = threading.Event()

    def answer(_: Seen) -> Reply:
        given_up.wait(60)
        return 200, {}

    with serving(answer) as server, Client(server.url, "t") as client:
        began = time.monotonic()
        with pytest.raises(ServerUnreachable, match="did not answer in time"):
            client.once("GET", "/api/v1/studies", timeout_s=0.3)
        assert time.monotonic() - began < 20
        given_up.set()


def test_waits_double_up_to_a_cap_and_are_scattered() -> None:
    backoff = Backoff(0.1, 2.0)
    waits = [backoff.next() for _ in range(12)]
    assert all(0.05 * 2**n <= wait <= 0.1 * 2**n for n, wait in enumerate(waits[:4]))
    assert all(1.0 <= wait <= 2.0 for wait in waits[6:])
    assert len(set(waits)) == 12
    assert Backoff().next(ApiError(429, "c", "m", retry_after=7.0)) == 7.0


def test_what_a_newer_server_says_beside_a_lease_is_passed_over() -> None:
    known = {"verdict": "go_on", "reason": ""}
    assert ReportReply.model_validate(known | {"since_1_4": [1, 2]}) == ReportReply.model_validate(known)
    with pytest.raises(ValidationError):
        ReportRequest.model_validate({"token": 1, "since_1_4": [1, 2]})
