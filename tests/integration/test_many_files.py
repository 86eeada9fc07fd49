"""A server with many workers has many open files; neither its way to PostgreSQL nor its sampler minds."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from optuna.study import StudyDirection

from hpo import database, events
from hpo.sampling import Elsewhere, SamplingProcess
from hpo.snapshot import Snapshot
from hpo.spec import parse

X = {"name": "x", "type": "float", "low": 0.0, "high": 1.0}


@pytest.fixture
def many_files() -> Iterator[None]:
    """All descriptors below 1,100 in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1_500:
        pytest.skip("this system allows a process too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1_500), hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    while opened[-1] < 1_100:
        opened.append(os.open(os.devnull, os.O_RDONLY))
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_database_is_reached_and_heard_beside_a_thousand_open_files(engine: sa.Engine, many_files: None) -> None:
    heard = threading.Event()
    url = engine.url.render_as_string(hide_password=False)
    with events.Listener(url, lambda event: heard.set() if event.kind == "work" else None) as listener:
        assert listener.wait_until_connected(60)
        for _ in range(2):  # the second time on a connection that comes out of the pool
            with database.transaction(engine) as connection:
                events.notify(connection, "work")
            assert database.call(engine, "SELECT 1") == 1
        assert heard.wait(60)


def test_the_sampling_process_answers_beside_a_thousand_open_files(many_files: None) -> None:
    process = SamplingProcess()
    spec = parse({"name": "s", "workload": "external", "space": [X], "sampler": "tpe"}, {})
    snapshot = Snapshot("s", StudyDirection.MAXIMIZE, (), {})
    try:
        asked = Elsewhere(process).open(spec, snapshot, 0, 7, {}).ask()
        assert set(asked.reduced) == {"x"}
    finally:
        process.close()
