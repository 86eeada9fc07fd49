"""The description at /openapi.json is complete, and what it shows as examples works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from hpo import protocol
from tests.integration.api_server import app_alone, bearer, make_app

TABLE = """
POST /studies admin
GET /studies viewer
GET /studies/{study} viewer
PATCH /studies/{study} admin
DELETE /studies/{study} admin
GET /studies/{study}/trials viewer
GET /studies/{study}/trials/{n} viewer
PATCH /studies/{study}/trials/{n} admin
POST /studies/{study}/trials admin
POST /studies/{study}/trials/{n}/cancel admin
POST /studies/{study}/trials/{n}/requeue admin
GET /studies/{study}/trials/{n}/answers viewer
GET /studies/{study}/compare viewer
GET /studies/{study}/best viewer
GET /studies/{study}/progress viewer
GET /studies/{study}/events viewer
GET /studies/{study}/export viewer
GET /studies/{study}/trials/{n}/checkpoint viewer
POST /studies/{study}/ask worker
GET /presets viewer
POST /claims worker
POST /leases/{lease}/report worker
POST /leases/{lease}/tell worker
POST /leases/{lease}/release worker
GET /workers viewer
POST /workers worker
POST /workers/{worker}/leave worker
POST /workers/{worker}/drain admin
POST /login-links admin
"""
ROUTES = [tuple(line.split()) for line in TABLE.strip().splitlines()]


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    client = TestClient(app_alone())
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()  # type: ignore[no-any-return]


def operations(described: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path.removeprefix("/api/v1")): operation
        for path, methods in described["paths"].items()
        if path.startswith("/api/v1")
        for method, operation in methods.items()
    }


def test_every_route_of_the_table_is_described_with_its_role_and_no_other_exists(described: dict[str, Any]) -> None:
    found = {(method, path, each["x-role"]) for (method, path), each in operations(described).items()}
    assert found == {tuple(route) for route in ROUTES}
    served = {
        (method, (route.path or "").removeprefix("/api/v1"))
        for route in iter_route_contexts(app_alone().routes)
        if (route.path or "").startswith("/api/v1")
        for method in route.methods or ()
    }
    assert served == {(method, path) for method, path, _ in ROUTES}
    assert {"/healthz", "/readyz", "/metrics"} <= set(described["paths"])


def test_every_operation_documents_its_failures_in_the_one_shape(described: dict[str, Any]) -> None:
    for (method, path), operation in operations(described).items():
        responses = operation["responses"]
        expected = {"401", "403", "422", "503"}
        if "{" in path:
            expected.add("404")
        if "requestBody" in operation:
            expected |= {"400", "413", "415"}
        assert expected <= set(responses), f"{method} {path} lacks {expected - set(responses)}"
        for status in set(responses) - {"200", "201", "204"}:
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}
        assert operation["security"] == [{"bearer": []}]


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    names = set(re.findall(r"'#/components/schemas/([^']+)'", str(described)))
    assert names <= set(described["components"]["schemas"])
    assert {"StudyForm", "ChangeForm", "TrialForm", "StudyView", "Lease"} <= names


def test_every_body_has_examples_that_pass_their_own_model(described: dict[str, Any]) -> None:
    checked = 0
    for (method, path), operation in operations(described).items():
        if "requestBody" not in operation:
            continue
        media = operation["requestBody"]["content"]["application/json"]
        if "examples" in media:  # these are launched for real below
            assert media["examples"], f"{method} {path} has no example"
            continue
        name = media["schema"]["$ref"].rpartition("/")[2]
        examples = media["schema"].get("examples") or described["components"]["schemas"][name].get("examples")
        assert examples, f"{method} {path} has no example"
        for example in examples:
            getattr(protocol, name).model_validate(example)
            checked += 1
    assert checked >= 6


def test_the_examples_of_documents_can_be_sent_as_they_stand(described: dict[str, Any], engine: Engine) -> None:
    found = operations(described)

    def examples(method: str, path: str) -> dict[str, Any]:
        body = found[method, path]["requestBody"]["content"]["application/json"]
        return {name: each["value"] for name, each in body["examples"].items()}

    app = make_app(engine)
    app.state.presets = {examples("POST", "/studies")["preset"]["preset"]: examples("POST", "/studies")["whole"]}
    with TestClient(app, headers=bearer("admin")) as client:
        for example in examples("POST", "/studies").values():
            assert client.post("/api/v1/studies", json=example).status_code == 201
        for example in examples("POST", "/studies/{study}/trials").values():
            assert client.post("/api/v1/studies/1/trials", json=example).status_code == 201
        for example in examples("PATCH", "/studies/{study}").values():
            assert client.patch("/api/v1/studies/1", json=example).status_code == 200


def test_the_presets_example_names_a_preset_that_is_shipped(described: dict[str, Any]) -> None:
    body = operations(described)["POST", "/studies"]["requestBody"]["content"]["application/json"]
    name = body["examples"]["preset"]["value"]["preset"]
    assert (Path(__file__).parents[2] / "presets" / f"{name}.yaml").is_file()
