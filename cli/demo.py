"""`whetstone demo`: a whole study on this machine, from nothing to a table of the best trials.

It starts what a person would start (a server with its own PostgreSQL, two CPU workers), launches the preset `mini`,
shows it live, and scores the best trials on tasks that no trial has seen. Ctrl-C stops everything; a second run goes
on with the same study. All it knows of the server it learns over REST, like anybody else.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live

from cli import demo_view, output, presets, processes, settings
from hpo.errors import WhetstoneError

if TYPE_CHECKING:
    import subprocess

    from hpo.rest import Client
    from model.dataset import Choice
    from model.drawings import Dataset

PRESET = "mini"
COORDINATOR_METRIC = re.compile(
    r'whetstone_coordinator_(?P<what>calls|seconds)_total\{call="(?P<call>\w+)"\} (?P<value>\S+)'
)
HOME = Path(".whetstone")
TOP = 3
HOURS = 0.17
"""Training time, summed over the workers, at which the demo ends on a slow machine, however many trials are left."""
LOOK_EVERY_S = 5.0
"""How often the study is asked for where no trial has finished; the trials are looked at every second."""


class DemoFailed(WhetstoneError):
    """A part of the demo ended by itself; the message holds the end of its log."""


@dataclass
class Parts:
    """The processes that run while the demo does, and where they write."""

    home: Path
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    def start(self, name: str, arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        self.running[name] = processes.start(arguments, log=self.log(name), env=env)
        return self.running[name]

    def check(self) -> None:
        """Raise `DemoFailed` if a part has died."""
        for name, process in self.running.items():
            if process.poll() is not None:
                self.fail(name, process)

    def fail(self, name: str, process: subprocess.Popen[str]) -> None:
        log = self.log(name)
        raise DemoFailed(f"the {name} ended with code {process.returncode}; {log} says:\n{processes.tail(log)}")

    def stop(self, *, workers_only: bool = False) -> None:
        """Workers first: they write a checkpoint and hand their trials back, for which the server must be up."""
        for server in (False, True):
            names = [name for name in self.running if (name == "server") == server]
            if not (server and workers_only):
                processes.stop([self.running.pop(name) for name in names])


def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Leave the server up at the end, until Ctrl-C.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier demo in the same home.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes, one core each.")] = 2,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all; the preset's number by default.")] = None,
) -> None:
    """Run a whole study on this machine: server, two CPU workers, live progress, the best trials."""
    began = time.monotonic()
    home = settings.load().home_dir if os.environ.get("WHETSTONE_HOME") else HOME.absolute()
    chosen = settings.load(home=home, artifacts=str(home / "artifacts"))
    _refuse_second(home)
    if fresh:
        _forget(home)
    signal.signal(signal.SIGTERM, _interrupt)
    parts = Parts(home)
    try:
        _run(parts, chosen, began, json_file=json_file, serve=serve, workers=workers, trials=trials)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends us at once; the parts end with us
        output.say("\nStopping: running trials write a checkpoint. Run the demo again to go on with this study.")
        raise typer.Exit(130) from None
    finally:
        parts.stop()


def _run(
    parts: Parts,
    chosen: settings.Settings,
    began: float,
    *,
    json_file: Path | None,
    serve: bool,
    workers: int,
    trials: int | None,
) -> None:
    from hpo.rest import Client

    output.out.print("[bold]Whetstone demo[/]: tuning the Siamese one-shot network on this machine\n")
    dataset = _prepare(chosen)
    url, token = _start_server(parts)
    with Client(url, token) as client:
        study = _launch(client, trials, dataset.name)
        begun_on = study["spec"]["settings"].get("data", dataset.name)
        if begun_on != dataset.name:
            output.say(f"This study began on {begun_on} and goes on with it; --fresh begins anew on {dataset.name}.")
            dataset = _prepare(chosen, begun_on)
        output.out.print(f"  pages     {_sign_in_link(client)}", soft_wrap=True)
        output.out.print("            [dim](the link opens once)[/]")
        output.out.print(f"  files     {output.escape(os.path.relpath(parts.home))}/\n")
        if study["state"] not in ("finished", "stopped"):
            for number in range(1, workers + 1):
                _start_worker(parts, number, url, token)
            _watch(client, parts, study["study"])
            parts.stop(workers_only=True)
        study = client.get(f"/api/v1/studies/{study['study']}")
        result = _score(client, chosen, dataset, study)
        result["seconds"] = round(time.monotonic() - began, 1)
        result["coordinator"] = _coordinator_work(client)
        result["idle_between_trials_s"] = _idle_between_trials(client, study["study"])
        if json_file:
            json_file.write_text(json.dumps(result, indent=2) + "\n")
        _conclude(result, parts.home, serving=serve)
        if serve:
            output.out.print(
                f"The server stays up; Ctrl-C stops it. Sign in (the link opens once):\n\n  {_sign_in_link(client)}\n",
                soft_wrap=True,
            )
            while True:
                parts.check()
                time.sleep(0.3)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _refuse_second(home: Path) -> None:
    from hpo.embedded import running

    if running(home):
        raise DemoFailed(f"a server or another demo already runs in {home}: stop it, or set WHETSTONE_HOME elsewhere")


def _forget(home: Path) -> None:
    """Remove what an earlier demo left, but not its packed data."""
    for name in ("postgres", "artifacts", "logs"):
        shutil.rmtree(home / name, ignore_errors=True)


def _prepare(chosen: settings.Settings, source: Choice = "auto") -> Dataset:
    """Load (the first time: pack) the data, so that no worker has to."""
    from model import dataset

    with output.err.status("Preparing the data ..."):
        loaded = dataset.load(28, source=source, data_root=chosen.data_root, home=chosen.home_dir, notify=output.say)
    characters, drawers = loaded.train.images.shape[:2]
    output.out.print(
        f"  data      {loaded.name}, {characters} characters x {drawers} drawers to train on, 28 x 28 pixels"
    )
    return loaded


def _start_server(parts: Parts) -> tuple[str, str]:
    """Start the server on port 8000, or on any other where that one is taken."""
    with output.err.status("Starting PostgreSQL and the server ..."):
        for port in ("8000", "0"):
            process = parts.start(
                "server",
                ["serve", "--host", "127.0.0.1", "--port", port, "--json"],
                env={
                    "WHETSTONE_HOME": str(parts.home),
                    "WHETSTONE_ARTIFACTS": str(parts.home / "artifacts"),
                    "WHETSTONE_LEASE_TERM_S": "10",
                    "WHETSTONE_HEARTBEAT_S": "3",
                    "DATABASE_URL": "",
                },
            )
            assert process.stdout is not None
            if line := process.stdout.readline():
                said = json.loads(line)
                return said["url"], said["token"]
            process.wait()
            if port != "0" and f"cannot listen on 127.0.0.1:{port}" in processes.tail(parts.log("server"), 1):
                output.say(f"Port {port} is taken: the server takes another one.")
                continue
            parts.running.pop("server")
            parts.fail("server", process)
    raise AssertionError("port 0 is never taken")


def _start_worker(parts: Parts, number: int, url: str, token: str) -> None:
    parts.start(
        f"worker-{number}",
        ["worker", "--name", f"demo-{number}-{os.getpid()}", "--device", "cpu", "--threads", "1"],
        env={
            "WHETSTONE_HOME": str(parts.home),
            "WHETSTONE_ARTIFACTS": str(parts.home / "artifacts"),
            "WHETSTONE_URL": url,
            "WHETSTONE_TOKEN": token,
            "OMP_NUM_THREADS": "1",
        },
    )


def _launch(client: Client, trials: int | None, data: str) -> dict[str, Any]:
    """The demo's study: the one from an earlier run, or a new one."""
    name = presets.load_all()[PRESET]["name"]
    for item in client.get("/api/v1/studies", params={"name": name})["items"]:
        if item["name"] == name:
            path = f"/api/v1/studies/{item['study']}"
            if trials is not None and trials != item["budget"]["trials"]:
                item = client.patch(path, json={"budget": {"trials": trials, "hours": None}})
            if item["state"] == "paused":
                item = client.patch(path, json={"state": "running"})
            progress = f"{demo_view.finished(item)} of {item['budget']['trials']} trials are done"
            output.out.print(f"  study     {name!r}, from an earlier run: {progress}")
            return dict(item)
    overrides: dict[str, Any] = {"settings": {"data": data}}
    overrides["budget"] = {"trials": trials} if trials else {"hours": HOURS}
    made: dict[str, Any] = client.post("/api/v1/studies", json={"preset": PRESET, **overrides})
    dimensions = sum(len(parameter.get("labels") or [0]) for parameter in made["spec"]["space"])
    names = ", ".join(parameter["name"] for parameter in made["spec"]["space"])
    limit = f" or {made['budget']['hours'] * 60:.0f} min of training" if made["budget"]["hours"] else ""
    how = f"{made['sampler'].upper()}, {made['budget']['trials']} trials{limit}"
    output.out.print(f"  study     {name!r}: {names} by layer, {dimensions} dimensions")
    output.out.print(f"  search    {how}")
    return made


