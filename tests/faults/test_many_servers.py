"""Several API processes on one database agree, whatever many clients ask of each of them at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from hpo.rest import ApiError, Client
from tests.conftest import _made, _named
from tests.faults.books import Books, evaluating
from tests.faults.outage import external
from tests.faults.schedule_checks import Auditor
from tests.faults.service import ADMIN, Service, service

SERVERS, CLIENTS = 3, 12
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("many servers")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, postgres_server: str, _template: str) -> Iterator[list[Service]]:
    """API processes on one database of this module's own."""
    with _made(postgres_server, _template) as name, ExitStack() as stack:
        url = _named(postgres_server, name)
        yield [
            stack.enter_context(service(tmp_path_factory.mktemp(f"home{number}"), url, term_s=60.0))
            for number in range(SERVERS)
        ]


@pytest.fixture
def auditor(servers: list[Service]) -> Iterator[Auditor]:
    made = Auditor(servers[0].database_url.replace("+psycopg2", ""))
    yield made
    made.close()


def launch(server: Service, document: dict[str, Any]) -> int:
    with server.client() as client:
        return int(client.post("/api/v1/studies", json=document)["study"])


def test_servers_agree_on_numbers_budgets_suggestions_the_queue_and_a_pause(
    servers: list[Service], auditor: Auditor
) -> None:
    points = [{"x": place / 40, "y": 0.5} for place in range(12)]
    budgets = {
        launch(servers[0], external("random", 60)): 60,
        launch(servers[1], external("tpe", 40, sampler="tpe", concurrency=5)): 40,
        launch(servers[2], external("queued", 20, points=points)): 20,
    }
    auditor.studies = list(budgets)
    urls = [server.url for server in servers]
    for number, budget in budgets.items():
        books = Books()
        most = Counter[int]()
        with evaluating(books, urls, ADMIN, number, CLIENTS, work_s=0.02), _watching(auditor, number, most):
            pass
        assert books.compare(auditor) == []
        assert books.lost == []
        trials = [lease["trial"] for lease in books.leases]
        assert sorted(trials) == list(range(budget)), "no number twice, none left out, and the budget to the last trial"
        given = Counter(tuple(sorted(lease["params"].items())) for lease in books.leases)
        assert max(given.values()) == 1, "no suggestion was handed out twice"
        for server in servers:
            with server.client() as client:
                view = client.get(f"/api/v1/studies/{number}")
            assert (view["state"], view["budget"]["trials_used"]) == ("finished", budget)
            assert view["counts"]["complete"] == budget
        if number == auditor.studies[1]:
            assert most[number] <= 5, "the concurrency is of the study, not of a server"
        if number == auditor.studies[2]:
            queued = [lease for lease in books.leases if lease["trial"] < len(points)]
            assert [lease["params"] for lease in sorted(queued, key=lambda lease: lease["trial"])] == points


def test_a_study_paused_at_one_server_is_paused_at_all(servers: list[Service]) -> None:
    number = launch(servers[0], external("paused", 1000))
    books = Books()
    stop = threading.Event()

    def keep_asking(place: int) -> None:
        with Client(servers[place % SERVERS].url, ADMIN) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    lease = client.once("POST", f"/api/v1/studies/{number}/ask", json={"worker": f"e{place}"})
                except ApiError as error:
                    if error.status != 409:
                        books.faults.append(str(error))
                    continue
                books.leases.append({**lease, "began": began})
                told = {"token": lease["token"], "outcome": "complete", "value": 0.5}
                client.once("POST", f"/api/v1/leases/{lease['lease']}/tell", json=told)

    threads = [threading.Thread(target=keep_asking, args=(place,)) for place in range(CLIENTS // 2)]
    for thread in threads:
        thread.start()
    try:
        with ExitStack() as stack:
            steer = [stack.enter_context(server.client()) for server in servers]
            for turn in range(6):
                before = len(books.leases)
                servers[0].until(lambda before=before: len(books.leases) > before + 3, "nothing is leased")
                steer[turn % SERVERS].patch(f"/api/v1/studies/{number}", json={"state": "paused"})
                paused = time.monotonic()
                time.sleep(0.15)
                late = [lease["trial"] for lease in list(books.leases) if lease["began"] > paused]
                assert late == [], "asked for after the pause was acknowledged"
                steer[(turn + 1) % SERVERS].patch(f"/api/v1/studies/{number}", json={"state": "running"})
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert books.faults == []


class _watching:
    """Look at how many leases of a study are live, again and again, until the block ends."""

    def __init__(self, auditor: Auditor, number: int, most: Counter[int]) -> None:
        self._auditor, self._number, self._most = auditor, number, most
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            ((live,),) = self._auditor.rows(
                "SELECT count(*) FROM whetstone.attempts WHERE study_id = %(one)s AND state = 'leased'",
                one=self._number,
            )
            self._most[self._number] = max(self._most[self._number], live)
