"""All benchmarks, one after another, into one file: `python -m benchmarks.every --json FILE [NAME ...]`

Each is a process of its own, with its own table; the file has the figures of all, and under "parts" the whole document
of each. The invariant: what one breaks the others do not pay for; the command ends with code 1, and says which it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import say

NAMES = ("trainer", "coordinator", "search")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, its figures mean nothing")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in NAMES]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    parts: dict[str, Any] = {}
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.names or NAMES:
            say.print(f"[bold]{name}[/]")
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file)]
            done = subprocess.run([*command, *(["--quick"] if chosen.quick else [])], check=False)  # noqa: S603
            if done.returncode:
                broken.append(name)
            if file.exists():
                parts[name] = json.loads(file.read_text())
    figures = [figure for part in parts.values() for figure in part["figures"]]
    chosen.json.write_text(json.dumps({"figures": figures, "parts": parts}, indent=1) + "\n")
    if broken:
        say.print(f"[bold red]not measured whole: {', '.join(broken)}[/]")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
