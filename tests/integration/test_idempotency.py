"""Idempotency keys against a real PostgreSQL: the same request twice is done once and answered twice."""

from __future__ import annotations

import hashlib
import json
import time
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from hpo import idempotency
from hpo.coordinator import Coordinator
from hpo.errors import Conflict, KeyReused
from hpo.idempotency import Once
from hpo.protocol import AskRequest, ClaimRequest, Lease
from tests.integration.leases_harness import ALICE, claim, coordinator, must_claim, point, study, tell, together


def once(body: object, key: str = "k1", owner: str = "token:1", route: str = "POST /studies") -> Once:
    return Once(owner, route, key, hashlib.sha256(json.dumps(body).encode()).digest())


def kept(engine: sa.Engine) -> int:
    with engine.connect() as conn:
        return conn.execute(sa.text("SELECT count(*) FROM whetstone.idempotency")).scalar_one()


def test_a_study_launched_twice_is_one_study(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first = desk.create_study(study(), once(study()))
    tell(desk, must_claim(desk))
    assert desk.create_study(study(), once(study())) == first, "the answer is the one that was given then"
    assert len(desk.list_studies().items) == 1
    with pytest.raises(Conflict, match="named 's'"):
        desk.create_study(study(), once(study(), key="k2"))


def test_a_key_with_another_body_is_refused(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study(), once(study()))
    with pytest.raises(KeyReused):
        desk.create_study(study("t"), once(study("t")))
    assert [item.name for item in desk.list_studies().items] == ["s"]


def test_keys_belong_to_their_owner_and_route(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study("a"), once(1))
    desk.create_study(study("b"), once(2, owner="token:2"))
    desk.create_study(study("c"), once(3, route="POST /elsewhere"))
    assert len(desk.list_studies().items) == 3


def test_a_request_that_failed_leaves_no_key_behind(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study("a"))
    with pytest.raises(Conflict):
        desk.create_study(study("a"), once(study("a")))
    assert kept(engine) == 0
    assert desk.claim(ClaimRequest(worker="w", wait_s=0), ALICE, once(1)) is not None
    desk.patch_study(1, {"state": "paused"})
    assert desk.claim(ClaimRequest(worker="w", wait_s=0), ALICE, once(2, key="k2")) is None
    assert kept(engine) == 1


@pytest.mark.parametrize("copies", [2, 6])
def test_copies_that_arrive_at_once_are_done_once(engine: sa.Engine, copies: int) -> None:
    desk, other = coordinator(engine), coordinator(engine)

    def launch(mine: Coordinator) -> int:
        return mine.create_study(study(), once(study())).study

    numbers = together(*[lambda mine=(desk, other)[n % 2]: launch(mine) for n in range(copies)])  # type: ignore[misc]
    assert len(set(numbers)) == 1, numbers
    made = int(str(numbers[0]))

    def take(mine: Coordinator) -> Lease | None:
        return mine.claim(ClaimRequest(worker="w1"), ALICE, once("claim", route="POST /claims"))

    leases = together(*[lambda mine=(desk, other)[n % 2]: take(mine) for n in range(copies)])  # type: ignore[misc]
    assert all(lease == leases[0] for lease in leases), leases
    assert desk.get_study(made).counts["leased"] == 1

    def add(mine: Coordinator) -> int:
        return mine.add_trial(made, {"params": point(0.5)}, once("add", route="POST /trials")).trial

    assert set(together(*[lambda mine=(desk, other)[n % 2]: add(mine) for n in range(copies)])) == {1}  # type: ignore[misc]


def test_an_ask_twice_is_one_lease(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    first = desk.ask(made.study, AskRequest(worker="w"), ALICE, once("ask"))
    assert desk.ask(made.study, AskRequest(worker="w"), ALICE, once("ask")) == first
    assert desk.ask(made.study, AskRequest(worker="w"), ALICE, once("ask", key="k2")).trial == 1


def test_keys_are_forgotten_after_a_day(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    booted = SimpleNamespace(monotonic=lambda: 7.0, perf_counter=time.perf_counter)  # the machine, just now
    monkeypatch.setattr("hpo.coordinator.time", booted)
    desk = coordinator(engine)
    made = desk.create_study(study())
    desk.add_trial(made.study, {"params": point(0.5)}, once("add"))
    with engine.begin() as conn:
        conn.execute(sa.text("UPDATE whetstone.idempotency SET created_at = created_at - interval '25 hours'"))
    assert desk.add_trial(made.study, {"params": point(0.6)}, once("another")).trial == 1, "an old key is a new one"
    assert kept(engine) == 1
    with engine.begin() as conn:
        assert idempotency.clean(conn) == 0
        conn.execute(sa.text("UPDATE whetstone.idempotency SET created_at = created_at - interval '25 hours'"))
    desk.expire()  # the reaper cleans
    assert kept(engine) == 0
    assert claim(desk) is not None
