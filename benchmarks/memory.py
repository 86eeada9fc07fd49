"""Peak resident memory of a whole process, as the system accounts for it when it has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.child import Broken, environment

RECIPES = Path(__file__).parent / "recipes"


def bare(core: int) -> int:
    """Bytes at the peak of a process that imports torch and does nothing with it."""
    return _peak([sys.executable, "-c", "import torch"], core)


def training(core: int, settings: dict[str, int], data: str) -> int:
    """Bytes at the peak of `whetstone train`: some epochs of mini, each with its evaluation."""
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / "pairs-1min.yaml").read_text())
    source = "strokes" if data == "small" else data
    recipe["settings"] |= {"max_seconds": None, "data": source} | settings
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        whetstone = "from cli.main import main; main()"
        into = str(Path(folder) / "run")
        return _peak(
            [sys.executable, "-c", whetstone, "train", str(file), "-o", into, "--threads", "1", "--device", "cpu"], core
        )


def _peak(command: list[str], core: int) -> int:
    process = subprocess.Popen(  # noqa: S603 - this very Python, and our own command
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(huge_pages=True),
        preexec_fn=(lambda: os.sched_setaffinity(0, {core})) if hasattr(os, "sched_setaffinity") else None,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Broken(f"{' '.join(command[2:])} ended with code {process.returncode}: {said[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit
