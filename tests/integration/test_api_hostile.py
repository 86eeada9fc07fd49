"""Whatever is sent to whatever route: 4xx in the one error shape, never 500, and nothing of it comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from tests.integration.api_server import BRANIN, app_alone, bearer, make_app

JSON = {"Content-Type": "application/json"}
NESTED = 100_000
BODIES: dict[str, bytes] = {
    "NaN": b'{"token": NaN, "name": NaN, "worker": NaN, "state": NaN}',
    "Infinity": b'{"token": Infinity, "params": {"x": -Infinity}, "budget": {"hours": Infinity}}',
    "1e999": b'{"token": 1e999, "value": 1e999, "wait_s": 1e999, "seed": 1e999}',
    "lone surrogate": b'{"worker": "\\ud800", "name": "\\ud800", "notes": "\\udfff", "reason": "\\ud800"}',
    "lone surrogate in a key": b'{"\\ud800": 1, "params": {"\\udfff": 1}}',
    "NUL": b'{"worker": "a\\u0000", "name": "a\\u0000", "notes": "a\\u0000", "reason": "a\\u0000"}',
    "NUL in a key": b'{"\\u0000": 1, "params": {"\\u0000": 1}}',
    "raw NUL": b'{"worker": "\x00"}',
    "deep arrays": b"[" * NESTED + b"]" * NESTED,
    "deep objects": b'{"space":' * NESTED + b"1" + b"}" * NESTED,
    "deep inside": b'{"settings": ' + b"[" * NESTED + b"]" * NESTED + b"}",
    "900 deep": b'{"settings": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a key twice": b'{"worker": "w", "worker": "w", "name": "a", "name": "b"}',
    "huge integer": b'{"token": 99999999999999999999, "seed": 99999999999999999999, "memory_bytes": 1'
    + b"0" * 5000
    + b"}",
    "huge integer as text": b'{"token": "99999999999999999999", "outcome": "complete", "value": 1}',
    "huge integer as text, released": b'{"token": "99999999999999999999", "reason": "shutdown"}',
    "broken UTF-8": b'{"worker": "\xff\xfe"}',
    "UTF-8 surrogate": b'{"worker": "\xed\xa0\x80"}',
    "UTF-16": '{"worker": "w"}'.encode("utf-16"),
    "not JSON": b"hunter2",
    "half": b'{"worker": "hunter2',
    "an array": b"[1, 2]",
    "a text": b'"hunter2"',
    "null": b"null",
    "unknown fields": b'{"hunter2": 1, "wrker": "x"}',
    "wrong types": b'{"worker": [], "token": {}, "name": 5, "space": "x", "params": [], "state": 1, "budget": []}',
    "just over 1 MB": b'{"notes": "' + b"x" * 1_000_000 + b'"}',
}


@pytest.fixture(scope="module")
def app(module_engine: Engine) -> FastAPI:
    return make_app(module_engine)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client with a study to aim at (id 1 in a fresh database): the address is right, and only the body wrong."""
    with TestClient(app, raise_server_exceptions=True, headers=bearer("admin")) as made:
        assert made.post("/api/v1/studies", json=BRANIN).json()["study"] == 1
        assert made.post("/api/v1/studies/1/trials", json={"params": {"x": 1.0, "y": 2.0}}).status_code == 201
        lease = made.post("/api/v1/claims", json={"worker": "w"}).json()["lease"]
        assert lease == 1
        yield made


def every_route() -> list[tuple[str, str]]:
    """(method, path) of everything under /api/v1, from the app itself."""
    app = app_alone()
    found = []
    for route in iter_route_contexts(app.routes):
        if (route.path or "").startswith("/api/v1"):
            found += [(method, route.path or "") for method in sorted(route.methods or ())]
    assert len(found) >= 20
    return found


ROUTES = every_route()


def address(path: str, **values: str) -> str:
    return path.format(**({"study": "1", "n": "0", "lease": "1", "worker": "w"} | values))


def check(answer: object, secret: str = "hunter2") -> None:
    status, text = answer.status_code, answer.text  # type: ignore[attr-defined]
    assert 400 <= status < 500, f"{status} {text[:500]}"
    error = json.loads(text)["error"]
    assert set(error) == {"code", "message", "details"}
    assert secret not in text


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_body_however_bad_gets_past_or_breaks_a_route(client: TestClient, method: str, path: str) -> None:
    for name, body in BODIES.items():
        answer = client.request(method, address(path), content=body, headers=JSON)
        assert 400 <= answer.status_code < 500, f"{name}: {answer.status_code} {answer.text[:300]}"
        if name != "unknown fields":  # a key that is plain text may be named in the fault's place
            check(answer)


