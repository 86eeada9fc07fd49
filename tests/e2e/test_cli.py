"""The command line as a person or a script uses it: real processes, a real server, exit codes, what it prints."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hpo.rest import ApiError, Client
from tests.faults.service import SPACE, TINY_SETTINGS


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WHETSTONE_", "DATABASE_URL"))}
    return kept | {"WHETSTONE_HOME": str(home), "COLUMNS": "120", "OMP_NUM_THREADS": "1"} | more


def run(home: Path, *arguments: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """One `whetstone` command, with what it printed and its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(home, **more),
        cwd=home,
    )


class Server:
    """`whetstone serve --json`, with the home that commands find it by."""

    def __init__(self, home: Path, database_url: str) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(home, DATABASE_URL=database_url),
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line, self.process.stderr and self.process.stderr.read()
        said = json.loads(self.line)
        self.url, self.token = said["url"], said["token"]

    def __call__(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return run(self.home, *arguments, text=text)

    def stop(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out, err


@pytest.fixture
def server(tmp_path: Path, postgres_url: str) -> Iterator[Server]:
    made = Server(tmp_path, postgres_url)
    yield made
    made.process.kill()
    made.process.wait()


def study(name: str = "tiny", trials: int = 2) -> str:
    document = {
        "name": name,
        "workload": "siamese",
        "space": SPACE,
        "settings": TINY_SETTINGS,
        "budget": {"trials": trials},
        "sampler": "random",
    }
    return yaml.safe_dump(document)


def test_a_study_goes_from_launch_to_a_network_on_disk(server: Server) -> None:
    launched = server("study", "launch", "-", "--json", text=study())
    assert launched.returncode == 0, launched.stderr
    number = str(json.loads(launched.stdout)["study"])

    for _ in range(2):
        worked = server("worker", "--once", "--device", "cpu", "--threads", "1")
        assert worked.returncode == 0, worked.stderr

    shown = server("study", "show", "tiny")
    assert "finished" in shown.stdout
    assert "2 complete" in shown.stdout
    trials = json.loads(server("trial", "list", number, "--json").stdout)
    assert [t["trial"] for t in trials] == [0, 1]
    compared = json.loads(server("trial", "compare", "tiny", "0", "1", "--json").stdout)
    assert [compared[side]["score"]["accuracy"] for side in "ab"] == [t["value"] for t in trials]
    best = server("study", "best", number, "--json", "--download", "best", "--recipe", "recipe.yaml")
    assert best.returncode == 0, best.stderr
    values = [t["value"] for t in json.loads(best.stdout)]
    assert values == sorted(values, reverse=True)

    scored = server("evaluate", "best", "--tasks", "100", "--way", "5", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["while_training"] == values[0]
    assert json.loads(scored.stdout)["tasks_from"].startswith("strokes"), "tasks are from what it was trained on"
    trained = server("train", "recipe.yaml", "-o", "again", "--device", "cpu", "--threads", "1", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["value"] == values[0], "the same recipe gives the same network"

    exported = server("study", "export", "tiny", "-f", "csv")
    assert len(exported.stdout.splitlines()) == 3
    assert server("study", "delete", "tiny", "--yes").returncode == 0
    assert "No studies yet" in server("study", "list").stdout


def test_two_trials_are_compared_task_by_task(server: Server) -> None:
    space = [{"name": "x", "type": "float", "low": 0, "high": 1}]
    document = {"name": "mine", "workload": "external", "space": space, "sampler": "random", "budget": {"trials": 3}}
    server("study", "launch", "-", text=yaml.safe_dump(document))
    with Client(server.url, server.token) as client:
        for right in ("8A==", "gA==", None):
            lease = client.post("/api/v1/studies/1/ask", json={"worker": "me"})
            told = {"token": lease["token"], "outcome": "complete", "value": 0.5}
            answers = {} if right is None else {"answers": {"tasks": 4, "right": right}}
            client.post(f"/api/v1/leases/{lease['lease']}/tell", json=told | answers)
    found = json.loads(server("trial", "compare", "mine", "0", "1", "--json").stdout)
    assert [found[key] for key in ("both", "only_a", "only_b", "neither")] == [1, 3, 0, 0]
    shown = server("trial", "compare", "mine", "0", "1")
    assert "trial 0 of mine: 100.0% of 4 tasks (95% interval 51.0% to 100.0%)" in shown.stdout
    assert "p = 0.25): no more than noise would give." in shown.stdout
    refused = server("trial", "compare", "mine", "0", "2")
    assert refused.returncode == 1
    assert "trial 2 of study 1 has no answers to single tasks" in refused.stderr


def test_a_study_is_steered_by_name(server: Server) -> None:
    server("study", "launch", "-", text=study("steered", trials=5))
    for command, state in (("pause", "paused"), ("resume", "running"), ("stop", "stopped")):
        done = server("study", command, "steered")
        assert done.returncode == 0, done.stderr
        assert state in done.stdout
    assert server("study", "pause", "steered").returncode == 1
    missing = server("study", "show", "nobody")
    assert missing.returncode == 1
    assert "whetstone study list" in missing.stderr


def test_parameters_are_fixed_and_released(server: Server) -> None:
    server("study", "launch", "-", text=study("fixed"))
    done = server("study", "fix", "fixed", "{mu: 0.5, eta: {conv1: 0.01}}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fixed"] == {"eta": {"conv1": 0.01}, "mu": 0.5}
    assert "Fixed" in server("study", "show", "fixed").stdout
    wrong = server("study", "fix", "fixed", "{mu: 5}")
    assert wrong.returncode == 2
    assert "fixed.mu" in wrong.stderr
    assert server("study", "fix", "fixed").returncode == 2
    assert "Nothing is fixed" in server("study", "fix", "fixed", "--release").stdout


def test_a_study_begins_with_anothers_trials(server: Server) -> None:
    server("study", "launch", "-", text=study("teacher"))
    server("trial", "add", "teacher", "{eta: 0.02, mu: 0.5}", "--value", "0.9")
    done = server("study", "launch", "-", "--name", "pupil", "--seed-from", "teacher", text=study("teacher"))
    assert done.returncode == 0, done.stderr
    assert "1 finished trials, recorded with their values" in done.stdout
    shown = server("study", "show", "pupil").stdout
    assert "seeded   by study" in shown
    assert "which is trial 0 of study" in shown
    assert "evaluated as trial 0" in server("trial", "show", "pupil", "0").stdout
    missing = server("study", "launch", "-", "--name", "x", "--seed-from", "nobody", text=study("teacher"))
    assert missing.returncode == 2
    assert "seed_from[0].study" in missing.stderr


def test_points_of_ones_own_are_queued_recorded_and_cancelled(server: Server) -> None:
    server("study", "launch", "-", text=study("points"))
    queued = server("trial", "add", "points", "{eta: 0.01, mu: 0.5}", "--json")
    assert queued.returncode == 0, queued.stderr
    assert json.loads(queued.stdout)["params"]["eta"]["conv1"] == 0.01
    recorded = server("trial", "add", "points", "{eta: 0.02, mu: 0.5}", "--value", "0.9", "--json")
    assert json.loads(recorded.stdout)["state"] == "complete"
    assert server("trial", "cancel", "points", "0").returncode == 0
    assert "cancelled" in server("trial", "show", "points", "0").stdout
    wrong = server("trial", "add", "points", "{eta: 7, mu: 0.5, nu: 1}")
    assert wrong.returncode == 2
    assert "eta" in wrong.stderr
    assert "nu" in wrong.stderr


def test_a_trial_is_corrected(server: Server) -> None:
    server("study", "launch", "-", text=study("points"))
    server("trial", "add", "points", "{eta: 0.01, mu: 0.5}", "--value", "0.5")
    server("trial", "add", "points", "{eta: 0.02, mu: 0.5}", "--value", "0.9")
    said = server("trial", "correct", "points", "0", "--value", "0.25", "--reason", "the wrong split")
    assert (said.returncode, said.stdout) == (0, "Trial 0 is complete with value 25.0%.\n")
    made = json.loads(server("trial", "correct", "points", "1", "--infeasible", "--json").stdout)
    assert made["state"] == "infeasible"
    best = json.loads(server("study", "best", "points", "--json").stdout)
    assert [(item["trial"], item["value"], item["reason"]) for item in best] == [(0, 0.25, "the wrong split")]
    for wrong in ([], ["--value", "0.1", "--infeasible"], ["--value", "nan"]):
        refused = server("trial", "correct", "points", "0", *wrong)
        assert refused.returncode == 2
        assert "value" in refused.stderr
    queued = json.loads(server("trial", "add", "points", "{eta: 0.03, mu: 0.5}", "--json").stdout)["trial"]
    early = server("trial", "correct", "points", str(queued), "--value", "0.1")
    assert early.returncode == 1
    assert "only a trial that has ended" in early.stderr


def test_a_bad_spec_exits_2_and_names_every_fault(server: Server) -> None:
    document = yaml.safe_load(study("bad"))
    document["space"][0]["low"] = 5
    document["space"][0]["labels"] = ["conv1", "conv1"]
    document["sampler"] = "bayes"
    document["colour"] = "blue"
    document["budget"] = {"trials": float("nan")}
    document["settings"] = {"net": {"input": 28, "conv": [{"filters": 4, "kernel": 29}], "fc": 8}}
    refused = server("study", "launch", "-", text=yaml.safe_dump(document))
    assert refused.returncode == 2
    for place in ("space[0]", "labels", "sampler", "colour", "budget.trials", "settings.net"):
        assert place in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr


def test_serve_prints_one_line_and_its_token_dies_with_it(server: Server, postgres_url: str) -> None:
    note = server.home / "server.json"
    assert note.stat().st_mode & 0o777 == 0o600
    code, rest, _ = server.stop()
    assert code == 0
    assert rest == ""
    assert not note.exists()
    again = Server(server.home, postgres_url)
    try:
        refused = run(server.home, "study", "list", "--url", again.url, "--token", server.token)
        assert refused.returncode == 1
        assert server.token not in refused.stderr
    finally:
        again.stop()


def test_a_worker_of_the_home_outlives_its_server(server: Server, postgres_url: str) -> None:
    """The server is restarted: the worker's token is known as before, and its leases are still its own."""
    note = server.home / "server.json"
    secret, admin = (json.loads(note.read_text())[role] for role in ("worker", "token"))
    assert (server.home / "worker.token").stat().st_mode & 0o777 == 0o600
    with Client(server.url, admin) as client:
        number = client.post("/api/v1/studies", json=yaml.safe_load(study()))["study"]
    with Client(server.url, secret) as client:
        lease = client.post("/api/v1/claims", json={"worker": "w1"})
        with pytest.raises(ApiError) as refused:
            client.post("/api/v1/studies", json=yaml.safe_load(study("other")))
        assert refused.value.status == 403
    server.stop()
    again = Server(server.home, postgres_url)
    try:
        assert again.token != server.token
        with Client(again.url, secret) as client:
            body = {"token": lease["token"], "reports": [{"epoch": 0, "value": 0.5}]}
            assert client.post(f"/api/v1/leases/{lease['lease']}/report", json=body)["verdict"] == "go_on"
        assert again("worker", "--once", "--device", "cpu", "--threads", "1").returncode == 0, "found without a token"
        with Client(again.url, again.token) as client:
            assert client.get(f"/api/v1/studies/{number}")["counts"]["complete"] == 1
    finally:
        again.process.kill()
        again.process.wait()


def test_tokens_are_made_listed_and_revoked(server: Server, postgres_url: str) -> None:
    made = run(server.home, "token", "create", "reader", "--role", "viewer", "--json", DATABASE_URL=postgres_url)
    secret, number = json.loads(made.stdout)["token"], str(json.loads(made.stdout)["id"])
    assert run(server.home, "study", "list", WHETSTONE_URL=server.url, WHETSTONE_TOKEN=secret).returncode == 0
    launch = run(server.home, "study", "launch", "-", text=study(), WHETSTONE_URL=server.url, WHETSTONE_TOKEN=secret)
    assert launch.returncode == 1
    assert "admin" in launch.stderr
    listed = run(server.home, "token", "list", DATABASE_URL=postgres_url)
    assert "reader" in listed.stdout
    assert secret not in listed.stdout
    assert run(server.home, "token", "revoke", number, DATABASE_URL=postgres_url).returncode == 0
    until = time.monotonic() + 60  # the news of it comes through the database
    while (read := run(server.home, "study", "list", WHETSTONE_URL=server.url, WHETSTONE_TOKEN=secret)).returncode == 0:
        assert time.monotonic() < until, "it still reads"
    assert read.returncode == 1


def test_no_postgres_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody answers here
        port = taken.getsockname()[1]
        url = f"postgresql://someone:s3cret@127.0.0.1:{port}/nothing"
        failed = run(tmp_path, "serve", "--port", "0", DATABASE_URL=url)
    assert failed.returncode == 1
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert "s3cret" not in failed.stderr


def test_a_taken_port_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        failed = run(tmp_path, "serve", "--port", str(taken.getsockname()[1]))
    assert failed.returncode == 1
    assert "--port 0" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_a_wrong_environment_names_the_variable_and_not_its_value(tmp_path: Path) -> None:
    failed = run(tmp_path, "study", "list", WHETSTONE_PORT="eight thousand", WHETSTONE_LEASE_TERM_S="-1")
    assert failed.returncode == 2
    assert "WHETSTONE_PORT" in failed.stderr
    assert "WHETSTONE_LEASE_TERM_S" in failed.stderr
    assert "eight thousand" not in failed.stderr


def test_without_a_server_or_a_token_the_remedy_is_named(tmp_path: Path) -> None:
    nothing = run(tmp_path, "study", "list")
    assert nothing.returncode == 2
    assert "start one with `whetstone serve`" in nothing.stderr
    nobody = run(tmp_path, "study", "list", "--url", "http://127.0.0.1:9", "--token", "wst_0123456789abcdef")
    assert nobody.returncode == 1
    assert "whetstone serve" in nobody.stderr


def test_a_faulty_recipe_exits_2_and_names_every_fault(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("params: {eta: -1, mu: 2, lambda: 0}\nsettings: {net: mini, epoch: 3}\n")
    refused = run(tmp_path, "train", "r.yaml")
    assert refused.returncode == 2
    for place in ("eta", "mu", "epoch"):
        assert place in refused.stderr


def test_a_missing_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    failed = run(tmp_path, "evaluate", "nowhere")
    assert failed.returncode == 1
    assert "best.json" in failed.stderr


def test_ctrl_c_in_train_leaves_a_checkpoint_that_it_goes_on_from(tmp_path: Path) -> None:
    recipe = {"params": {"eta": 0.05, "mu": 0.5}, "settings": TINY_SETTINGS | {"epochs": 100000}, "seed": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [sys.executable, "-m", "cli.main", "train", "r.yaml", "-o", "run", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "epoch    3" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    again = subprocess.Popen(arguments, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    epochs = []
    while not epochs:
        line = again.stderr.readline()
        assert line, "it ended"
        epochs = [int(line.split()[1])] if line.startswith("epoch") else []
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=240)
    assert epochs[0] > 3, "it began anew"


def test_train_never_writes_over_another_run(tmp_path: Path) -> None:
    recipe = {"params": {"eta": 0.05, "mu": 0.5}, "settings": TINY_SETTINGS | {"epochs": 1}, "seed": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert run(tmp_path, "train", "r.yaml", "--threads", "1", "--device", "cpu").returncode == 0
    before = (tmp_path / "run/best.json").read_bytes()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"seed": 2}))
    refused = run(tmp_path, "train", "r.yaml", "--threads", "1", "--device", "cpu")
    assert refused.returncode == 1
    assert "-o" in refused.stderr
    assert (tmp_path / "run/best.json").read_bytes() == before


def test_a_second_server_of_one_home_is_refused_and_the_first_is_still_found(tmp_path: Path) -> None:
    first = Server(tmp_path, "")
    try:
        second = run(tmp_path, "serve", "--port", "0")
        assert second.returncode == 1
        assert first.url in second.stderr
        assert run(tmp_path, "study", "list", "--url", first.url.replace("127.0.0.1", "localhost")).returncode == 0
    finally:
        first.stop()


def test_commands_fold_on_a_narrow_terminal_rather_than_drop_a_column(tmp_path: Path) -> None:
    told = run(tmp_path, "data", "info", COLUMNS="60")
    assert "state" in told.stdout
    assert "missing" in told.stdout
