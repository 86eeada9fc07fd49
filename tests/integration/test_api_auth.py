"""Who may do what: 401 for strangers, 403 for a role too low, and no secret in any log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from api import auth
from hpo import database, tokens
from tests.integration.api_server import BRANIN, SECRETS, app_alone, bearer, make_app, served

SAME = {"Sec-Fetch-Site": "same-origin"}
RANK = ["viewer", "worker", "admin"]


def routes_and_roles() -> list[tuple[str, str, str]]:
    app = app_alone()
    return [
        (method, route.path or "", (route.openapi_extra or {})["x-role"])
        for route in iter_route_contexts(app.routes)
        if (route.path or "").startswith("/api/v1")
        for method in sorted(route.methods or ())
    ]


ROUTES = routes_and_roles()


@pytest.fixture(scope="module")
def app(module_engine: Engine) -> FastAPI:
    return make_app(module_engine)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as made:
        yield made


class Clock:
    """The clock that `api.auth` goes by: it stands still until it is put forward."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(auth, "time", made)
    return made


def send(client: TestClient, method: str, path: str, headers: dict[str, str]) -> Response:
    address = path.format(study=999, n=0, lease=999, worker="w")
    return client.request(method, address, headers=headers)  # type: ignore[return-value]


@pytest.mark.parametrize(("method", "path", "role"), ROUTES)
def test_a_stranger_is_told_how_to_authenticate(client: TestClient, method: str, path: str, role: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wst_nobody"}, {"Cookie": f"{auth.COOKIE}=wss_nobody", **SAME}):
        answer = send(client, method, path, headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "unauthenticated"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "path", "role"), ROUTES)
def test_each_role_reaches_as_far_as_it_says_and_no_further(
    client: TestClient, method: str, path: str, role: str
) -> None:
    for who in RANK:
        answer = send(client, method, path, bearer(who))
        if RANK.index(who) < RANK.index(role):
            assert answer.status_code == 403
            message = answer.json()["error"]["message"]  # type: ignore[attr-defined]
            assert role in message
            assert who in message
        else:
            assert answer.status_code not in (401, 403)


def test_who_may_do_what_is_as_designed() -> None:
    by_role = {role: {f"{m} {p.removeprefix('/api/v1')}" for m, p, r in ROUTES if r == role} for role in RANK}
    assert by_role["worker"] == {
        "POST /claims", "POST /workers", "POST /studies/{study}/ask",
        "POST /leases/{lease}/report", "POST /leases/{lease}/tell", "POST /leases/{lease}/release",
        "POST /workers/{worker}/leave",
    }  # fmt: skip
    assert by_role["admin"] == {
        "POST /studies", "PATCH /studies/{study}", "DELETE /studies/{study}", "POST /studies/{study}/trials",
        "PATCH /studies/{study}/trials/{n}",
        "POST /studies/{study}/trials/{n}/cancel", "POST /studies/{study}/trials/{n}/requeue",
        "POST /workers/{worker}/drain", "POST /login-links",
    }  # fmt: skip
    assert all(each.startswith("GET ") for each in by_role["viewer"])


def test_authentication_comes_before_the_body_is_judged(client: TestClient) -> None:
    answer = client.post("/api/v1/studies", content=b"not json", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 401


def test_a_stored_token_works_until_it_is_revoked(client: TestClient, module_engine: Engine) -> None:
    token, secret = tokens.create(module_engine, "reader", "viewer")
    headers = {"Authorization": f"Bearer {secret}"}
    assert client.get("/api/v1/studies", headers=headers).status_code == 200
    assert client.get("/api/v1/studies", headers={"Authorization": f"bearer  {secret}"}).status_code == 200
    assert client.post("/api/v1/studies", json=BRANIN, headers=headers).status_code == 403
    tokens.revoke(module_engine, token)
    until = time.monotonic() + 60  # the news of it comes through the database
    while (status := client.get("/api/v1/studies", headers=headers).status_code) == 200 and time.monotonic() < until:
        time.sleep(0.02)
    assert status == 401


def asked(http: httpx2.Client, secret: str) -> int:
    return http.get("/api/v1/studies", headers={"Authorization": f"Bearer {secret}"}).status_code


def test_a_token_revoked_elsewhere_is_refused_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "KEPT_S", 600.0)
    number, secret = tokens.create(engine, "ci", "viewer")
    app = make_app(engine)
    with served(app) as (url, _), httpx2.Client(base_url=url, timeout=60) as http:
        assert app.state.waiting._listener.wait_until_connected(60)
        assert asked(http, secret) == 200
        elsewhere = database.connect(engine.url.render_as_string(hide_password=False))
        tokens.revoke(elsewhere, number)
        elsewhere.dispose()
        until = time.monotonic() + 60
        while asked(http, secret) == 200:
            assert time.monotonic() < until, "it was still accepted"
            time.sleep(0.02)


