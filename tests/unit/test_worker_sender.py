"""The sender's promises: in order, together, none lost, and never in the way of training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hpo.protocol import EpochReport, Verdict
from hpo.rest import Client
from tests.unit.worker_server import Drop, Reply, Seen, Server, a_lease, refusal, serving, until
from workers.sender import Sender


def go_on(_: Seen) -> Reply:
    return 200, {"verdict": "go_on", "reason": ""}


@contextmanager
def sending(
    server: Server, *, gap_s: float = 0.0, capacity: int = 20_000, confirm: bool = False, **lease: Any
) -> Iterator[Sender]:
    with Client(server.url, "t") as client:
        sender = Sender(client, a_lease(**lease), gap_s=gap_s, capacity=capacity, confirm=confirm)
        sender.start()
        try:
            yield sender
        finally:
            sender.close(60.0)
            assert not any(thread.name.startswith("sender-") for thread in threading.enumerate())


def an_epoch(number: int) -> EpochReport:
    return EpochReport(epoch=number, value=number / 1000, metrics={"loss": 0.5})


def epochs(server: Server) -> list[int]:
    """Epochs in the order the server was given them, by the requests that it answered with success."""
    return [report["epoch"] for seen in server.what("report") for report in seen.body["reports"]]


def test_many_epochs_travel_in_few_requests_and_in_order() -> None:
    with serving(go_on) as server, sending(server, gap_s=0.2, heartbeat_s=60.0) as sender:
        began = time.monotonic()
        for number in range(1200):
            sender.report(an_epoch(number))
            time.sleep(0.0005)
        assert sender.flush(60)
        assert epochs(server) == list(range(1200))
        gaps = (time.monotonic() - began) / 0.2
        assert len(server.what("report")) <= gaps + 4, "one at once, one a gap, and three as large as they may be"
        assert all(len(seen.body["reports"]) <= 1000 for seen in server.seen)
        assert {seen.body["token"] for seen in server.seen} == {70}


def test_without_news_the_lease_is_renewed() -> None:
    began = time.monotonic()
    with serving(go_on) as server, sending(server, heartbeat_s=0.1):
        until(lambda: len(server.what("report")) >= 6)
        assert len(server.what("report")) <= (time.monotonic() - began) / 0.1
        assert all(seen.body["reports"] == [] for seen in server.seen)


def test_a_restart_of_the_server_loses_nothing_and_training_does_not_wait() -> None:
    server = Server(go_on)
    server.start()
    with sending(server) as sender:
        for number in range(3):
            sender.report(an_epoch(number))
        assert sender.flush(60)
        server.stop()
        began = time.monotonic()
        for number in range(3, 500):
            assert sender.report(an_epoch(number)) is Verdict.GO_ON
        assert time.monotonic() - began < 20, "they wait for no try"
        assert not sender.flush(0.5)
        server.start()
        assert sender.flush(60)
        assert epochs(server) == list(range(500))
    server.stop()


@pytest.mark.parametrize("fault", [None, 429, 500, 503])
def test_a_report_that_failed_is_sent_again(fault: int | None) -> None:
    failures = [0]

    def answer(seen: Seen) -> Reply:
        if failures[0] < 3:
            failures[0] += 1
            if fault is None:
                raise Drop
            return fault, refusal("database_unavailable")
        accepted.append(seen)
        return go_on(seen)

    accepted: list[Seen] = []
    with serving(answer) as server, sending(server) as sender:
        sender.report(an_epoch(0))
        sender.report(an_epoch(1))
        assert sender.flush(60)
    assert failures == [3]
    assert [report["epoch"] for seen in accepted for report in seen.body["reports"]] == [0, 1]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ((200, {"verdict": "prune", "reason": "median"}), Verdict.PRUNE),
        ((200, {"verdict": "stop", "reason": "stopped by a person"}), Verdict.STOP),
        ((200, {"verdict": "lost", "reason": "it expired"}), Verdict.LOST),
        ((409, refusal("lost", "it expired")), Verdict.LOST),
        ((404, refusal("not_found", "no such study")), Verdict.LOST),
        ((401, refusal("unauthenticated", "unknown token")), Verdict.LOST),
    ],
)
def test_what_the_coordinator_wants_is_known_to_training(reply: Reply, verdict: Verdict) -> None:
    handed_over = threading.Event()

    def answer(_: Seen) -> Reply:
        assert handed_over.wait(60)
        return reply

    with serving(answer) as server, sending(server) as sender:
        assert sender.report(an_epoch(0)) is Verdict.GO_ON
        handed_over.set()
        until(lambda: sender.verdict is verdict)
        assert sender.reason
        assert sender.report(an_epoch(1)) is verdict


def test_a_verdict_only_becomes_graver() -> None:
    verdicts = iter(["stop", "prune", "go_on"])
    with (
        serving(lambda _: (200, {"verdict": next(verdicts, "go_on"), "reason": ""})) as server,
        sending(server) as sender,
    ):
        for number in range(3):
            sender.report(an_epoch(number))
            assert sender.flush(60)
        assert sender.verdict is Verdict.STOP


def test_a_lost_lease_is_not_spoken_for_any_more() -> None:
    with serving(lambda _: (409, refusal("lost"))) as server, sending(server, heartbeat_s=0.1) as sender:
        sender.report(an_epoch(0))
        until(lambda: sender.verdict is Verdict.LOST)
        count = len(server.seen)
        assert sender.flush(0.1), "there is nothing to wait for"
        time.sleep(0.5)
        assert len(server.seen) == count


def test_a_lease_that_cannot_be_renewed_is_still_trained_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    away = threading.Event()

    def answer(seen: Seen) -> Reply:
        return (503, refusal("database_unavailable")) if away.is_set() else go_on(seen)

    with (
        caplog.at_level(logging.INFO, "whetstone.worker"),
        serving(answer) as server,
        sending(server, term_s=0.5, heartbeat_s=0.2) as sender,
    ):
        away.set()
        until(lambda: "could not be renewed" in caplog.text)
        assert sender.verdict is Verdict.GO_ON
        tries = len(server.seen)
        until(lambda: len(server.seen) > tries + 3)
        assert caplog.text.count("could not be renewed") == 1
        away.clear()
        until(lambda: "nothing was lost" in caplog.text)


def test_a_full_buffer_holds_training_back_instead_of_dropping() -> None:
    gate = threading.Event()

    def answer(seen: Seen) -> Reply:
        gate.wait(60)
        return go_on(seen)

    with serving(answer) as server, sending(server, capacity=5) as sender:
        done = threading.Event()

        def train() -> None:
            for number in range(20):
                sender.report(an_epoch(number))
            done.set()

        threading.Thread(target=train, daemon=True).start()
        assert not done.wait(0.5)
        gate.set()
        assert done.wait(60)
        assert sender.flush(60)
        assert epochs(server) == list(range(20))


def test_reports_the_server_cannot_take_do_not_hold_up_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    def answer(seen: Seen) -> Reply:
        bad = any(report["epoch"] == 0 for report in seen.body["reports"])
        return (422, refusal("invalid", "1 fault")) if bad else go_on(seen)

    with serving(answer) as server, sending(server) as sender:
        sender.report(an_epoch(0))
        assert sender.flush(60)
        sender.report(an_epoch(1))
        assert sender.flush(60)
        assert epochs(server) == [0, 1]
        assert sender.verdict is Verdict.GO_ON
    assert "refused 1 reports" in caplog.text


def test_a_new_checkpoint_is_made_known_without_waiting_for_an_epoch() -> None:
    with serving(go_on) as server, sending(server, heartbeat_s=60.0) as sender:
        sender.checkpoint(4)
        until(lambda: any(seen.body["checkpoint_epoch"] == 4 for seen in server.seen))
        time.sleep(0.3)
        assert len(server.seen) == 1, "once is enough"


def test_a_lease_that_came_late_is_confirmed_at_once() -> None:
    with serving(go_on) as server:
        with sending(server, heartbeat_s=60.0, term_s=120.0, confirm=True):
            until(lambda: len(server.seen) == 1)
        with sending(server, heartbeat_s=60.0, term_s=120.0):
            time.sleep(0.3)
        assert len(server.seen) == 1


def test_closing_ends_the_thread_even_while_the_server_is_away() -> None:
    server = Server(go_on)
    server.start()
    server.stop()
    with sending(server) as sender:
        sender.report(an_epoch(0))
        time.sleep(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < 20
