"""A study whose history a newer Whetstone has written: named in lists, and otherwise neither read nor written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from hpo.desk import HISTORY_FORMAT
from tests.integration.api_server import BRANIN, bearer, make_app
from tests.integration.test_api_hostile import ROUTES, address

BODIES: dict[tuple[str, str], dict[str, object]] = {
    ("PATCH", "/api/v1/studies/{study}"): {"state": "paused"},
    ("PATCH", "/api/v1/studies/{study}/trials/{n}"): {"value": 1.0},
    ("POST", "/api/v1/studies/{study}/trials"): {"params": {"x": 1.0, "y": 2.0}},
    ("POST", "/api/v1/studies/{study}/ask"): {"worker": "w"},
    ("POST", "/api/v1/leases/{lease}/report"): {"token": 1},
    ("POST", "/api/v1/leases/{lease}/tell"): {"token": 1, "outcome": "complete", "value": 1.0},
    ("POST", "/api/v1/leases/{lease}/release"): {"token": 1, "reason": "shutdown"},
}
QUERIES = {"/api/v1/studies/{study}/compare": "?a=0&b=1"}
# Everything that is kept of studies and trials: not workers, who may be heard of.
STORED = (
    "public.studies",
    "public.trials",
    "public.trial_params",
    "public.trial_values",
    "public.trial_system_attributes",
    "whetstone.studies",
    "whetstone.attempts",
    "whetstone.metrics",
    "whetstone.revisions",
)


def stored(engine: sa.Engine) -> list[object]:
    with engine.connect() as conn:
        return [
            conn.execute(sa.text(f"SELECT md5(string_agg(t::text, '/' ORDER BY t::text)) FROM {table} t")).scalar()
            for table in STORED
        ]


@contextmanager
def too_old(engine: sa.Engine) -> Iterator[TestClient]:
    """A client of a server to which study 1, with a lease, was readable once."""
    with TestClient(make_app(engine), headers=bearer("admin")) as made:
        assert made.post("/api/v1/studies", json=BRANIN).json()["study"] == 1
        lease = made.post("/api/v1/claims", json={"worker": "w"}).json()
        assert (lease["lease"], lease["token"]) == (1, 1)
        with engine.begin() as conn:
            conn.execute(sa.text("UPDATE whetstone.studies SET format = :new"), {"new": HISTORY_FORMAT + 1})
        yield made


@pytest.fixture(scope="module")
def client(module_engine: sa.Engine) -> Iterator[TestClient]:
    """Such a client for the tests that change nothing."""
    with too_old(module_engine) as made:
        yield made


@pytest.mark.parametrize(("method", "path"), [each for each in ROUTES if "{study}" in each[1] or "{lease}" in each[1]])
def test_no_call_reads_or_writes_a_history_of_a_newer_format(
    client: TestClient, module_engine: sa.Engine, method: str, path: str
) -> None:
    before = stored(module_engine)
    answer = client.request(method, address(path) + QUERIES.get(path, ""), json=BODIES.get((method, path)))
    assert answer.status_code == 409, answer.text
    error = answer.json()["error"]
    assert error["code"] == "newer_format"
    assert "upgrade" in error["message"]
    assert stored(module_engine) == before


def test_a_study_of_a_newer_format_is_passed_over_by_claims(client: TestClient, module_engine: sa.Engine) -> None:
    before = stored(module_engine)
    assert client.post("/api/v1/claims", json={"worker": "w"}).status_code == 204
    assert stored(module_engine) == before


def test_lists_show_a_study_of_a_newer_format_with_what_to_do(engine: sa.Engine) -> None:
    with too_old(engine) as client:
        with engine.begin() as conn:  # its document may be of a shape that is not known here
            conn.execute(sa.text('UPDATE whetstone.studies SET spec = \'{"sampler": ["swarm"]}\''))
        made = client.post("/api/v1/studies", json=BRANIN | {"name": "readable"}).json()["study"]
        items = client.get("/api/v1/studies").json()["items"]
        page = client.get("/", headers={"Accept": "text/html"})
    assert [(item["study"], bool(item["unreadable"])) for item in items] == [(made, False), (1, True)]
    assert "upgrade" in items[1]["unreadable"]
    assert page.status_code == 200
    assert "upgrade Whetstone" in page.text