def _sign_in_link(client: Client) -> str:
    return client.url + str(client.post("/api/v1/login-links")["path"])


def _watch(client: Client, parts: Parts, study: int) -> None:
    """Show the study until it is finished."""
    from hpo.rest import ServerUnreachable

    path = f"/api/v1/studies/{study}"
    began, shown = time.monotonic(), set[int]()
    at_start: int | None = None
    item: dict[str, Any] = {}
    asked, seen = 0.0, -1
    with Live(console=output.out, refresh_per_second=4, transient=True) as live:
        while True:
            parts.check()
            try:
                trials = list(client.pages(f"{path}/trials"))
                over = [t for t in trials if t["state"] in demo_view.FINISHED]
                if len(over) != seen or time.monotonic() > asked + LOOK_EVERY_S:
                    item, asked, seen = client.get(path), time.monotonic(), len(over)
            except ServerUnreachable:
                time.sleep(0.5)
                continue
            if at_start is None:
                at_start = len(over)
                shown.update(t["trial"] for t in over)
            for trial in sorted((t for t in over if t["trial"] not in shown), key=lambda t: str(t["ended_at"])):
                shown.add(trial["trial"])
                live.console.print(demo_view.trial_line(trial, item))
            running = [t for t in trials if t["state"] == "leased"]
            elapsed, done = time.monotonic() - began, len(over) - at_start
            left = _time_left(item["budget"], len(over), elapsed / done) if done else None
            if output.out.is_terminal:
                live.update(demo_view.progress(item, running, elapsed, left))
            if item["state"] == "finished" or (item["state"] == "stopped" and not running):
                return
            time.sleep(1)


