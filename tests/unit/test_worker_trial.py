"""One trial in a worker's hands: however it goes, the coordinator hears of it once and rightly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpo.protocol import EpochReport, Lease, Verdict
from hpo.rest import Client
from tests.unit.worker_server import Drop, Reply, Seen, Server, a_lease, refusal, serving, until
from workers.artifacts import Artifacts, Place
from workers.siamese import Ended, MachineUnfit
from workers.stop import Stop
from workers.trial import ANSWER_S, FLUSH_S, STEP_S, Conductor, Leave
from workers.unsent import Unsent

Work = Callable[[Lease, Place, Callable[[EpochReport], Verdict], Callable[[], bool]], Ended]
TOLD = {"study": 1, "trial": 3, "state": "complete", "value": 0.5}


class Workload:
    """A workload whose training is a function of the test's."""

    def __init__(self, train: Work) -> None:
        self.train = train


def coordinator(seen: Seen) -> Reply:
    return (200, {"verdict": "go_on", "reason": ""}) if seen.what == "report" else (200, TOLD)


@contextmanager
def conductor(server: Server, root: Path, train: Work, stop: Stop | None = None) -> Iterator[Conductor]:
    made = Conductor(
        lambda: Client(server.url, "t"),
        stop or Stop(),
        Workload(train),
        Artifacts(root / "kept", root),
        Unsent(root),
        threads=None,
    )
    yield made
    made._trainer.shutdown(wait=False, cancel_futures=True)


def an_epoch(number: int) -> EpochReport:
    return EpochReport(epoch=number, value=0.1, metrics={})


def until_interrupted(interrupt: Callable[[], bool], timeout_s: float = 20.0) -> Ended:
    until(interrupt, timeout_s)
    return Ended("stopped")


def told(server: Server) -> list[dict[str, object]]:
    return [seen.body for seen in server.seen if seen.what in ("tell", "release")]


def test_every_report_is_there_before_the_outcome(tmp_path: Path) -> None:
    def train(lease: Lease, place: Place, report: Callable[[EpochReport], Verdict], interrupt: object) -> Ended:
        for number in range(50):
            report(an_epoch(number))
        place.saved("last", 50)
        return Ended("complete", 0.5, 12)

    with serving(coordinator) as server, conductor(server, tmp_path, train) as conduct:
        assert conduct.conduct(a_lease()) is None
    kinds = [seen.what for seen in server.seen]
    assert kinds[-1] == "tell"
    assert kinds.count("tell") == 1
    assert [r["epoch"] for seen in server.what("report") for r in seen.body["reports"]] == list(range(50))
    assert told(server) == [
        {"token": 70, "outcome": "complete", "value": 0.5, "reason": "", "traceback": "", "checkpoint_epoch": 50}
    ]


@pytest.mark.parametrize(
    ("ended", "body"),
    [
        (Ended("infeasible", 0.05, reason="diverged"), {"outcome": "infeasible", "value": 0.05, "reason": "diverged"}),
        (Ended("pruned", 0.3, 2), {"outcome": "pruned", "value": 0.3}),
        (
            Ended("failed", reason="KeyError: 'x'", traceback="Traceback ..."),
            {"outcome": "failed", "traceback": "Traceback ..."},
        ),
        (Ended("stopped"), {"reason": "shutdown"}),
    ],
)
def test_each_ending_is_told_by_its_own_name(tmp_path: Path, ended: Ended, body: dict[str, object]) -> None:
    with serving(coordinator) as server, conductor(server, tmp_path, lambda *_: ended) as conduct:
        assert conduct.conduct(a_lease()) is None
    (said,) = told(server)
    assert body.items() <= said.items()


def test_an_exception_is_told_with_its_traceback_and_the_next_trial_runs(tmp_path: Path) -> None:
    first = [True]

    def train(*_: object) -> Ended:
        if first.pop() if first else False:
            raise KeyError("no such thing\x00\ud800")
        return Ended("complete", 0.5)

    with serving(coordinator) as server, conductor(server, tmp_path, train) as conduct:
        assert conduct.conduct(a_lease()) is None
        assert conduct.conduct(a_lease(trial=4)) is None
    failed, complete = told(server)
    assert failed["outcome"] == "failed"
    assert "KeyError" in str(failed["reason"])
    assert "in train" in str(failed["traceback"])
    assert "\x00" not in str(failed)
    assert "\ud800" not in str(failed)
    assert complete["outcome"] == "complete"


