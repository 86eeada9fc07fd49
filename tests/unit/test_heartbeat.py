"""The heartbeat of suggestions in hand: not more often than is needed, and no alarm about what was told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import cast

import pytest

from hpo.heartbeat import Heart, Held
from hpo.rest import Client

LOST = {"verdict": "lost", "reason": "the lease is over"}


class Server:
    """Answers renewals as a function says, and counts them."""

    def __init__(self, answer: Callable[[], dict[str, str]]) -> None:
        self.answer = answer
        self.asked = threading.Semaphore(0)
        self.calls = 0

    def once(self, *_: object, **__: object) -> dict[str, str]:
        self.calls += 1
        self.asked.release()
        return self.answer()

    def close(self) -> None:
        pass


def heart_of(server: Server) -> Heart:
    return Heart(cast(Client, server))


def test_a_suggestion_is_renewed_when_a_heartbeat_has_passed_and_not_when_another_comes() -> None:
    server = Server(lambda: {"verdict": "go_on", "reason": ""})
    heart = heart_of(server)
    for number in range(20):
        heart.hold(number, Held(lease=number, token=1, heartbeat_s=30.0))
        time.sleep(0.01)
    assert server.calls == 0
    heart.hold(20, Held(lease=20, token=1, heartbeat_s=0.02))
    assert all(server.asked.acquire(timeout=60.0) for _ in range(3))
    heart.stop()


@pytest.mark.parametrize("how", ["told", "telling"])
def test_a_lease_that_ends_because_its_outcome_is_told_is_no_alarm(how: str, caplog: pytest.LogCaptureFixture) -> None:
    may_answer = threading.Event()
    answered = threading.Event()

    def answer() -> dict[str, str]:
        may_answer.wait(60.0)
        answered.set()
        return LOST

    server = Server(answer)
    heart = heart_of(server)
    held = Held(lease=1, token=1, heartbeat_s=0.02)
    with caplog.at_level(logging.WARNING, "whetstone.client"):
        heart.hold(1, held)
        assert server.asked.acquire(timeout=60.0), "a renewal is under way"
        if how == "told":
            heart.let_go(1)
        else:
            held.telling = True
        may_answer.set()
        assert answered.wait(60.0)
        heart.stop()
    assert (caplog.records, held.lost) == ([], "")


def test_a_lease_that_was_taken_back_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(lambda: LOST)
    heart = heart_of(server)
    with caplog.at_level(logging.WARNING, "whetstone.client"):
        heart.hold(1, Held(lease=1, token=1, heartbeat_s=0.02))
        assert server.asked.acquire(timeout=60.0)
        time.sleep(0.2)
        heart.stop()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert server.calls == 1
