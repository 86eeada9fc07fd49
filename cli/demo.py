"""`whetstone demo`: a whole study on this machine, from nothing to a table of the best trials.

It starts what a person would start (a server with its own PostgreSQL, two CPU workers), launches the preset `mini`, shows
it live, and scores the best trials on tasks that no trial has seen. Ctrl-C stops everything; a second run goes on with
the same study. All it knows of the server it learns over REST, like anybody else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli import output, presets, processes, settings
from hpo.errors import WhetstoneError

if TYPE_CHECKING:
    import subprocess

    from workers.client import Client

PRESET = "mini"
FINISHED = ("complete", "infeasible", "pruned", "failed")
HOME = Path(".whetstone")


class DemoFailed(WhetstoneError):
    """A part of the demo ended by itself; the message holds the end of its log."""


@dataclass(frozen=True)
class Parts:
    """What runs while the demo does."""

    server: subprocess.Popen[str]
    workers: list[subprocess.Popen[str]]
    logs: Path
    url: str
    token: str

    def check(self) -> None:
        """Raise `DemoFailed` if a part has died."""
        for name, process in [("server", self.server), *((f"worker-{i + 1}", w) for i, w in enumerate(self.workers))]:
            if process.poll() is not None:
                log = self.logs / f"{name}.log"
                raise DemoFailed(f"the {name} ended with code {process.returncode}; {log} says:\n{processes.tail(log)}")


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
    chosen = settings.load(home=home)
    _refuse_second(home)
    if fresh:
        _forget(home)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: _interrupt(stopping))

    output.out.print("[bold]Whetstone demo[/]: a study of the Siamese one-shot network, on this machine\n")
    dataset = _prepare(chosen)
    parts: Parts | None = None
    from workers.client import Client

    try:
        server, url, token = _start_server(home)
        parts = Parts(server, [], home / "logs", url, token)
        with Client(url, token) as client:
            study = _launch(client, trials)
            _introduce(client, study, url)
            if study["state"] not in ("finished", "stopped"):
                for number in range(workers):
                    parts.workers.append(_start_worker(home, number, url, token))
                _watch(client, parts, study["study"])
                processes.stop(parts.workers)
            study = client.get(f"/api/v1/studies/{study['study']}")
            result = _score(client, chosen, dataset, study)
            result["seconds"] = round(time.monotonic() - began, 1)
            result["coordinator_seconds"] = _coordinator_seconds(client)
            _conclude(result, study, home, serving=serve)
            if json_file:
                json_file.write_text(json.dumps(result, indent=2) + "\n")
            if serve:
                _stay(client, parts)
    except KeyboardInterrupt:
        output.say("\nStopping: running trials write a checkpoint. Run the demo again to go on with this study.")
        raise typer.Exit(130) from None
    finally:
        if parts is not None:
            processes.stop(parts.workers)
            processes.stop([parts.server])


def _interrupt(stopping: threading.Event) -> None:
    if not stopping.is_set():
        stopping.set()
        raise KeyboardInterrupt


def _refuse_second(home: Path) -> None:
    from hpo.embedded import running

    if running(home):
        raise DemoFailed(f"a server or another demo already runs in {home}: stop it, or set WHETSTONE_HOME elsewhere")


def _forget(home: Path) -> None:
    """Remove what an earlier demo left, but not its packed data."""
    for name in ("postgres", "artifacts", "logs"):
        shutil.rmtree(home / name, ignore_errors=True)


def _prepare(chosen: settings.Settings) -> Any:
    """Load (the first time: pack) the data, so that no worker has to."""
    from model import dataset

    with output.err.status("Preparing the data ..."):
        loaded = dataset.load(28, source="auto", data_root=chosen.data_root, home=chosen.home_dir, notify=output.say)
    shape = loaded.train.images.shape
    output.out.print(
        f"  data      {loaded.name}: {shape[0]} characters x {shape[1]} drawers to train on, 28 x 28 pixels"
    )
    return loaded


def _free_port() -> str:
    """8000 where it is free, or any other."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            return "0"
    return "8000"


def _start_server(home: Path) -> tuple[subprocess.Popen[str], str, str]:
    log = home / "logs" / "server.log"
    process = processes.start(
        ["serve", "--host", "127.0.0.1", "--port", _free_port(), "--json"],
        log=log,
        env={
            "WHETSTONE_HOME": str(home),
            "WHETSTONE_LEASE_TERM_S": "10",
            "WHETSTONE_HEARTBEAT_S": "2",
            "DATABASE_URL": "",
        },
    )
    assert process.stdout is not None
    try:
        with output.err.status("Starting PostgreSQL and the server ..."):
            line = process.stdout.readline()
    except KeyboardInterrupt:
        processes.stop([process])
        raise
    if not line:
        process.wait()
        raise DemoFailed(f"the server did not start; {log} says:\n{processes.tail(log)}")
    said = json.loads(line)
    return process, said["url"], said["token"]