def test_a_revocation_that_nobody_heard_counts_after_two_seconds(engine: Engine, clock: Clock) -> None:
    _, secret = tokens.create(engine, "ci", "viewer")
    _, other = tokens.create(engine, "ci", "viewer", datetime.now(UTC) + timedelta(seconds=600))
    who = auth.Auth(engine, {})
    for each in (secret, other):
        assert who.bearer(each) is not None
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE whetstone.tokens SET revoked_at = now(), expires_at = now()"))
    clock.now += 1.9
    assert who.bearer(secret) is not None, "it is not looked up each time"
    clock.now += 0.2
    assert who.bearer(secret) is None
    assert who.bearer(other) is None


def test_a_token_is_not_kept_beyond_its_time(engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "KEPT_S", 6000.0)
    _, secret = tokens.create(engine, "ci", "viewer", datetime.now(UTC) + timedelta(seconds=600))
    who = auth.Auth(engine, {})
    assert who.bearer(secret) is not None
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE whetstone.tokens SET expires_at = now()"))
    clock.now += 300
    assert who.bearer(secret) is not None, "it is not looked up each time"
    clock.now += 300
    assert who.bearer(secret) is None


def test_a_token_that_was_revoked_while_it_was_looked_up_is_not_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = tokens.create(engine, "ci", "viewer")
    who = auth.Auth(engine, {})
    look_up = tokens.look_up

    def slow(engine: Engine, secret: str) -> tokens.Valid | None:
        found = look_up(engine, secret)
        who.forget()
        return found

    monkeypatch.setattr(tokens, "look_up", slow)
    assert who.bearer(secret) is not None
    assert who._kept.get(tokens.digest(secret)) is None


def test_a_cookie_reads_and_changes_nothing(client: TestClient, app: FastAPI) -> None:
    session = app.state.auth.sign_in(SECRETS["admin"])
    cookie = {"Cookie": f"{auth.COOKIE}={session}", "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/v1/studies", headers=cookie).status_code == 200
    refused = client.post("/api/v1/studies", json=BRANIN | {"name": "by cookie"}, headers=cookie)
    assert refused.status_code == 401
    assert "Bearer" in refused.json()["error"]["message"]
    names = {each["name"] for each in client.get("/api/v1/studies", headers=cookie).json()["items"]}
    assert "by cookie" not in names


def test_a_wrong_bearer_token_is_not_rescued_by_a_cookie(client: TestClient, app: FastAPI) -> None:
    session = app.state.auth.sign_in(SECRETS["admin"])
    headers = {"Cookie": f"{auth.COOKIE}={session}", "Authorization": "Bearer wst_wrong"}
    assert client.get("/api/v1/studies", headers=headers).status_code == 401


def test_a_session_has_its_tokens_role_and_ends_with_it(
    client: TestClient, app: FastAPI, module_engine: Engine
) -> None:
    token, secret = tokens.create(module_engine, "reader", "viewer")
    session = app.state.auth.sign_in(secret)
    request = Request({"type": "http", "headers": [(b"cookie", f"{auth.COOKIE}={session}".encode())], "app": app})
    principal = auth.principal_of(request)
    assert principal is not None
    assert principal.role == "viewer"
    tokens.revoke(module_engine, token)
    assert auth.principal_of(request) is None


def test_signing_out_ends_the_session(app: FastAPI) -> None:
    session = app.state.auth.sign_in(SECRETS["worker"])
    assert app.state.auth.cookie(session).role == "worker"
    app.state.auth.sign_out(session)
    assert app.state.auth.cookie(session) is None


def test_an_unknown_token_opens_no_session(app: FastAPI) -> None:
    assert app.state.auth.sign_in("wst_nobody") is None
    assert app.state.auth.sign_in("") is None


