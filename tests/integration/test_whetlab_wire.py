"""Whetlab's protocol on the wire: addresses, methods, roles, errors, pages, and whatever else may come in."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from tests.integration.api_server import app_alone, bearer, make_app, served
from tests.integration.test_api_hostile import BODIES
from tests.integration.whetlab_script import ENUM, FLOAT, OUTCOME, WHOLE, Script, dumps

TABLE = """
GET /api/alpha/experiments viewer
POST /api/alpha/experiments admin
GET /api/alpha/experiments/{experiment} viewer
DELETE /api/alpha/experiments/{experiment} admin
POST /api/alpha/experiments/{experiment}/suggest admin
GET /api/alpha/settings viewer
POST /api/alpha/settings admin
GET /api/alpha/results viewer
POST /api/alpha/results admin
GET /api/alpha/results/{result} viewer
PATCH /api/alpha/results/{result} admin
PUT /api/alpha/results/{result} admin
DELETE /api/alpha/results/{result} admin
GET /api/alpha/variables viewer
GET /api/users viewer
"""
ROUTES = [tuple(line.split()) for line in TABLE.strip().splitlines()]
NAMES = {
    "500 characters": "x" * 500,
    "quotes": """ "double" 'single' `back` \\ """,
    "newlines": "first\nsecond\r\nthird\tend",
    "right to left": "שלום \u202eأهلا\u202c 模型",
    "a script": "<script>alert('x')</script>",
    "a template": "{{ 7 * 7 }} {% raw %} ${7*7} %s %(name)s [bold]",
    "an address": "../../etc/passwd?a=b&c#d",
    "a component": "x[1]",
}


@pytest.fixture(scope="module")
def app(module_engine: Engine) -> FastAPI:
    return make_app(module_engine)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, headers=bearer("admin")) as made:
        yield made


@pytest.fixture(scope="module")
def script(client: TestClient) -> Script:
    made = Script(client, settings=[FLOAT, WHOLE, ENUM])
    made.add({"x": 1.0, "n": 1, "kind": "one"}, 2.0)
    return made


def addressed(path: str, script: Script) -> str:
    result = next(iter(script.results()))
    return path.replace("{experiment}", str(script.id)).replace("{result}", str(result))


def test_the_routes_are_these_and_each_needs_its_role(client: TestClient, script: Script) -> None:
    served_here = {
        (method, route.path or "", route.openapi_extra["x-role"])  # type: ignore[attr-defined]
        for route in (each.route for each in iter_route_contexts(app_alone().routes))
        if getattr(route, "path", "").startswith(("/api/alpha", "/api/users"))
        for method in route.methods or ()  # type: ignore[attr-defined]
    }
    assert served_here == set(ROUTES)
    for method, path, role in ROUTES:
        for asking in ("viewer", "worker"):
            answer = client.request(method, addressed(path, script), headers=bearer(asking), content=b"[]")
            assert (answer.status_code == 403) == (role == "admin"), f"{method} {path} as {asking}"


def test_every_route_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "whetlab.md").read_text()
    for method, path, role in ROUTES:
        assert f"| `{method} {path}` | {role} |" in text


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic abc", "Bearer \N{SNOWMAN}"])
def test_a_token_that_is_empty_missing_or_wrong_is_401_in_one_sentence(app: FastAPI, token: str) -> None:
    headers = {"Authorization": token.encode()} if token else {}
    for method, path, _ in ROUTES:
        answer = TestClient(app).request(method, path.replace("{", "").replace("}", ""), headers=headers)
        assert answer.status_code == 401
        assert set(answer.json()) == {"error"}
        assert isinstance(answer.json()["error"], str)


def test_every_answer_says_what_it_is_even_an_empty_one(client: TestClient) -> None:
    made = Script(client, "short-lived")
    for method, path in (("DELETE", f"results/{made.suggest()[0]}/"), ("DELETE", f"experiments/{made.id}/")):
        answer = client.request(method, f"/api/alpha/{path}")
        assert (answer.status_code, answer.content) == (204, b"")
        assert "json" in answer.headers["content-type"]


def test_addresses_are_answered_with_and_without_their_slash_and_never_redirect(client: TestClient) -> None:
    for end in ("", "/", "//"):
        body = {"name": f"slash{end}", "settings": [FLOAT, OUTCOME]}
        made = client.post(f"/api/alpha/experiments{end}", json=body, follow_redirects=False)
        assert made.status_code == 201
        assert client.get(f"/api/alpha/experiments/{made.json()['id']}{end}", follow_redirects=False).status_code == 200
        assert client.get(f"/api/users{end}", follow_redirects=False).status_code == 200


def test_methods_in_small_letters_are_understood_by_the_real_server(engine: Engine) -> None:
    """As Lua sends them: also with a body of no announced length, which is its end of a chunked one."""
    with served(make_app(engine)) as (address, _):
        host = urlsplit(address).netloc

        def send(method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
            head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close, TE\r\nte: trailers\r\n"
            head += f"Authorization: {bearer('admin')['Authorization']}\r\n"
            head += f"content-length: {len(body)}\r\n" if body else ""
            with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=30) as wire:
                wire.sendall(head.encode() + b"\r\n" + (body or b"0\r\n\r\n"))
                answer = b""
                while part := wire.recv(65536):
                    answer += part
            top, _, rest = answer.partition(b"\r\n\r\n")
            return int(top.split()[1]), json.loads(rest or b"{}")

        status, made = send("post", "/api/alpha/experiments/", dumps({"name": "lua", "settings": [FLOAT, OUTCOME]}))
        assert status == 201
        assert send("get", f"/api/alpha/experiments/?id={made['id']}&")[1]["count"] == 1
        status, result = send("post", f"/api/alpha/experiments/{made['id']}/suggest/", b"[]")
        assert status == 201
        result["variables"][-1]["value"] = "-infinity"
        status, written = send("patch", f"/api/alpha/results/{result['id']}/", dumps({**result, "runDate": ""}))
        assert (status, written["variables"][-1]["value"]) == (200, "NaN")
        assert send("delete", f"/api/alpha/results/{result['id']}/", b"[]")[0] == 204
        kept = http.client.HTTPConnection(host, timeout=30)
        for method in ("get", "GET", "patch", "get"):  # one connection, and bodies that begin like a method
            path = f"/api/alpha/experiments/{made['id']}"
            kept.request(method, path, body=b"get / HTTP/1.1\r\n\r\n", headers=bearer("admin"))
            answer = kept.getresponse()
            assert (answer.status, bool(answer.read())) == (405 if method == "patch" else 200, True)
        kept.close()


def test_a_method_in_small_letters_is_understood_behind_a_body_that_came_late(engine: Engine) -> None:
    """A client may send its body after the answer, and the next request in one piece with it."""
    with served(make_app(engine)) as (address, _):
        host, port = urlsplit(address).hostname, urlsplit(address).port
        late = b"get / HTTP/1.1\r\n\r\n"

        def head(path: str, length: int) -> bytes:
            return f"get {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n".encode()

        def answered(heard: BinaryIO) -> bytes:
            assert heard.readline().split()[1] == b"200"
            return heard.read(int(http.client.parse_headers(heard)["content-length"]))

        with socket.create_connection((host, port), timeout=30) as wire, wire.makefile("rb") as heard:
            wire.sendall(head("/healthz", len(late)))
            first = answered(heard)
            wire.sendall(late + head("/healthz", len(late)) + late + head("/healthz", 0))
            assert [answered(heard), answered(heard)] == [first, first]
            wire.sendall(b"get ")
            time.sleep(0.1)
            wire.sendall(head("/healthz", 0).removeprefix(b"get "))
            assert answered(heard) == first


def test_what_follows_a_request_for_another_protocol_is_not_taken_for_one(engine: Engine) -> None:
    """A body behind it is no request, in small letters neither; the next piece is one again."""
    with served(make_app(engine)) as (address, _):
        host, port = urlsplit(address).hostname, urlsplit(address).port
        plain = f"get /healthz HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
        body = b"get /nowhere HTTP/1.1\r\n\r\n"
        asking = plain[:-2] + f"connection: upgrade\r\nupgrade: other\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, port), timeout=30) as wire:
            for sent in (asking + body, plain):
                wire.sendall(sent)
                answer = http.client.HTTPResponse(wire)
                answer.begin()
                assert answer.status == 200
                answer.read()


def test_pages_name_their_neighbours_and_end_with_404(client: TestClient) -> None:
    script = Script(client, "paged")
    results = [script.add({"x": float(n), "n": n}, n) for n in range(5)]
    first = client.get(f"/api/alpha/results?experiment={script.id}&page=1&page_size=2").json()
    assert ([each["id"] for each in first["results"]], first["count"]) == (results[:2], 5)
    assert first["previous"] is None
    second = client.get(first["next"]).json()
    assert [each["id"] for each in second["results"]] == results[2:4]
    third = client.get(second["next"]).json()
    assert ([each["id"] for each in third["results"]], third["next"]) == (results[4:], None)
    assert client.get(third["previous"]).json() == second
    for past in (f"results?experiment={script.id}&page_size=2&page=4", f"results?experiment={script.id}&page=2",
                 "experiments/?page=2", "experiments/?page=999999999", "experiments/?page=0", "experiments/?page=x",
                 "experiments/?page=-1", f"settings/?experiment={script.id}&page=2"):  # fmt: skip
        answer = client.get(f"/api/alpha/{past}")
        assert answer.status_code == 404, past
        assert set(answer.json()) == {"error"}
    assert len(client.get(f"/api/alpha/results?experiment={script.id}").json()["results"]) == 5
    everything = client.get(f"/api/alpha/variables?experiment={script.id}&page_size=1000000").json()
    assert everything["count"] == len(everything["results"]) == 15
    assert client.get("/api/alpha/variables").json()["count"] >= 15


def test_an_experiment_is_found_by_its_id_or_not_at_all(client: TestClient, script: Script) -> None:
    [found] = script.list(f"experiments/?id={script.id}")
    assert (found["name"], found["description"]) == ("Braninhoo", "of a script")
    assert script.list("experiments/?id=2147483647") == []
    for path in ("experiments/2147483647", "experiments/x", "results/99999999999", "results/-1", "results/1.5",
                 "settings/?experiment=2147483647", "results?experiment=2147483647", "nothing"):  # fmt: skip
        assert client.get(f"/api/alpha/{path}").status_code == 404, path
    for path in ("experiments/?id=x", "results", "settings/", "results?experiment=1e3", "experiments/?page_size=0",
                 "experiments/?page_size=x", "variables?result=%00"):  # fmt: skip
        answer = client.get(f"/api/alpha/{path}")
        assert answer.status_code == 400, path
        assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_text_are_kept_and_shown_as_they_are(client: TestClient, name: str) -> None:
    text = NAMES[name]
    settings = [FLOAT | {"name": text}, ENUM | {"name": "n" + text[:490], "options": [text, "other"]}]
    made = Script(client, text, settings)
    [found] = made.list(f"experiments/?id={made.id}")
    assert found["name"] == text
    assert list(made.settings) == [settings[0]["name"], settings[1]["name"], "Negative loss"]
    result = made.add({settings[0]["name"]: 1.0, settings[1]["name"]: text}, 1.0)
    assert made.point(made.result(result)) == {settings[0]["name"]: 1.0, settings[1]["name"]: text}
    assert set(made.suggest()[1]) == {settings[0]["name"], settings[1]["name"]}
    view = client.get(f"/api/v1/studies/{made.id}").json()
    assert view["name"] == text
    assert view["best"]["params"][settings[0]["name"]] == 1.0
    for path in ("", "?tab=trials", "?tab=analysis", "?tab=queue", "?tab=config", "/trials/0"):
        page = client.get(f"/studies/{made.id}{path}")
        assert page.status_code == 200, path
        assert "<script>alert" not in page.text
    for kind in ("json", "csv", "yaml"):
        assert client.get(f"/api/v1/studies/{made.id}/export?format={kind}").status_code == 200
    typed = text.replace("\n", "").replace("\r", "")  # as a browser's field has it
    for confirm, status in (("another", 422), (typed, 303)):
        gone = client.post(f"/studies/{made.id}/delete", data={"confirm": confirm}, follow_redirects=False)
        assert gone.status_code == status


@pytest.mark.parametrize(
    ("name", "why"),
    [("", "empty"), ("  ", "empty"), ("x" * 501, "501"), ("a\0b", "NUL"), ("a\ud800b", "surrogate"),
     ("a\x1b[31m", "control"), (None, "missing"), (5, "text"), (["x"], "text")],
)  # fmt: skip
def test_names_that_cannot_be_kept_are_refused_with_the_reason(client: TestClient, name: Any, why: str) -> None:
    for body in (
        {"name": name, "settings": [FLOAT, OUTCOME]},
        {"name": "good", "settings": [FLOAT | {"name": name}, OUTCOME]},
        {"name": "good", "settings": [FLOAT, OUTCOME | {"name": name}]},
    ):
        answer = client.post("/api/alpha/experiments/", content=json.dumps(body).encode())
        assert answer.status_code == 400
        assert why in answer.json()["error"]
    assert "good" not in [each["name"] for each in client.get("/api/alpha/experiments/").json()["results"]]


BAD_SETTINGS: dict[str, Any] = {
    "settings[0].min": [FLOAT | {"min": float("nan")}, FLOAT | {"min": 10}, FLOAT | {"min": -1e33},
                        FLOAT | {"min": "0"}, FLOAT | {"min": 0, "scale": "log"}, WHOLE | {"min": 0.5},
                        WHOLE | {"min": -(2**54)},
                        {"name": "x", "type": "float", "max": 1}, FLOAT | {"min": True}],
    "settings[0].max": [FLOAT | {"max": float("inf")}, FLOAT | {"max": 10**400}, WHOLE | {"max": 2**53 + 1}],
    "settings[0].size": [FLOAT | {"size": 0}, FLOAT | {"size": 25}, FLOAT | {"size": 1.5}, FLOAT | {"size": "2"}],
    "settings[0].type": [FLOAT | {"type": "complex"}, FLOAT | {"type": None}, FLOAT | {"type": {}}],
    "settings[0].scale": [FLOAT | {"scale": "sqrt"}, FLOAT | {"scale": 5}],
    "settings[0].options": [ENUM | {"options": ["one"]}, ENUM | {"options": ["a", "a"]}, ENUM | {"options": [1, 2]},
                            ENUM | {"options": "ab"}, ENUM | {"options": None}],
    "settings[0].options[1]": [ENUM | {"options": ["a", "b\0"]}],
    "settings[0].isOutput": [FLOAT | {"isOutput": 1}],
    "settings[0]": [5, None, []],
    "settings[1].name": [FLOAT | {"name": "Negative loss"}],
    "settings": [OUTCOME | {"name": "second"}],
}  # fmt: skip


@pytest.mark.parametrize("where", BAD_SETTINGS)
def test_a_setting_that_cannot_be_is_refused_where_it_stands(client: TestClient, where: str) -> None:
    for bad in BAD_SETTINGS[where]:
        answer = client.post("/api/alpha/experiments/", content=dumps({"name": "bad", "settings": [bad, OUTCOME]}))
        assert answer.status_code == 400, bad
        assert f"{where}: " in answer.json()["error"]
    for settings in (None, [], {}, "x", [OUTCOME], [FLOAT], [FLOAT, WHOLE], [FLOAT] * 300):
        answer = client.post("/api/alpha/experiments/", content=dumps({"name": "bad", "settings": settings}))
        assert answer.status_code == 400, settings


def test_integers_beyond_what_a_double_holds_are_refused_with_the_limit(client: TestClient) -> None:
    body = {"name": "big", "settings": [WHOLE | {"max": 2**60}, OUTCOME]}
    answer = client.post("/api/alpha/experiments/", content=dumps(body))
    assert answer.status_code == 400
    assert str(2**53) in answer.json()["error"]


X, N, KIND, LOSS = ({"name": name} for name in ("x", "n", "kind", "Negative loss"))
BAD_VARIABLES: list[Any] = [
    "x", [5], [{}], [{"name": "y", "value": 1}], [{"setting": 10**9, "value": 1}],
    [{"setting": float("nan"), "value": 1}], [X | {"value": 11}], [X | {"value": "1"}], [X | {"value": True}], [X],
    [X | {"value": [1, 2]}], [X | {"value": float("nan")}], [N | {"value": 1.5}], [KIND | {"value": "four"}],
    [KIND | {"value": 1}], [KIND | {"value": {"a": 1}}], [LOSS | {"value": "high"}], [LOSS | {"value": True}],
    [LOSS | {"value": {}}], [LOSS | {"value": 1}, LOSS | {"value": 2}],
]  # fmt: skip


def test_variables_that_do_not_fit_are_refused_and_change_nothing(client: TestClient, script: Script) -> None:
    before = script.results()
    result = next(iter(before))
    for variables in BAD_VARIABLES:
        for method, path in (("POST", "results/"), ("PATCH", f"results/{result}/")):
            body = {"variables": variables, "experiment": script.id, "userProposed": True, "description": ""}
            answer = client.request(method, f"/api/alpha/{path}", content=dumps(body))
            assert answer.status_code == 400, (method, variables)
            assert "variables" in answer.json()["error"]
    swapped = [{"name": "x", "setting": script.settings["n"]["id"], "value": 1}]
    answer = client.patch(f"/api/alpha/results/{result}/", json={"variables": swapped})
    assert answer.status_code == 400
    assert script.results() == before


@pytest.mark.parametrize("kind", BODIES)
def test_whatever_is_sent_is_answered_in_one_sentence_and_never_with_500(
    client: TestClient, script: Script, kind: str
) -> None:
    for method, path, _ in ROUTES:
        if method == "DELETE":
            continue
        answer = client.request(method, addressed(path, script), content=BODIES[kind])
        assert answer.status_code < 500, f"{method} {path}"
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}
            assert isinstance(answer.json()["error"], str)
            assert "hunter2" not in answer.text
