"""One error shape, whatever goes wrong, and nothing of the caller's input or of our insides in it."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import pytest
from fastapi import FastAPI, Query
from fastapi.testclient import TestClient
from pydantic import AfterValidator
from sqlalchemy import exc
from starlette.requests import Request
from starlette.responses import HTMLResponse

from api import errors
from hpo import errors as domain
from hpo.errors import Fault, Invalid, WhetstoneError
from hpo.protocol import TellRequest


def subclasses(kind: type[WhetstoneError]) -> set[type[WhetstoneError]]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


def _never(value: str) -> str:
    raise ValueError(f"{value} is not it")


@pytest.fixture
def client() -> TestClient:
    app = FastAPI(openapi_url=None)
    errors.install(app)

    @app.get("/api/raise/{name}")
    def fail(name: str) -> None:
        if name == "Invalid":
            raise Invalid([Fault("space[2].high", "lies below low")])
        if name == "KeyError":
            raise KeyError("a secret detail")
        if name == "Gone":
            raise exc.OperationalError(
                "SELECT :secret", {"secret": "hunter2"}, Exception("server closed the connection")
            )
        if name == "Busy":
            raise exc.TimeoutError("QueuePool limit reached")
        if name == "Bug":
            raise exc.ProgrammingError("SELECT nonsense", {"secret": "hunter2"}, Exception("hunter2"))
        if name == "Range":
            raise exc.DataError("SELECT :x", {"x": 2**70}, Exception("bigint out of range"))
        raise getattr(domain, name)("the remedy is this")

    @app.post("/api/tell")
    def tell(body: TellRequest) -> None:
        return None

    @app.get("/api/query")
    def query(n: int, name: Annotated[str, Query(max_length=3), AfterValidator(_never)] = "x") -> None:
        return None

    return TestClient(app, raise_server_exceptions=True)


def test_every_domain_error_has_its_status() -> None:
    for kind in subclasses(WhetstoneError):
        error = kind([Fault("a", "b")]) if issubclass(kind, Invalid) else kind()  # type: ignore[call-arg]
        assert 400 <= errors.status_of(error) < 600
    named = {each for each in vars(domain).values() if isinstance(each, type) and issubclass(each, WhetstoneError)}
    assert named <= set(errors.STATUS), "a domain error without a line in the table"


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("Unauthenticated", 401, "unauthenticated"),
        ("Forbidden", 403, "forbidden"),
        ("NotFound", 404, "not_found"),
        ("Conflict", 409, "conflict"),
        ("LeaseLost", 409, "lost"),
        ("Told", 409, "told"),
        ("Invalid", 422, "invalid"),
        ("KeyReused", 422, "idempotency_key_reused"),
        ("DatabaseUnavailable", 503, "database_unavailable"),
        ("Gone", 503, "database_unavailable"),
        ("Busy", 503, "database_unavailable"),
        ("Range", 422, "invalid"),
    ],
)
def test_an_error_has_one_shape(client: TestClient, name: str, status: int, code: str) -> None:
    answer = client.get(f"/api/raise/{name}")
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message", "details"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert "hunter2" not in answer.text


def test_faults_keep_their_places(client: TestClient) -> None:
    details = client.get("/api/raise/Invalid").json()["error"]["details"]
    assert details == [{"at": "space[2].high", "fault": "lies below low"}]


def test_a_thousand_faults_are_cut_and_counted() -> None:
    details = errors.shape("invalid", "many", [Fault(f"x[{n}]", "bad") for n in range(1000)])["error"]["details"]
    assert len(details) == 101
    assert details[-1]["fault"] == "and 900 more"


@pytest.mark.parametrize("name", ["KeyError", "Bug"])
def test_our_own_fault_is_a_bland_500_with_an_id_that_leads_to_the_log(
    client: TestClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="whetstone.api"):
        answer = client.get(f"/api/raise/{name}?once=hunter2")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    assert "hunter2" not in answer.text
    number = answer.json()["error"]["message"].split()[-1]
    [record] = [each for each in caplog.records if number in each.getMessage()]
    assert record.exc_info is not None
    assert "once" not in record.getMessage()


def test_unknown_addresses_and_methods_have_the_same_shape(client: TestClient) -> None:
    missing = client.get("/api/nothing-here-hunter2")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "hunter2" not in missing.text
    wrong = client.delete("/api/tell")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [
        '{"token": 1, "outcome": "hunter2", "value": "hunter2", "hunter2!\\n": "hunter2"}',
        '{"token": NaN, "outcome": 1e999, "reason": "\\ud800"}',
        '{"token": "\\ud800\\u0000", "value": Infinity, "\\ud800": 1}',
        "[]",
        '"hunter2"',
    ],
)
def test_a_validation_error_names_places_and_never_echoes_the_input(client: TestClient, body: str) -> None:
    answer = client.post("/api/tell", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["details"]
    assert "hunter2" not in answer.text
    assert "input" not in json.dumps(answer.json()["error"]["details"]).lower().replace("input should", "")


def test_a_validators_free_text_is_not_passed_on(client: TestClient) -> None:
    answer = client.get("/api/query", params={"n": "hunter2", "name": "hun"})
    assert answer.status_code == 422
    assert {each["at"] for each in answer.json()["error"]["details"]} == {"n", "name"}
    assert "hun" not in answer.text.replace("unable", "")


def test_a_person_sees_the_error_page_and_a_machine_does_not() -> None:
    app = FastAPI()
    errors.install(app)
    app.state.error_page = lambda request, status, code, message, faults: HTMLResponse(f"<h1>{code}</h1>", status)
    client = TestClient(app)
    html = {"accept": "text/html,*/*"}
    assert client.get("/nowhere", headers=html).text == "<h1>not_found</h1>"
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert client.get("/api/v1/nowhere", headers=html).json()["error"]["code"] == "not_found"


def test_a_broken_error_page_does_not_hide_the_error() -> None:
    def broken(request: Request, *_: object) -> HTMLResponse:
        raise RuntimeError("the template is missing")

    app = FastAPI()
    errors.install(app)
    app.state.error_page = broken
    answer = TestClient(app).get("/nowhere", headers={"accept": "text/html"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