def test_the_one_time_link_opens_one_admin_session(module_engine: Engine) -> None:
    link = auth.OneTimeLink()
    made = make_app(module_engine, one_time=link).state.auth
    assert made.sign_in_once("a wrong guess \udcff") is None
    session = made.sign_in_once(link.secret)
    assert made.cookie(session).role == "admin"
    assert made.sign_in_once(link.secret) is None


def opened(app: FastAPI, path: str) -> tuple[int, TestClient]:
    """Open a link in a browser of its own; return the answer's status, and the browser."""
    browser = TestClient(app, follow_redirects=False, headers=SAME | {"accept": "text/html"})
    return browser.get(path).status_code, browser


def test_a_link_that_an_admin_made_opens_once_and_only_in_its_time(
    client: TestClient, app: FastAPI, clock: Clock
) -> None:
    made = client.post("/api/v1/login-links", headers=bearer("admin"))
    assert (made.status_code, made.json()["lifetime_s"]) == (201, 600)
    status, browser = opened(app, made.json()["path"])
    assert status == 303
    assert browser.get("/studies/new").status_code == 200, "an admin's page"
    assert opened(app, made.json()["path"])[0] == 401
    late = client.post("/api/v1/login-links", headers=bearer("admin")).json()["path"]
    clock.now += 601
    assert opened(app, late)[0] == 401


def test_a_session_ends_with_the_token_that_made_its_link(
    client: TestClient, app: FastAPI, module_engine: Engine
) -> None:
    token, secret = tokens.create(module_engine, "leaving", "admin")
    paths = [
        client.post("/api/v1/login-links", headers={"Authorization": f"Bearer {secret}"}).json()["path"]
        for _ in range(2)
    ]
    status, browser = opened(app, paths[0])
    assert (status, browser.get("/").status_code) == (303, 200)
    tokens.revoke(module_engine, token)
    assert browser.get("/").status_code == 303, "sent to sign in"
    assert opened(app, paths[1])[1].get("/").status_code == 303, "and a link that lay about opens nothing"


def test_a_session_ends_with_the_servers_own_token_that_opened_it(module_engine: Engine) -> None:
    before = make_app(module_engine, one_time=auth.OneTimeLink()).state.auth
    me = before.bearer(SECRETS["admin"])
    assert me is not None
    sessions = [before.sign_in(SECRETS["admin"]), before.sign_in_once(before.add_link(me).secret)]
    own = before.sign_in_once(before._links[0].secret)
    restarted = make_app(module_engine).state.auth
    assert [restarted.cookie(session).role for session in sessions] == ["admin", "admin"], "it has the same token"
    rotated = auth.Auth(module_engine, {})
    assert [rotated.cookie(session) for session in sessions] == [None, None]
    assert rotated.cookie(own).role == "admin", "the link that serve prints hangs on no token"


def test_a_one_time_link_that_was_left_lying_is_dead() -> None:
    assert not (link := auth.OneTimeLink(lifetime_s=-1.0)).redeem(link.secret)


@pytest.mark.parametrize(("scheme", "secure"), [("http", False), ("https", True)])
def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(scheme: str, secure: bool) -> None:
    request = Request({"type": "http", "scheme": scheme, "path": "/", "headers": [], "server": ("localhost", 80)})
    response = Response()
    auth.set_session(request, response, "wss_secret")
    parts = {part.strip().lower() for part in response.headers["set-cookie"].split(";")}
    assert {"httponly", "samesite=strict", "path=/"} <= parts
    assert ("secure" in parts) is secure


def test_no_log_line_holds_a_secret(module_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    link = auth.OneTimeLink()
    app = make_app(module_engine, one_time=link)
    with caplog.at_level(logging.DEBUG), served(app) as (url, _), httpx2.Client(base_url=url, timeout=60) as client:
        client.get(link.path)
        client.get(f"/nowhere?{auth.ONE_TIME_QUERY}={link.secret}")
        client.get("/api/v1/studies", headers=bearer("admin"))
        client.get("/api/v1/studies", headers={"Authorization": "Bearer wst_a-wrong-one"})
        client.post("/api/v1/studies", content=b"{", headers=bearer("admin") | {"Content-Type": "application/json"})
    ours = [each.getMessage() for each in caplog.records if not each.name.startswith(("httpx", "httpcore"))]
    assert any("GET /nowhere" in line for line in ours), "the access log was not seen at all"
    for secret in (link.secret, SECRETS["admin"], "wst_a-wrong-one"):
        assert not [line for line in ours if secret in line]
