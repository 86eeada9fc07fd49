"""The long proof: a thousand random schedules, and outages of the database of 0, 20 and 60 seconds.

    make soak [SEED=n] [SCHEDULES=1000] [ONLY=number]

It says its seed first, and again with whatever fails; ONLY plays one schedule of that seed, and leaves out of it what
is not needed to see it fail. Ends with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import secrets
import sys
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sqlalchemy as sa

from hpo import database, schema
from hpo.embedded import EmbeddedPostgres
from tests.faults.outage import OUTAGES_S, outage
from tests.faults.schedule import draw
from tests.faults.schedule_crowd import Tally, play_all, shrink
from tests.faults.schedule_play import Broken

PROCESSES, AT_ONCE = 2, 4
TERM_S = 0.5


def databases(server: str, count: int) -> list[str]:
    """Fresh, migrated databases on a server."""
    made: list[tuple[str, str]] = []
    engine = database.connect(server)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for number in range(count):
            name = f"whetstone_soak_{uuid.uuid4().hex[:12]}"
            template = f' TEMPLATE "{made[0][1]}"' if number else ""
            connection.execute(sa.text(f'CREATE DATABASE "{name}"{template}'))
            url = database.normalise(server).set(database=name).render_as_string(hide_password=False)
            made.append((url, name))
            if not number:
                first = database.connect(url)
                schema.upgrade(first)
                first.dispose()
    engine.dispose()
    return [url for url, _ in made]


def shard(seed: int, numbers: list[int], urls: list[str], folder: str, shrinks: bool) -> Tally:
    """Play these schedules in this process."""
    logging.disable(logging.CRITICAL)
    began = time.monotonic()

    said = 0

    def progress(tally: Tally) -> None:
        nonlocal said
        for broken in tally.broken[said:]:
            print(f"seed {seed}: {str(broken).splitlines()[0]}", flush=True)
        said = len(tally.broken)
        if tally.played % 25 == 0:
            print(f"{tally.played} of {len(numbers)} after {time.monotonic() - began:.0f} s", flush=True)

    schedules = [draw(seed, number) for number in numbers]
    tally = play_all(schedules, urls, Path(folder), term_s=TERM_S, until_broken=3, progress=progress)
    if shrinks and tally.smallest:
        try:
            smallest, broken = shrink(tally.smallest[0], urls[0], Path(folder), term_s=TERM_S)
            tally.smallest[0], tally.broken[0] = smallest, broken
        except ValueError as again:
            print(f"schedule {tally.smallest[0].number}: {again}", flush=True)
    return tally


def play_schedules(seed: int, numbers: list[int], server: str, folder: Path) -> Tally:
    """Play schedules in a few processes, a few at a time in each."""
    urls = databases(server, min(PROCESSES * AT_ONCE, max(PROCESSES, len(numbers))))
    tally = Tally()
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        shards = [
            pool.submit(
                shard, seed, numbers[place::PROCESSES], urls[place::PROCESSES], str(folder), shrinks=len(numbers) < 3
            )
            for place in range(PROCESSES)
        ]
        for one in shards:
            tally.add(one.result())
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--only", type=int, help="play this one schedule of the seed, and shrink it")
    parser.add_argument("--outages", default=",".join(f"{seconds:g}" for seconds in OUTAGES_S), help="seconds, or none")
    parser.add_argument("--server", help="address of a PostgreSQL where databases may be made; they are left there")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    numbers = list(range(given.schedules)) if given.only is None else [given.only]
    outages = [float(text) for text in given.outages.split(",") if text not in ("", "none")]
    if given.only is not None:
        outages = []

    failed = False
    with tempfile.TemporaryDirectory(prefix="whetstone-soak-") as folder:
        began = time.monotonic()
        tally = Tally()
        fast = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "200"}
        if numbers and given.server:
            tally = play_schedules(given.seed, numbers, given.server, Path(folder))
        elif numbers:
            with EmbeddedPostgres(Path(folder) / "postgres", settings=fast) as server:
                tally = play_schedules(given.seed, numbers, server.url, Path(folder))
        for broken in tally.broken:
            failed = True
            print(f"\n{broken}", flush=True)
        for schedule in tally.smallest:
            print(f"again: make soak SEED={given.seed} ONLY={schedule.number}")
        print(
            f"seed {given.seed}: {tally.played} schedules in {time.monotonic() - began:.0f} s, "
            f"{len(tally.broken)} broke a promise; {tally.excused} late expiries excused by a busy machine",
            flush=True,
        )
        for seconds in outages:
            began = time.monotonic()
            try:
                about = outage(Path(folder) / f"outage-{seconds:g}", seconds)
            except (Broken, AssertionError) as broken:
                failed = True
                print(f"\nan outage of {seconds:g} s: {broken}", flush=True)
            else:
                print(f"an outage of {seconds:g} s: {about} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"seed {given.seed}: {'a promise was broken' if failed else 'every promise was kept'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