def _start_worker(home: Path, number: int, url: str, token: str) -> subprocess.Popen[str]:
    return processes.start(
        ["worker", "--name", f"demo-{number + 1}", "--device", "cpu", "--threads", "1"],
        log=home / "logs" / f"worker-{number + 1}.log",
        env={"WHETSTONE_HOME": str(home), "WHETSTONE_URL": url, "WHETSTONE_TOKEN": token, "OMP_NUM_THREADS": "1"},
    )


def _launch(client: Client, trials: int | None) -> dict[str, Any]:
    """The demo's study: the one from an earlier run, or a new one."""
    name = presets.load_all()[PRESET]["name"]
    for item in client.get("/api/v1/studies", params={"name": name})["items"]:
        if item["name"] == name:
            path = f"/api/v1/studies/{item['study']}"
            if trials is not None and trials != item["budget"]["trials"]:
                item = client.patch(path, json={"budget": {"trials": trials}})
            if item["state"] == "paused":
                item = client.patch(path, json={"state": "running"})
            done = sum(item["counts"][state] for state in FINISHED)
            output.out.print(
                f"  study     {name!r} from an earlier run: {done} of {item['budget']['trials']} trials are done"
            )
            return dict(item)
    overrides: dict[str, Any] = {"budget": {"trials": trials}} if trials else {}
    made: dict[str, Any] = client.post("/api/v1/studies", json={"preset": PRESET, **overrides})
    dimensions = sum(len(parameter.get("labels") or [0]) for parameter in made["spec"]["space"])
    names = ", ".join(parameter["name"] for parameter in made["spec"]["space"])
    output.out.print(
        f"  study     {name!r}: {names} by layer, {dimensions} dimensions, {made['sampler'].upper()}, {made['budget']['trials']} trials"
    )
    return made


def _introduce(client: Client, study: dict[str, Any], url: str) -> None:
    link = client.post("/api/v1/login-links")
    output.out.print(f"  pages     {url}{link['path']}   (opens once)", soft_wrap=True)
    output.out.print(
        f"  PostgreSQL, the server and the workers keep everything in {output.escape(str(HOME))}\n"
        if not os.environ.get("WHETSTONE_HOME")
        else ""
    )


def _watch(client: Client, parts: Parts, study: int) -> None:
    """Show the study until it is finished."""
    from workers.client import ServerUnreachable

    began, known, live_terminal = time.monotonic(), set[int](), output.out.is_terminal
    path = f"/api/v1/studies/{study}"
    at_start: int | None = None
    with Live(console=output.out, refresh_per_second=4, transient=True) as live:
        while True:
            parts.check()
            try:
                item = client.get(path)
                running = client.get(f"{path}/trials", params={"state": "leased", "limit": 50})["items"]
                for trial in _newly_finished(client, path, known):
                    live.console.print(_line(trial, item))
            except ServerUnreachable:
                time.sleep(0.5)
                continue
            done = sum(item["counts"][state] for state in FINISHED)
            at_start = done if at_start is None else at_start
            if live_terminal:
                live.update(_progress(item, running, done, done - at_start, time.monotonic() - began))
            if item["state"] == "finished" or (item["state"] == "stopped" and not running):
                return
            if item["state"] == "paused":
                live.update(Text(f"The study is paused: {item['reason'] or 'resume it on its page'}", style="yellow"))
            time.sleep(0.5)


def _newly_finished(client: Client, path: str, known: set[int]) -> list[dict[str, Any]]:
    trials = client.pages(f"{path}/trials", params={"order": "number"})
    new = [t for t in trials if t["state"] in FINISHED and t["trial"] not in known]
    known.update(t["trial"] for t in new)
    return sorted(new, key=lambda t: str(t["ended_at"]))


def _line(trial: dict[str, Any], study: dict[str, Any]) -> str:
    best = study["best"] and study["best"]["trial"] == trial["trial"]
    why = f"  {trial['reason']}" if trial["reason"] and trial["state"] != "complete" else ""
    return (
        f"  trial {trial['trial']:>2}  {output.state(trial['state'])}  "
        f"[bold]{output.value_of(trial, 'siamese'):>6}[/]  {output.seconds(trial['seconds'])}"
        f"{'  [green]best so far[/]' if best else ''}[dim]{output.escape(why[:70])}[/]"
    )


def _progress(
    item: dict[str, Any], running: list[dict[str, Any]], done: int, done_here: int, elapsed: float
) -> RenderableType:
    total = item["budget"]["trials"] or done
    left = (total - done) * elapsed / done_here if done_here else None
    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(total=total, completed=done, width=30),
        f"[bold]{done}[/] of {total} trials done",
        f"best so far [bold green]{output.value_of(item['best'], 'siamese')}[/]",
        f"{output.seconds(elapsed)} gone, {'about ' + output.seconds(left) + ' left' if left is not None else 'estimating'}",
    )
    rows = Table.grid(padding=(0, 2))
    for trial in sorted(running, key=lambda t: t["trial"]):
        epoch = "starting" if trial["epoch"] is None else f"epoch {trial['epoch'] + 1}"
        rows.add_row(
            f"  trial {trial['trial']:>2}", output.state("running"), epoch, output.escape(trial["worker"] or "")
        )
    return Group(Text(), head, rows)