def _time_left(budget: dict[str, Any], over: int, seconds_a_trial: float) -> float:
    """Seconds until the budget is spent, by trials or by hours, at the pace so far."""
    by_trials = (budget["trials"] - over) * seconds_a_trial if budget["trials"] else math.inf
    used = budget["hours_used"]
    by_hours = max(0.0, budget["hours"] / used - 1) * over * seconds_a_trial if budget["hours"] and used else math.inf
    return min(by_trials, by_hours)


def _score(client: Client, chosen: settings.Settings, dataset: Dataset, study: dict[str, Any]) -> dict[str, Any]:
    """Score the best trials, and what to compare them with, on fresh validation tasks."""
    from cli.scoring import score_baselines, score_checkpoint

    path = f"/api/v1/studies/{study['study']}"
    rows = []
    with output.err.status("Scoring the best trials on fresh tasks ..."):
        for trial in client.get(f"{path}/best", params={"top": TOP}):
            checkpoint = client.get(f"{path}/trials/{trial['trial']}")["checkpoint"]
            if checkpoint is not None:
                folder = Path(chosen.artifacts_root) / checkpoint
                score = score_checkpoint(folder, dataset.validation)
                known = {"trial": trial["trial"], "value": trial["value"], "params": trial["params"]}
                rows.append({**known, **score, "checkpoint": str(folder)})
        baselines = score_baselines(dataset.validation, "mini")
    if not rows:
        raise DemoFailed(
            f"no trial has learnt anything: the logs are in {chosen.home_dir / 'logs'}; --fresh begins anew"
        )
    return {
        "study": study["study"],
        "data": dataset.name,
        "trials": demo_view.finished(study),
        "counts": study["counts"],
        "budget": study["budget"]["trials"] or 0,
        "reason": study["reason"],
        "best": rows[0],
        "top": rows,
        "baselines": baselines,
    }


def _coordinator_work(client: Client) -> dict[str, dict[str, float]]:
    """Calls of the coordinator in this run and the seconds they took, by kind, from /metrics."""
    work: dict[str, dict[str, float]] = {}
    for line in client.text("/metrics").splitlines():
        if found := COORDINATOR_METRIC.match(line):
            work.setdefault(found["call"], {})[found["what"]] = round(float(found["value"]), 3)
    return work


def _idle_between_trials(client: Client, study: int) -> list[float]:
    """Seconds between the end of one trial and the lease of the next, for each pair that one worker had in this run."""
    path = f"/api/v1/studies/{study}/trials"
    by_worker: dict[str, list[tuple[datetime, datetime]]] = {}
    for trial in client.pages(path):
        for attempt in client.get(f"{path}/{trial['trial']}")["history"]:
            if attempt["worker"] and attempt["ended_at"] and str(attempt["worker"]).endswith(f"-{os.getpid()}"):
                span = datetime.fromisoformat(attempt["leased_at"]), datetime.fromisoformat(attempt["ended_at"])
                by_worker.setdefault(attempt["worker"], []).append(span)
    spans = [sorted(each) for each in by_worker.values()]
    gaps = [(later[0] - earlier[1]).total_seconds() for each in spans for earlier, later in pairwise(each)]
    return sorted(round(gap, 3) for gap in gaps)


def _trials(result: dict[str, Any]) -> str:
    return "1 trial" if result["trials"] == 1 else f"{result['trials']} trials"


def _conclude(result: dict[str, Any], home: Path, *, serving: bool) -> None:
    tasks = result["best"]["tasks"]
    output.out.print(f"\n[bold]The best of {_trials(result)}[/], on {tasks:,} fresh 20-way validation tasks\n")
    output.out.print(demo_view.result_table(result))
    output.out.print("\n[dim]Fresh tasks score a little lower: each trial was chosen for its best epoch on others.[/]")
    if result["reason"] and result["trials"] < result["budget"]:
        output.out.print(f"The study ended before its {result['budget']} trials: {output.escape(result['reason'])}.")
    output.out.print(f"\n{_trials(result)}, {output.seconds(result['seconds'])}. What next:\n")
    for command, what in demo_view.next_commands(result, home, serving=serving):
        output.out.print(f"  [dim]# {what}[/]\n  {output.escape(command)}\n", soft_wrap=True)