def test_a_very_long_traceback_keeps_its_end(tmp_path: Path) -> None:
    ended = Ended("failed", reason="r" * 30_000, traceback="x" * 200_000 + "ValueError: the end")
    with serving(coordinator) as server, conductor(server, tmp_path, lambda *_: ended) as conduct:
        conduct.conduct(a_lease())
    (said,) = told(server)
    assert len(str(said["traceback"])) == 100_000
    assert str(said["traceback"]).endswith("ValueError: the end")
    assert len(str(said["reason"])) == 20_000


def test_an_outcome_is_told_until_it_is_answered_and_always_the_same(tmp_path: Path) -> None:
    tries = [0]

    def answer(seen: Seen) -> Reply:
        if seen.what == "tell":
            tries[0] += 1
            if tries[0] == 1:
                raise Drop
            if tries[0] < 4:
                return 503, refusal("database_unavailable")
        return coordinator(seen)

    with serving(answer) as server, conductor(server, tmp_path, lambda *_: Ended("complete", 0.5)) as conduct:
        conduct.conduct(a_lease())
    bodies = told(server)
    assert len(bodies) == 4
    assert all(body == bodies[0] for body in bodies)


def test_a_tell_that_comes_too_late_is_dropped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(seen: Seen) -> Reply:
        return (409, refusal("lost", "the lease expired")) if seen.what == "tell" else coordinator(seen)

    with serving(answer) as server, conductor(server, tmp_path, lambda *_: Ended("complete", 0.5)) as conduct:
        assert conduct.conduct(a_lease()) is None
    assert len(told(server)) == 1
    assert "changed nothing: the lease expired" in caplog.text


def test_an_outcome_the_coordinator_refuses_is_told_as_a_failure(tmp_path: Path) -> None:
    def answer(seen: Seen) -> Reply:
        refused = seen.what == "tell" and seen.body["outcome"] == "complete"
        return (422, refusal("invalid", "the tell has 1 fault")) if refused else coordinator(seen)

    with serving(answer) as server, conductor(server, tmp_path, lambda *_: Ended("complete", 0.5)) as conduct:
        conduct.conduct(a_lease())
    assert [body["outcome"] for body in told(server)] == ["complete", "failed"]
    assert "the tell has 1 fault" in str(told(server)[1]["reason"])


@pytest.mark.parametrize(
    ("verdict", "said"),
    [("prune", {"outcome": "pruned", "reason": "why"}), ("stop", {"reason": "stopped"}), ("lost", None)],
)
def test_what_the_coordinator_decides_ends_the_training_rightly(
    tmp_path: Path, verdict: str, said: dict[str, object] | None
) -> None:
    def answer(seen: Seen) -> Reply:
        return (200, {"verdict": verdict, "reason": "why"}) if seen.what == "report" else coordinator(seen)

    def train(
        lease: Lease, place: Place, report: Callable[[EpochReport], Verdict], interrupt: Callable[[], bool]
    ) -> Ended:
        report(an_epoch(0))
        return until_interrupted(interrupt)

    with serving(answer) as server, conductor(server, tmp_path, train) as conduct:
        assert conduct.conduct(a_lease()) is None
    if said is None:
        assert told(server) == []
    else:
        (body,) = told(server)
        assert said.items() <= body.items()


def test_asked_to_stop_it_checkpoints_reports_and_hands_the_trial_back(tmp_path: Path) -> None:
    stop = Stop()

    def train(
        lease: Lease, place: Place, report: Callable[[EpochReport], Verdict], interrupt: Callable[[], bool]
    ) -> Ended:
        report(an_epoch(0))
        threading.Timer(0.2, stop.request).start()
        ended = until_interrupted(interrupt)
        report(an_epoch(1))
        place.saved("last", 2)
        return ended

    with serving(coordinator) as server, conductor(server, tmp_path, train, stop) as conduct:
        assert conduct.conduct(a_lease()) is None
    assert [r["epoch"] for seen in server.what("report") for r in seen.body["reports"]] == [0, 1]
    assert told(server) == [{"token": 70, "reason": "shutdown", "checkpoint_epoch": 2}]