def fields_of(schema: Any, components: dict[str, Any]) -> set[str]:
    """Every field that a schema of the description names, whichever of its forms is meant."""
    if "$ref" in schema:
        return fields_of(components[schema["$ref"].rpartition("/")[2]], components)
    parts = [fields_of(part, components) for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    return set(schema.get("properties", ())).union(*parts)


def bodies_described() -> list[tuple[str, str, list[str]]]:
    """(method, path, fields) of every operation under /api/v1, as /openapi.json describes it."""
    described = app_alone().openapi()
    found = []
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            fields = sorted(fields_of(media.get("schema", {}), described["components"]["schemas"]))
            if path.startswith("/api/v1"):
                found.append((method.upper(), path, fields))
    assert {(method, path) for method, path, _ in found} == set(ROUTES)
    assert sum(len(fields) for _, _, fields in found) > 40
    return found


@pytest.mark.parametrize(("method", "path", "fields"), bodies_described())
def test_no_number_that_is_none_gets_past_any_field(
    client: TestClient, method: str, path: str, fields: list[str]
) -> None:
    for number in ("NaN", "-Infinity", "1e999"):
        for shape in ("%s", '{"x": {"y": [%s]}}'):
            for field in (*fields, "other"):
                body = f'{{"{field}": {shape % number}}}'.encode()
                answer = client.request(method, address(path), content=body, headers=JSON)
                assert answer.status_code == 422, f"{body!r}: {answer.status_code} {answer.text[:300]}"
                check(answer)
                assert answer.json()["error"]["details"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_body_over_the_limit_is_refused_with_and_without_a_length(client: TestClient, method: str, path: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    declared = client.request(method, address(path), content=b" " * 2_000_000, headers=JSON)
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "too_large")
    chunked = client.request(method, address(path), content=endless(), headers=JSON)
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_body_of_another_type_is_refused(client: TestClient, method: str, path: str) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = client.request(
            method, address(path), content=b'{"worker": "w"}', headers={"Content-Type": content_type}
        )
        assert answer.status_code == 415, f"{content_type}: {answer.status_code}"
        check(answer)


@pytest.mark.parametrize(("method", "path"), [each for each in ROUTES if "{" in each[1]])
def test_a_bad_address_is_refused(client: TestClient, method: str, path: str) -> None:
    bad = [
        "99999999999999999999",
        "9" * 5000,
        "-1",
        "NaN",
        "1e3",
        "%00",
        "1%00",
        "%ff",
        "%ed%a0%80",
        "hunter2!",
        "0x1",
        "%0a",
    ]
    for field in ("study", "n", "lease", "worker"):
        if "{" + field + "}" not in path:
            continue
        for value in bad:
            body = {"content": b'{"token": 1}', "headers": JSON} if method in ("POST", "PATCH") else {}
            check(client.request(method, address(path, **{field: value}), **body))  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "path"), [each for each in ROUTES if each[0] == "GET"])
