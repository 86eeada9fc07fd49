"""What counts round trips counts each once, and what plays a thousand clients hears every answer whole."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks import coordinator, every, fleet, past
from benchmarks.place import coordinator as coordinator_on
from benchmarks.plain_http import Answer, Broken, Connection, Parser
from benchmarks.wire import Count, Relay, Scanner, writes
from hpo import database
from hpo.storage import PostgresStorage


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!I", 4 + len(body)) + body


ANSWERS = b"".join(
    [
        message(b"R", b"\0\0\0\0"),
        message(b"S", b"Z\0Z\0Z\0"),  # a Z in a body is no message
        message(b"Z", b"I"),
        message(b"C", b"BEGIN\0"),
        message(b"Z", b"T"),
        message(b"D", b"Z" * 3000),
        message(b"C", b"SELECT 1\0"),
        message(b"Z", b"T"),
        message(b"E", b"SERROR\0\0"),
        message(b"Z", b"E"),
        message(b"C", b"ROLLBACK\0"),
        message(b"Z", b"I"),
    ]
)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 1000, 10_000])
def test_a_round_trip_is_counted_once_however_the_bytes_are_cut(size: int) -> None:
    scanner = Scanner()
    counts = [scanner.feed(ANSWERS[at : at + size]) for at in range(0, len(ANSWERS), size)]
    assert sum(count.round_trips for count in counts) == 5
    assert sum(count.transactions for count in counts) == 2


def test_the_relay_counts_what_passes_and_changes_nothing(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RESTED_S", 600.0)  # else a connection that has rested is asked first
    if not sa.make_url(postgres_url).query.get("host"):
        pytest.skip("the server of WHETSTONE_TEST_DATABASE_URL has no Unix socket to put the relay before")
    past_it = database.connect(postgres_url)
    with Relay(postgres_url, tmp_path) as relay, writes(past_it) as written:
        engine = database.connect(relay.url)
        with engine.connect():
            pass
        before, wrote = relay.count, written.count
        with engine.begin() as connection:  # BEGIN, two statements, COMMIT
            connection.exec_driver_sql("CREATE TABLE few (n integer)")
            connection.exec_driver_sql("INSERT INTO few SELECT generate_series(1, 10000)")
        assert relay.count - before == Count(round_trips=4, transactions=1)
        assert written.count - wrote == 1
        before, wrote = relay.count, written.count
        assert database.call(engine, "SELECT sum(n) FROM few") == 50_005_000
        assert relay.count - before == Count(round_trips=1, transactions=1)
        assert written.count == wrote
        with engine.connect() as connection:
            assert len(connection.exec_driver_sql("SELECT repeat('Z', 1000) FROM few").scalars().all()) == 10_000
        engine.dispose()
    past_it.dispose()


BODIES = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Answer(200, b"{}", False)),
    (b"HTTP/1.1 204 No Content\r\ncontent-type: x\r\n\r\n", Answer(204, b"", False)),
    (
        b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\nConnection: close\r\n\r\n"
        b"3\r\nab\r\r\n2;x=y\r\ncd\r\n0\r\n\r\n",
        Answer(201, b"ab\rcd", True),
    ),
]


@pytest.mark.parametrize(("sent", "heard"), BODIES)
def test_an_answer_is_heard_whole_however_its_bytes_are_cut(sent: bytes, heard: Answer) -> None:
    for size in (1, 3, len(sent)):
        parser = Parser()
        answers = [parser.feed(sent[at : at + size]) for at in range(0, len(sent), size)]
        assert answers[:-1] == [None] * (len(answers) - 1)
        assert answers[-1] == heard
        assert parser.empty
        assert parser.feed(sent) == heard


def test_what_is_no_answer_is_an_error() -> None:
    with pytest.raises(Broken):
        Parser().feed(b"SSH-2.0-server\r\n\r\n")


def test_a_request_is_sent_again_only_where_its_connection_was_closed_while_it_rested() -> None:
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the first request of a connection, unless it asks for death, and close at the second."""
        for turn in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            requests.append(head.split(b"\r\n")[0])
            if turn or b"/dies" in head:
                break
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
        writer.close()

    async def talk() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "token")
        for _ in range(2):
            assert (await client.get("/lives")).json() == 1
        assert (client.opened, client.repeated) == (2, 1)
        with pytest.raises(Broken):
            await client.get("/dies")
        with pytest.raises(Broken):  # on a connection of its own, which never rested
            await client.get("/dies")
        client.close()
        server.close()

    asyncio.run(talk())
    lives, dies = b"GET /lives HTTP/1.1", b"GET /dies HTTP/1.1"
    assert requests == [lives, lives, lives, dies, dies, dies]


@pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.95, 95.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_percentile_is_a_value_that_was_measured(share: float, value: float) -> None:
    assert fleet.percentile([float(n) for n in range(100, 0, -1)], share) == value


def test_a_study_with_a_past_reads_as_if_it_had_run(engine: sa.Engine) -> None:
    hpo = coordinator_on(engine)
    study = past.launch(hpo, "past", "tpe")
    past.fill(engine, study, 20, reports=3, infeasible=True, ours=True)
    view = hpo.get_study(study)
    assert view.counts["complete"] == 18
    assert view.counts["infeasible"] == 2
    trials = PostgresStorage(engine).get_all_trials(study)
    assert [trial.number for trial in trials] == list(range(20))
    for trial in trials:
        assert trial.distributions == past.space()
        assert all(trial.distributions[name]._contains(value) for name, value in trial.params.items())
        assert sorted(trial.intermediate_values) == [0, 1, 2]
    assert hpo.get_trial(study, 7).attempts == 1


GOALS = {
    "ask_vs_stock": ">= 8",
    "ask_overhead_ms": "<= 5",
    "ask_overhead_growth": "<= 1.3",
    "ask_round_trips": "<= 2",
    "tell_round_trips": "<= 2",
    "report_round_trips": "<= 2",
    "ask_commits": "<= 1",
    "tell_commits": "<= 1",
    "report_commits": "<= 1",
    "ask_busy_vs_idle": "<= 1.2",
    "http_trials_vs_stock_tpe": ">= 2.5",
    "http_trials_vs_stock_random": ">= 7",
    "paced_ask_p95_ms": "<= 100",
    "fleet_report_p99_ms": "<= 250",
    "fleet_errors": "<= 0",
    "held_claims_tell_ms": "<= 100",
    "list_ms": "<= 10",
    "page_ms": "<= 10",
    "best_ms": "<= 10",
    "cold_start_s": "<= 2",
}


def test_every_figure_has_its_goal_and_one_part_that_measures_it(tmp_path: Path, capsys: Any) -> None:
    assert {name: goal for name, (_, goal) in coordinator.GOALS.items()} == GOALS
    measured = [name for _, _, names in coordinator.PARTS for name in names]
    assert sorted(measured) == sorted([*GOALS, coordinator.BEND])
    with pytest.raises(SystemExit):
        coordinator.main(["--json", str(tmp_path / "bench.json"), "--only", "ask_vs_stock", "speed"])
    assert "no figure named speed" in capsys.readouterr().err


def test_one_benchmark_that_breaks_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        name, file = command[2].removeprefix("benchmarks."), Path(command[4])
        if name == "coordinator":
            return SimpleNamespace(returncode=1)
        file.write_text(json.dumps({"figures": [{"name": f"{name}_speed", "value": 1, "unit": "", "goal": ""}]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(every.subprocess, "run", run)
    file = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as end:
        every.main(["--json", str(file)])
    assert end.value.code == 1
    document = json.loads(file.read_text())
    assert [figure["name"] for figure in document["figures"]] == ["trainer_speed", "search_speed"]
    assert set(document["parts"]) == {"trainer", "search"}