@pytest.mark.parametrize("ended", [None, Ended("complete", 0.5)])
def test_asked_to_stop_while_no_server_answers_it_ends_in_time_and_leaves_word(
    tmp_path: Path, ended: Ended | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ended is not None:  # once in full is enough
        monkeypatch.setattr("workers.trial.FLUSH_S", 0.6)
        monkeypatch.setattr("workers.trial.ANSWER_S", 0.8)
    stop = Stop()
    server = Server(coordinator)
    server.start()
    server.stop()

    def train(
        lease: Lease, place: Place, report: Callable[[EpochReport], Verdict], interrupt: Callable[[], bool]
    ) -> Ended:
        report(an_epoch(0))
        stop.request()
        return ended or until_interrupted(interrupt)

    with conductor(server, tmp_path, train, stop) as conduct:
        began = time.monotonic()
        assert conduct.conduct(a_lease()) is None
        assert time.monotonic() - began < 30
        assert STEP_S < FLUSH_S < ANSWER_S < 10
    server.start()
    with Client(f"http://localhost:{server.url.rsplit(':')[-1]}", "t") as elsewhere:
        Unsent(tmp_path).deliver(elsewhere)
    assert told(server) == [], "what is meant for one server is told to no other"
    for answer in ((503, refusal("away")), (200, TOLD)):
        server.answer = lambda _, answer=answer: answer
        with Client(server.url, "t") as client:
            Unsent(tmp_path).deliver(client)
            Unsent(tmp_path).deliver(client)
    server.stop()
    assert told(server) == [told(server)[0]] * 3, "the next worker says it, until it is answered"
    assert server.seen[0].what == ("release" if ended is None else "tell")
    assert not list((tmp_path / "unsent").iterdir())


def test_a_release_that_came_too_late_is_forgotten(tmp_path: Path) -> None:
    unsent = Unsent(tmp_path)
    with (
        serving(lambda _: (409, refusal("lost", "it expired"))) as server,
        Client(server.url, "t") as client,
    ):
        assert unsent.keep(client.url, "/api/v1/leases/7/release", {"token": 70, "reason": "shutdown"})
        (note,) = (tmp_path / "unsent").iterdir()
        assert note.stat().st_mode & 0o777 == 0o600
        (tmp_path / "unsent/other.json").write_text("[")
        unsent.deliver(client)
        unsent.deliver(client)
        assert len(server.seen) == 1
    (tmp_path / "file").touch()
    assert not Unsent(tmp_path / "file").keep("http://h", "/p", {}), "a home that cannot be written is no catastrophe"
    Unsent(tmp_path / "file").deliver(client)


def test_asked_to_stop_with_a_stuck_step_it_leaves_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.trial.STEP_S", 0.5)
    stop, gate = Stop(), threading.Event()

    def train(lease: Lease, place: Place, *_: object) -> Ended:
        place.saved("last", 6)
        stop.request()
        gate.wait(30)
        return Ended("stopped")

    with serving(coordinator) as server, conductor(server, tmp_path, train, stop) as conduct:
        leave = conduct.conduct(a_lease())
        gate.set()
    assert leave == Leave(0, "stopped", stuck=True)
    assert told(server) == [{"token": 70, "reason": "shutdown", "checkpoint_epoch": 6}]


def test_asked_twice_it_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.trial.STEP_S", 100.0)
    stop, gate = Stop(), threading.Event()

    def train(*_: object) -> Ended:
        stop.request()
        stop.request()
        gate.wait(120)
        return Ended("stopped")

    with serving(coordinator) as server, conductor(server, tmp_path, train, stop) as conduct:
        began = time.monotonic()
        leave = conduct.conduct(a_lease())
        assert time.monotonic() - began < 60
        gate.set()
    assert leave is not None
    assert (leave.code, leave.stuck) == (143, True)
    assert [body["reason"] for body in told(server)] == ["shutdown"]


def test_a_trial_that_makes_no_step_is_released_as_stalled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, now = threading.Event(), [100.0]
    monkeypatch.setattr("workers.trial.time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))

    def train(lease: Lease, place: Place, report: object, interrupt: Callable[[], bool]) -> Ended:
        for _ in range(5):  # as long as it steps, it may take its time
            now[0] += 50.0
            time.sleep(0.2)  # somebody looks at it twice a step
            interrupt()
        now[0] += 70.0
        where_it_hangs(gate)
        return Ended("complete", 0.5)

    def where_it_hangs(gate: threading.Event) -> None:
        gate.wait(60)

    with serving(coordinator) as server, conductor(server, tmp_path, train) as conduct:
        leave = conduct.conduct(a_lease(stall_s=60.0, heartbeat_s=0.1))
        gate.set()
    assert leave is not None
    assert (leave.code, leave.stuck) == (4, True)
    assert [body["reason"] for body in told(server)] == ["stalled"]
    assert "where_it_hangs" in caplog.text, "the log says where it was"


def test_a_machine_that_cannot_train_hands_the_trial_back_and_leaves(tmp_path: Path) -> None:
    def train(*_: object) -> Ended:
        raise MachineUnfit("no data here: run `whetstone data fetch`")

    with serving(coordinator) as server, conductor(server, tmp_path, train) as conduct:
        leave = conduct.conduct(a_lease())
    assert leave == Leave(1, "no data here: run `whetstone data fetch`")
    assert [body["reason"] for body in told(server)] == ["shutdown"]


def test_a_gpu_that_gives_up_is_no_fault_of_the_trials_and_ends_the_process(tmp_path: Path) -> None:
    ended = Ended("failed", reason="AcceleratorError: CUDA error", traceback="...", poisoned=True)
    with serving(coordinator) as server, conductor(server, tmp_path, lambda *_: ended) as conduct:
        leave = conduct.conduct(a_lease())
    assert leave is not None
    assert leave.code == 3
    assert [body.get("reason") for body in told(server)] == ["broken"]


def test_a_folder_outside_the_root_is_never_written(tmp_path: Path) -> None:
    with serving(coordinator) as server, conductor(server, tmp_path, lambda *_: Ended("complete", 1.0)) as conduct:
        leave = conduct.conduct(a_lease(artifacts="../../escape"))
    assert leave is not None
    assert leave.code == 1
    assert [body["reason"] for body in told(server)] == ["shutdown"]
    assert not list(tmp_path.parent.glob("**/escape"))


def test_the_lease_is_renewed_during_a_long_step(tmp_path: Path) -> None:
    def train(*_: object) -> Ended:
        until(lambda: len(server.what("report")) >= 3)
        return Ended("complete", 0.5)

    began = time.monotonic()
    with serving(coordinator) as server, conductor(server, tmp_path, train) as conduct:
        conduct.conduct(a_lease(heartbeat_s=0.2))
    assert [body["outcome"] for body in told(server)] == ["complete"], "it was renewed three times while it trained"
    assert len(server.what("report")) <= (time.monotonic() - began) / 0.2


def test_the_secret_token_never_stands_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(seen: Seen) -> Reply:
        return (401, refusal("unauthenticated", "unknown token")) if seen.what == "tell" else coordinator(seen)

    with (
        caplog.at_level(logging.DEBUG),
        serving(answer) as server,
        conductor(server, tmp_path, lambda *_: Ended("complete", 0.5)) as conduct,
    ):
        conduct._connect = lambda: Client(server.url, "wst_verysecret")
        conduct._client = conduct._connect()
        conduct.conduct(a_lease())
    assert "wst_verysecret" not in caplog.text


def test_the_best_epochs_answers_travel_with_the_outcome(tmp_path: Path) -> None:
    for ended in (
        Ended("complete", 0.5, 3, tasks=10, answers=b"\xd0\xc0"),
        Ended("pruned", 0.5, tasks=10, answers=b"\xd0\xc0"),
    ):
        with serving(coordinator) as server, conductor(server, tmp_path, lambda *_, e=ended: e) as conduct:
            assert conduct.conduct(a_lease()) is None
        (said,) = told(server)
        assert said["answers"] == {"tasks": 10, "right": "0MA="}


def test_an_outcome_is_told_without_answers_that_no_server_would_take(tmp_path: Path) -> None:
    damaged = [(9, b"\xff"), (0, b""), (4, b"\xff"), (2_000_000, bytes(250_000))]
    for tasks, answers in damaged:
        ended = Ended("complete", 0.5, tasks=tasks, answers=answers)
        with serving(coordinator) as server, conductor(server, tmp_path, lambda *_, e=ended: e) as conduct:
            assert conduct.conduct(a_lease()) is None
        (said,) = told(server)
        assert (said["outcome"], said["value"], "answers" in said) == ("complete", 0.5, False)


def test_a_server_that_refuses_answers_still_hears_the_outcome(tmp_path: Path) -> None:
    def of_an_older_release(seen: Seen) -> Reply:
        return (422, refusal("invalid")) if seen.what == "tell" and "answers" in seen.body else coordinator(seen)

    ended = Ended("complete", 0.5, tasks=4, answers=b"\xe0")
    with serving(of_an_older_release) as server, conductor(server, tmp_path, lambda *_: ended) as conduct:
        assert conduct.conduct(a_lease()) is None
    first, second = told(server)
    assert "answers" in first
    assert (second["outcome"], second["value"], "answers" in second) == ("complete", 0.5, False)


def test_a_tell_with_very_many_answers_is_kept_whole_for_the_next_worker(tmp_path: Path) -> None:
    body = {"token": 70, "outcome": "complete", "value": 0.5, "answers": {"tasks": 10**6, "right": "/" * 166_668}}
    with serving(coordinator) as server, Client(server.url, "t") as client:
        assert Unsent(tmp_path).keep(client.url, "/api/v1/leases/7/tell", body)
        Unsent(tmp_path).deliver(client)
        assert told(server) == [body]
