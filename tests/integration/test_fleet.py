"""Workers against a real PostgreSQL: one device, one worker; a drained worker finishes and gets no more."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from hpo.coordinator import Coordinator
from hpo.errors import Conflict, NotFound
from hpo.protocol import Verdict, WorkerHello
from tests.integration.leases_harness import (
    ALICE,
    MALLORY,
    ask,
    claim,
    coordinator,
    must_claim,
    report,
    study,
    tell,
    together,
)

TWO = ["GPU-aaaa", "GPU-bbbb"]


def hello(desk: Coordinator, worker: str, host: str = "h1", devices: list[str] | None = None) -> str | None:
    offered = TWO if devices is None else devices
    return desk.hello(WorkerHello(worker=worker, host=host, devices=offered, version="1"), ALICE).device


def silent(engine: sa.Engine, worker: str, seconds: float) -> None:
    """As if nothing had been heard of a worker for so many seconds more."""
    with engine.begin() as conn:
        statement = "UPDATE whetstone.workers SET last_seen = last_seen - make_interval(secs => :s) WHERE name = :name"
        conn.execute(sa.text(statement), {"s": seconds, "name": worker})


def test_two_workers_of_one_host_get_two_devices(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    assert hello(desk, "w1") == "GPU-aaaa"
    assert hello(desk, "w2") == "GPU-bbbb"
    assert hello(desk, "w3") is None
    assert hello(desk, "w2") == "GPU-bbbb", "who comes back keeps its device"


def test_containers_that_see_the_same_gpus_get_one_each(engine: sa.Engine) -> None:
    """Every replica of a compose service has a host name of its own, and all of them see all GPUs."""
    desk, other = coordinator(engine), coordinator(engine)
    calls = [
        lambda n=n, mine=(desk, other)[n % 2]: hello(mine, f"w{n}", host=f"container-{n}")  # type: ignore[misc]
        for n in range(4)
    ]
    given = together(*calls)
    assert sorted(str(device) for device in given) == [*TWO, "None", "None"]


def test_a_device_without_a_uuid_is_one_of_its_host(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    assert hello(desk, "w1", devices=["cuda:0"]) == "cuda:0"
    assert hello(desk, "w2", devices=["cuda:0"]) is None
    assert hello(desk, "w3", host="h2", devices=["cuda:0"]) == "cuda:0", "another host has devices of its own"


def test_workers_that_start_together_never_share_a_device(engine: sa.Engine) -> None:
    desk, other = coordinator(engine), coordinator(engine)
    devices = [f"GPU-{place}" for place in range(5)]
    calls = [
        lambda worker=f"w{n}", mine=(desk, other)[n % 2]: hello(mine, worker, devices=devices)  # type: ignore[misc]
        for n in range(8)
    ]
    given = together(*calls)
    assert sorted(device for device in given if device is not None) == devices  # type: ignore[type-var]


def test_a_silent_workers_device_is_free_after_two_terms(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=300.0)
    assert hello(desk, "w1", devices=["GPU-a"]) == "GPU-a"
    silent(engine, "w1", 310)
    assert hello(desk, "w2", devices=["GPU-a"]) is None, "one term is not enough"
    silent(engine, "w1", 310)
    assert hello(desk, "w2", devices=["GPU-a"]) == "GPU-a"
    assert {worker.worker: worker.state for worker in desk.list_workers()}["w1"] == "silent"


def test_a_worker_that_takes_its_leave_is_stopped_and_its_device_free_at_once(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    assert hello(desk, "w1", devices=["GPU-a"]) == "GPU-a"
    with pytest.raises(NotFound):
        desk.leave_worker("w1", MALLORY)
    assert hello(desk, "w2", devices=["GPU-a"]) is None, "another bearer cannot send it away"
    assert desk.leave_worker("w1", ALICE).state == "stopped"
    assert hello(desk, "w2", devices=["GPU-a"]) == "GPU-a"
    assert hello(desk, "w1", devices=["GPU-b"]) == "GPU-b"
    assert {worker.worker: worker.state for worker in desk.list_workers()}["w1"] == "idle", "it is back"
    desk.leave_worker("w1", ALICE)
    claim(desk, "w1")
    assert {worker.worker: worker.state for worker in desk.list_workers()}["w1"] == "idle"


def test_a_report_takes_back_the_leave_of_an_earlier_process_of_its_name(engine: sa.Engine) -> None:
    """A worker with a fixed name is restarted: the new one is at work when the old one's leave arrives."""
    desk = coordinator(engine)
    desk.create_study(study())
    hello(desk, "w1", devices=["GPU-a"])
    lease = must_claim(desk, "w1")
    desk.leave_worker("w1", ALICE)
    report(desk, lease)
    assert {worker.worker: worker.state for worker in desk.list_workers()}["w1"] == "busy"
    assert hello(desk, "w2", devices=["GPU-a"]) is None


