"""Fifty random schedules keep every promise about leases; `make soak` plays a thousand."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import _made, _named
from tests.faults.schedule import draw
from tests.faults.schedule_crowd import play_all

SEED, SCHEDULES, AT_ONCE = 1, 50, 5


@pytest.fixture
def urls(postgres_server: str, _template: str) -> Iterator[list[str]]:
    """Databases for schedules that are played at the same time."""
    with contextlib.ExitStack() as stack:
        yield [_named(postgres_server, stack.enter_context(_made(postgres_server, _template))) for _ in range(AT_ONCE)]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_random_schedules_keep_every_promise(part: int, urls: list[str], tmp_path: Path) -> None:
    """Two parts, for two test processes."""
    schedules = [draw(SEED, number, processes=0.1) for number in range(part, SCHEDULES, 2)]
    tally = play_all(schedules, urls, tmp_path, term_s=0.5)
    assert not tally.broken, tally.broken[0]
    assert tally.played == len(schedules)


def test_the_long_proof_takes_a_seed_and_says_it_first_and_last(postgres_server: str) -> None:
    given = ["--seed", "3", "--schedules", "2", "--outages", "none", "--server", postgres_server]
    command = [sys.executable, "-m", "tests.faults.soak", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "seed 3"
    assert said[-1] == "seed 3: every promise was kept"
    assert "2 schedules" in said[-2]
