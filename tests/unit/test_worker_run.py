"""The worker process between its trials, against a server that misbehaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpo.protocol import MAX_WAIT_S
from tests.unit.worker_server import Drop, Reply, Seen, Server, a_lease, refusal, serving, until
from workers.device import DeviceUnusable, candidates, cpu, cuda_devices, probe
from workers.run import default_name
from workers.stop import Stop, Stopped

START = "from cli.main import main; main()"
PATIENT = f"import workers.run; workers.run.GIVE_BACK_S = 60.0; {START}"


@contextmanager
def worker(
    server: Server, home: Path, *arguments: str, url: str | None = None, start: str = START
) -> Iterator[subprocess.Popen[str]]:
    """A real `whetstone worker` of this server; gone when the block is left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WHETSTONE_")}
    process = subprocess.Popen(
        [sys.executable, "-c", start, "worker", "--device", "cpu", "--threads", "1", *arguments],
        env=kept | {"WHETSTONE_HOME": str(home), "WHETSTONE_URL": url or server.url, "WHETSTONE_TOKEN": "wst_secret_1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def place(seen: Seen) -> Reply:
    return 200, {"worker": seen.body["worker"], "device": "cpu"}


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    out, err = process.communicate(timeout=within_s)
    assert out == ""
    assert "wst_secret_1" not in err
    return process.returncode, err


@pytest.mark.parametrize(("status", "word"), [(401, "WHETSTONE_TOKEN"), (403, "--role worker")])
def test_a_token_that_is_not_welcome_is_one_line_and_exit_1(tmp_path: Path, status: int, word: str) -> None:
    with serving(lambda _: (status, refusal("no"))) as server, worker(server, tmp_path) as process:
        code, err = ended(process, 60)
    assert code == 1
    assert word in err
    assert len(err.strip().splitlines()) == 1
    assert len(server.seen) == 1, "it does not knock again"


def test_asked_to_stop_while_it_waits_for_a_trial_it_ends_at_once(tmp_path: Path) -> None:
    def answer(seen: Seen) -> Reply:
        if seen.what == "workers":
            return place(seen)
        time.sleep(120)
        return 204, None

    with serving(answer) as server, worker(server, tmp_path) as process:
        until(lambda: bool(server.what("claims")))
        process.send_signal(signal.SIGTERM)
        code, _ = ended(process, MAX_WAIT_S)  # what the claim waits for at the least
    assert code == 0


def test_a_lease_that_arrives_as_it_is_asked_to_stop_is_handed_back(tmp_path: Path) -> None:
    """The first answer is cut off; asked again under the same key, the server shows the lease it had made."""

    def answer(seen: Seen) -> Reply:
        if seen.what == "workers":
            return place(seen)
        if seen.what == "claims":
            if len(server.what("claims")) == 1:
                process.send_signal(signal.SIGTERM)
                time.sleep(1)
                raise Drop
            return 200, a_lease().model_dump(mode="json")
        return 200, {"study": 1, "trial": 3, "state": "queued", "value": None}

    with serving(answer) as server, worker(server, tmp_path, start=PATIENT) as process:
        code, _ = ended(process, 60)
    assert code == 0
    first, again = server.what("claims")
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"]
    assert first.body == again.body
    (release,) = server.what("release")
    assert release.body == {"token": 70, "reason": "shutdown", "checkpoint_epoch": None}


def test_a_claim_whose_answer_was_lost_is_asked_again_under_its_key(tmp_path: Path) -> None:
    settings = {"net": {"input": 28, "conv": [{"filters": 2, "kernel": 9, "pool": True}], "fc": 2}, "data": "strokes"}
    small = {"batch_pairs": 4, "pairs_per_epoch": 4, "epochs": 1, "validation_tasks": 2, "way": 2, "lambda": 0, "mu": 0}

    def answer(seen: Seen) -> Reply:
        if seen.what == "workers":
            return place(seen)
        if seen.what == "claims":
            if len(server.what("claims")) < 3:
                raise Drop
            seldom = a_lease(settings=settings | small, term_s=200.0, heartbeat_s=60.0)
            return 200, seldom.model_dump(mode="json")
        if seen.what == "report":
            return 200, {"verdict": "go_on", "reason": ""}
        return 200, {"study": 1, "trial": 3, "state": "complete", "value": 0.5}

    with serving(answer) as server, worker(server, tmp_path, "--once") as process:
        code, err = ended(process, 60)
    assert code == 0, err
    assert len({seen.headers["Idempotency-Key"] for seen in server.what("claims")}) == 1
    first = server.what("report")[0].body
    assert (first["reports"], first["checkpoint_epoch"]) == ([], None), "a lease that came late is confirmed first"
    assert server.what("tell")[0].body["outcome"] == "complete", err


def test_a_worker_that_stops_after_a_trial_claims_no_other(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"net": "mini", "data": "strokes", "lambda": 0, "mu": 0, "epochs": 1000}

    def answer(seen: Seen) -> Reply:
        if seen.what == "workers":
            return place(seen)
        if seen.what == "claims":
            return 200, a_lease(settings=settings, heartbeat_s=0.1).model_dump(mode="json")
        if seen.what == "report":
            if len(server.what("report")) == 1:
                process.send_signal(signal.SIGTERM)
            return 200, {"verdict": "go_on", "reason": ""}
        return 200, {"study": 1, "trial": 3, "state": "queued", "value": None}

    with serving(answer) as server, worker(server, tmp_path) as process:
        code, err = ended(process, 60)
        until(
            lambda: server.seen[-1].path.endswith("/leave")
        )  # last it says that its device is free, and waits for none
    assert code == 0, err
    assert len(server.what("claims")) == 1
    assert len(server.what("release")) == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host"])
def test_an_address_that_is_none_is_one_line_and_exit_1(tmp_path: Path, url: str) -> None:
    with serving(lambda _: (200, {})) as server, worker(server, tmp_path, url=url) as process:
        code, err = ended(process, 60)
    assert code == 1
    assert "http://host:8000" in err
    assert "Traceback" not in err


def test_cuda_where_there_is_none_is_one_line() -> None:
    if cuda_devices():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceUnusable, match="--device cpu") as caught:
        candidates("cuda:0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wanted", ["", "gpu", "cuda:x", "cuda:-1", "cpu:0"])
def test_a_device_nobody_knows_is_refused(wanted: str) -> None:
    with pytest.raises(DeviceUnusable, match="auto, cpu"):
        candidates(wanted)


def test_without_cuda_auto_is_the_cpu_and_it_works() -> None:
    if cuda_devices():
        pytest.skip("this machine has CUDA")
    assert candidates("auto") == [cpu()]
    assert (cpu().memory_bytes or 0) > 10**8
    probe(cpu())


def test_names_differ_and_are_what_the_coordinator_takes() -> None:
    from pydantic import TypeAdapter

    from hpo.protocol import WorkerName

    names = {default_name() for _ in range(20)}
    assert len(names) > 15
    for name in names:
        TypeAdapter(WorkerName).validate_python(name)


def test_a_request_to_stop_frees_whoever_waits_and_is_remembered() -> None:
    stop = Stop()
    assert stop.left(9.0) is None
    with stop.handling_signals(), pytest.raises(Stopped):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.requested)
        stop.sleep(30)
    assert not stop.insisted
    with pytest.raises(Stopped), stop.breakable():
        raise AssertionError("entered, though a stop was asked for")
    stop.request()
    assert stop.insisted
    assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