def test_no_query_however_bad_breaks_a_route(client: TestClient, method: str, path: str) -> None:
    if path.endswith("/events"):
        pytest.skip("takes no query, and streams")
    names = ("state", "order", "cursor", "limit", "name", "top", "format", "part")
    values = (
        "%00",
        "%ff",
        "%ed%a0%80",
        "hunter2!",
        "-1",
        "99999999999999999999",
        "NaN",
        "1e999",
        "",
        "x" * 5000,
        "%F0%9F%9C%B2",
    )
    for name in names:
        for value in values:
            answer = client.get(f"{address(path)}?{name}={value}")
            assert answer.status_code < 500, f"{name}={value}: {answer.status_code} {answer.text[:300]}"
            if answer.status_code >= 400:
                check(answer)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/api/v1/studies", "limit=0"),
        ("/api/v1/studies", "limit=99999999999999999999"),
        ("/api/v1/studies", "state=hunter2"),
        ("/api/v1/studies", "cursor=hunter2"),
        ("/api/v1/studies", "name=%00"),
        ("/api/v1/studies", "name=%ff"),
        ("/api/v1/workers", "unknown=%0a"),
        ("/api/v1/studies/1/trials", "order=hunter2"),
        ("/api/v1/studies/1/trials", "state=hunter2"),
        ("/api/v1/studies/1/trials", "cursor=hunter2"),
        ("/api/v1/studies/1/trials", "order=value&cursor=NaN"),
        ("/api/v1/studies/1/best", "top=-1"),
        ("/api/v1/studies/1/export", "format=hunter2"),
        ("/api/v1/studies/1/trials/0/checkpoint", "part=hunter2"),
    ],
)
def test_a_bad_query_value_is_named(client: TestClient, path: str, query: str) -> None:
    answer = client.get(f"{path}?{query}")
    assert answer.status_code == 422, answer.text
    check(answer)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_an_unknown_method_has_the_error_shape(client: TestClient, method: str, path: str) -> None:
    answer = client.request("PUT", address(path))
    assert answer.status_code == 405
    check(answer)


@pytest.mark.parametrize(
    "path", ["/api/v1", "/api/v1/", "/api/v1/studies/", "/api/v2/studies", "/api/v1/studies/1/%2e%2e", "/hunter2"]
)
def test_an_unknown_address_has_the_error_shape(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    check(answer)


@pytest.mark.parametrize("key", ["x" * 201, " ", "a b", "\u00e9", "a\tb"])
@pytest.mark.parametrize(
    "path", ["/api/v1/studies", "/api/v1/studies/1/trials", "/api/v1/studies/1/ask", "/api/v1/claims"]
)
def test_an_idempotency_key_is_short_printable_ascii(client: TestClient, path: str, key: str) -> None:
    answer = client.post(path, json={"worker": "w"}, headers={"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 422
    check(answer)


@pytest.mark.parametrize("call", ["report", "tell", "release"])
@pytest.mark.parametrize("token", ["9223372036854775808", "-1", -1])
def test_a_token_that_can_be_no_leases_is_refused_before_the_database(
    client: TestClient, call: str, token: object
) -> None:
    more = {"report": {}, "tell": {"outcome": "complete", "value": 1.0}, "release": {"reason": "shutdown"}}[call]
    answer = client.post(f"/api/v1/leases/1/{call}", json={"token": token} | more)
    assert (answer.status_code, [each["at"] for each in answer.json()["error"]["details"]]) == (422, ["token"])


def test_nan_in_a_spec_is_named_beside_its_other_faults(client: TestClient) -> None:
    body = json.dumps(
        BRANIN | {"name": "other", "sampler": "anneal", "budget": {"trials": float("nan")}, "colour": "red"}
    )
    answer = client.post("/api/v1/studies", content=body, headers=JSON)
    assert answer.status_code == 422
    places = {each["at"] for each in answer.json()["error"]["details"]}
    assert {"budget.trials", "colour"} <= places
    assert any(place.startswith("sampler") for place in places)
    assert client.get("/api/v1/studies").json()["items"][0]["name"] == "branin"


def test_a_faulty_point_is_told_its_own_faults_and_not_the_studys(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client.post("/api/v1/studies", json=BRANIN | {"name": "gp", "sampler": "gp"}).json()["study"]
    monkeypatch.setattr("hpo.spec.importlib.util.find_spec", lambda name: None)  # torch is gone
    body = json.dumps({"params": {"x": float("nan")}, "value": 1.0})
    answer = client.post(f"/api/v1/studies/{made}/trials", content=body, headers=JSON)
    assert {each["at"] for each in answer.json()["error"]["details"]} == {"params.x"}
    client.delete(f"/api/v1/studies/{made}")


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer " + "x" * 10_000},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Authorization": "Basic YWRtaW46aHVudGVyMg=="},
        {"Authorization": "hunter2"},
        {"Cookie": "whetstone_session=hunter2"},
        {"Cookie": b"whetstone_session=\xff\xfe; \x01"},
        {"Cookie": "whetstone_session=" + "x" * 10_000},
    ],
)
def test_a_strange_credential_is_nobodys(app: FastAPI, client: TestClient, header: dict[str, str]) -> None:
    answer = TestClient(app).get("/api/v1/studies", headers=header)
    assert answer.status_code == 401
    check(answer)