def test_reports_keep_a_workers_device(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study())
    hello(desk, "w1", devices=["GPU-a"])
    lease = must_claim(desk, "w1")
    silent(engine, "w1", 100)
    report(desk, lease)
    assert hello(desk, "w2", devices=["GPU-a"]) is None


def test_workers_without_a_device_and_on_cpu_are_welcome(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    assert hello(desk, "w1", devices=[]) is None
    assert hello(desk, "w2", devices=["cpu"]) == "cpu"
    assert hello(desk, "w3", devices=["cpu"]) == "cpu"


def test_a_drained_worker_stays_so_through_an_outage_until_it_is_started_anew(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study())
    hello(desk, "w1", devices=["GPU-a"])
    desk.drain_worker("w1")
    desk.hello(WorkerHello(worker="w1", host="h1", devices=["GPU-a"], again=True), ALICE)
    assert claim(desk, "w1") is None, "the same process asked for its device again"
    hello(desk, "w1", devices=["GPU-a"])
    assert claim(desk, "w1") is not None


def test_a_drained_worker_finishes_its_trial_and_gets_no_other(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    hello(desk, "w1")
    lease = must_claim(desk, "w1")
    assert desk.drain_worker("w1").state == "draining"
    assert report(desk, lease, {0: 0.5}).verdict == Verdict.GO_ON
    assert tell(desk, lease).state == "complete"
    assert claim(desk, "w1") is None
    with pytest.raises(Conflict, match="drained"):
        ask(desk, made.study, "w1")
    assert claim(desk, "w2") is not None
    hello(desk, "w1")
    assert claim(desk, "w1") is not None, "a worker that introduces itself anew works again"
    with pytest.raises(NotFound):
        desk.drain_worker("nobody")


def test_the_fleet_shows_who_does_what(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    hello(desk, "busy")
    hello(desk, "idle")
    tell(desk, must_claim(desk, "busy"))
    tell(desk, must_claim(desk, "busy"), None, "failed")
    lease = must_claim(
        desk,
        "busy",
    )
    workers = {worker.worker: worker for worker in desk.list_workers()}
    assert (workers["busy"].state, workers["busy"].study, workers["busy"].trial) == ("busy", made.study, lease.trial)
    assert (workers["busy"].trials_done, workers["busy"].device, workers["busy"].host) == (2, "GPU-aaaa", "h1")
    assert (workers["idle"].state, workers["idle"].trial, workers["idle"].trials_done) == ("idle", None, 0)
    with engine.begin() as conn:
        conn.execute(sa.text("UPDATE whetstone.workers SET last_seen = last_seen - interval '25 hours'"))
    assert [worker.worker for worker in desk.list_workers()] == ["busy"], (
        "who is long gone and holds nothing is left out"
    )


def test_a_claim_makes_an_unknown_worker_known(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    assert claim(desk, "new", device="cpu\x00", memory_bytes=5, version="9") is None
    (worker,) = desk.list_workers()
    assert (worker.worker, worker.state, worker.memory_bytes, worker.version) == ("new", "idle", 5, "9")