def _score(client: Client, chosen: settings.Settings, dataset: Any, study: dict[str, Any]) -> dict[str, Any]:
    """Score the best trials, and what to compare them with, on fresh validation tasks."""
    from cli.scoring import score_baselines, score_checkpoint

    with output.err.status("Scoring the best trials on 2,000 fresh tasks ..."):
        rows = []
        for trial in client.get(f"/api/v1/studies/{study['study']}/best", params={"top": 3}):
            detail = client.get(f"/api/v1/studies/{study['study']}/trials/{trial['trial']}")
            if detail["checkpoint"] is None:
                continue
            folder = Path(chosen.artifacts_root) / detail["checkpoint"]
            score = score_checkpoint(folder, dataset)
            rows.append(
                {
                    "trial": trial["trial"],
                    "value": trial["value"],
                    "params": trial["params"],
                    "checkpoint": str(folder),
                    **score,
                }
            )
        if not rows:
            raise DemoFailed("no trial has learnt anything: look at the logs in .whetstone/logs, or run with --fresh")
        baselines = score_baselines(dataset, "mini")
    return {"best": rows[0], "top": rows, "baselines": baselines, "data": dataset.name, "trials": sum(study["counts"][s] for s in FINISHED), "counts": study["counts"], "study": study["study"]}  # fmt: skip


def _coordinator_seconds(client: Client) -> float:
    """CPU and waiting that the coordinator's calls took, summed, from /metrics."""
    total = 0.0
    for line in client.text("/metrics").splitlines():
        if line.startswith("whetstone_coordinator_seconds_sum"):
            total += float(line.rsplit(" ", 1)[1])
    return round(total, 2)


def _conclude(result: dict[str, Any], study: dict[str, Any], home: Path, *, serving: bool) -> None:
    tasks = result["best"]["tasks"]
    output.out.print(
        f"\n[bold]The best of {result['trials']} trials[/], scored on {tasks:,} fresh 20-way validation tasks\n"
    )
    labels = list(next(iter(result["best"]["params"].values())))
    columns: list[str | tuple[str, str]] = [
        "",
        ("accuracy", "right"),
        ("95% interval", "right"),
        "",
        *((l, "right") for l in labels),
    ]
    rows: list[list[str]] = []
    for row in result["top"]:
        for position, (name, values) in enumerate(row["params"].items()):
            head = [
                f"trial {row['trial']}",
                f"[bold green]{output.percent(row['accuracy'])}[/]",
                _interval(row["interval"]),
            ]
            rows.append(
                [*(head if position == 0 else ["", "", ""]), name, *(output.show(values[label]) for label in labels)]
            )
        rows.append([""] * (4 + len(labels)))
    names = {"untrained": "untrained network", "nearest_neighbour": "pixel 1-nearest neighbour", "chance": "chance"}
    for key, name in names.items():
        line = result["baselines"][key]
        interval = _interval(line["interval"]) if "interval" in line else ""
        rows.append([name, output.percent(line["accuracy"]), interval, "", *("" for _ in labels)])
    output.out.print(output.table(None, columns, rows))
    output.out.print(f"\n{result['trials']} trials in {output.seconds(result['seconds'])}. What next:\n")
    where = _shell_home(home)
    best = os.path.relpath(result["best"]["checkpoint"])
    commands = [
        (f"{where}.venv/bin/whetstone evaluate {best}", "score the best network again"),
        (f"{where}.venv/bin/whetstone demo --trials {result['trials'] + 20}", "go on with this study"),
        (f"{where}.venv/bin/whetstone serve", "browse it, launch studies of your own"),
        (".venv/bin/whetstone data fetch", "get Omniglot, Lake's runs and MNIST")
        if result["data"] != "omniglot"
        else None,
    ]
    for entry in commands:
        if entry and not (serving and entry[0].endswith("serve")):
            output.out.print(f"  {output.escape(entry[0])}   [dim]# {entry[1]}[/]", soft_wrap=True)
    output.out.print()


def _shell_home(home: Path) -> str:
    return f"WHETSTONE_HOME={os.path.relpath(home)} "


def _interval(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _stay(client: Client, parts: Parts) -> None:
    link = client.post("/api/v1/login-links")
    output.out.print(f"The server stays up: {parts.url}{link['path']}   (opens once; Ctrl-C stops it)", soft_wrap=True)
    while parts.server.poll() is None:
        time.sleep(0.3)
