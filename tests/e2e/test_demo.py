"""The demo as a person runs it: a real server, real workers, a real terminal's Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TRIALS = 3


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WHETSTONE_", "DATABASE_URL"))}
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "demo", "--trials", str(TRIALS), *arguments],
        cwd=folder,
        env=kept | {"WHETSTONE_DATA": os.environ.get("WHETSTONE_DATA", ""), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def parts_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for_log(log: Path, text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{log.name} never said {text!r}")


@pytest.mark.slow
def test_ctrl_c_stops_everything_and_a_second_run_ends_the_same_study(tmp_path: Path) -> None:
    first = start(tmp_path)
    try:
        wait_for_log(tmp_path / ".whetstone/logs/worker-1.log", "begins", 600)
        parts = parts_of(first)
        assert len(parts) >= 4  # the server, its PostgreSQL, two workers
        first.send_signal(signal.SIGINT)
        said, _ = first.communicate(timeout=240)
    finally:
        first.kill()
    assert first.returncode == 130, said
    assert "Traceback" not in said
    assert "go on with this study" in said
    _, alive = psutil.wait_procs(parts, timeout=60)
    assert alive == [], "the demo left processes behind"

    second = start(tmp_path, "--json", "result.json")
    said, _ = second.communicate(timeout=800)
    assert second.returncode == 0, said
    assert "from an earlier run" in said
    for line in ("untrained network", "pixel 1-nearest neighbour", "chance", "whetstone evaluate"):
        assert line in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["trials"] == TRIALS
    assert result["best"]["tasks"] == 2000
    low, high = result["best"]["interval"]
    assert low < result["best"]["accuracy"] < high
    assert result["best"]["accuracy"] > result["baselines"]["chance"]["accuracy"]
    assert result["seconds"] > 0
