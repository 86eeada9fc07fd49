"""Who gets in, how, and that no other site can act in somebody's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.auth import COOKIE, OneTimeLink
from api.pages.access import local_path
from hpo import tokens
from hpo.coordinator import Coordinator
from tests.integration.pages.app import EXTERNAL, PRESETS, SECRETS, browser, make_app, sign_in

HOST = "http://testserver"


@pytest.fixture
def link() -> OneTimeLink:
    return OneTimeLink()


@pytest.fixture
def app(engine: sa.Engine, tmp_path: Path, link: OneTimeLink) -> FastAPI:
    return make_app(engine, tmp_path, link)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with browser(app) as made:
        yield made


# Getting in


def test_the_one_time_link_signs_in_once_and_leaves_the_address(
    client: TestClient, app: FastAPI, link: OneTimeLink
) -> None:
    answer = client.get(link.path)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert link.secret not in cookie
    assert answer.headers["cache-control"] == "no-store"
    assert "admin" in client.get("/").text
    assert client.get(link.path).headers["location"] == "/", "a second click in the same browser does no harm"
    with browser(app) as stranger:
        again = stranger.get(link.path)
        assert again.status_code == 401
        assert "has been used" in again.text
        assert COOKIE not in stranger.cookies


@pytest.mark.parametrize("guess", ["", "x", "é", "a" * 500, "%00"])
def test_a_wrong_link_opens_nothing_and_does_not_use_up_the_right_one(
    client: TestClient, link: OneTimeLink, guess: str
) -> None:
    assert client.get(f"/login?once={guess}").status_code in (401, 422)
    assert client.get(link.path).status_code == 303


def test_a_cookie_is_secure_where_the_page_is(app: FastAPI) -> None:
    with TestClient(app, base_url="https://testserver", follow_redirects=False) as client:
        answer = client.post("/login", data={"token": SECRETS["viewer"]}, headers={"sec-fetch-site": "same-origin"})
        assert "secure" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize("token", ["", "x", "wst_" + "a" * 43, "é", "\ud7ff", "a" * 900, "a\r\nb", "' or 1=1 --"])
def test_a_wrong_token_is_refused(client: TestClient, token: str) -> None:
    answer = client.post("/login", data={"token": token})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    if len(token) > 8:
        assert token not in answer.text, "what was typed, perhaps a real secret with a slip, is not repeated"


@pytest.mark.parametrize(
    "path", ["/", "/studies/new", "/studies/1", "/studies/1/trials", "/studies/1/trials/0", "/workers",
             "/studies/1/progress.json", "/studies/1/trials/0/curve.json", "/studies/1/config"],
)  # fmt: skip
def test_a_stranger_is_sent_to_sign_in_and_learns_nothing(client: TestClient, hpo: Coordinator, path: str) -> None:
    hpo.create_study(EXTERNAL)
    answer = client.get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
    assert "mine" not in answer.text
    shown = client.get(answer.headers["location"])
    assert shown.status_code == 200
    assert "mine" not in shown.text


def test_after_signing_in_one_lands_where_one_wanted(client: TestClient) -> None:
    sent = client.get("/studies/3/trials?state=failed&order=value").headers["location"]
    page = client.get(sent).text
    assert 'name="next" value="/studies/3/trials?state=failed&amp;order=value"' in page
    answer = client.post(
        "/login", data={"token": SECRETS["viewer"], "next": "/studies/3/trials?state=failed&order=value"}
    )
    assert answer.headers["location"] == "/studies/3/trials?state=failed&order=value"


ELSEWHERE = [
    "https://evil.example/",
    "//evil.example/",
    "///evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "/%5Cevil.example",
    "/\t/evil.example",
    "\t//evil.example",
    "/\n/evil.example",
    " //evil.example",
    "javascript:alert(1)",
    "http:evil.example",
    "evil.example",
    "/login?next=/login",
    "/é",
    "/" + "a" * 1500,
    "//[",
    "",
]


@pytest.mark.parametrize("target", ELSEWHERE)
def test_signing_in_never_leads_to_another_site(client: TestClient, target: str) -> None:
    assert local_path(target) == "/"
    answer = client.post("/login", data={"token": SECRETS["viewer"], "next": target})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    answer = client.get("/login", params={"next": target})  # signed in already
    if answer.status_code != 422:  # control characters in an address
        assert answer.headers["location"] == "/"


def test_a_link_on_another_site_finds_the_reader_signed_in(client: TestClient) -> None:
    """The browser leaves a SameSite=Strict cookie out there; the page that it gets asks again from here."""
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    answer = client.get("/workers", headers=headers)
    assert answer.status_code == 200
    assert 'http-equiv="refresh" content="0"' in answer.text
    assert client.get("/workers").status_code == 303, "and a stranger is sent to sign in then"


# Other sites


SENT_BY_OTHERS = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
    {"sec-fetch-site": ""},
    {"sec-fetch-site": "cross-site", "origin": HOST},
    {"origin": "https://evil.example"},
    {"origin": "http://testserver.evil.example"},
    {"origin": "http://evil.testserver"},
    {"origin": "http://testserver:8080"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://[", "host": "["},
    {"origin": "http://:80"},
    {},
    {"authorization": "Basic YTpi", "sec-fetch-site": "cross-site"},
    {"referer": f"{HOST}/studies"},
]
SENT_BY_US = [{"sec-fetch-site": "same-origin"}, {"origin": HOST}, {"origin": "http://testserver:80"}]


@pytest.mark.parametrize("headers", SENT_BY_OTHERS, ids=str)
def test_nothing_is_changed_by_a_request_that_another_site_may_have_sent(
    app: FastAPI, hpo: Coordinator, headers: dict[str, str]
) -> None:
    study = hpo.create_study(EXTERNAL).study
    with browser(app) as client:
        sign_in(client, "admin")
        del client.headers["sec-fetch-site"]
        for path in (f"/studies/{study}/delete", f"/studies/{study}/state", "/studies/new", "/login", "/logout",
                     f"/api/v1/studies/{study}/trials"):  # fmt: skip
            answer = client.post(path, data={"confirm": "mine", "state": "paused"}, headers=headers)
            assert answer.status_code == 403, path
            assert ("text/html" in answer.headers["content-type"]) is not path.startswith("/api/")
        assert client.delete(f"/api/v1/studies/{study}", headers=headers).status_code == 403
        assert hpo.get_study(study).state == "running"
        assert client.get("/").status_code == 200, "still signed in"


@pytest.mark.parametrize("headers", SENT_BY_US, ids=str)
def test_our_own_forms_are_let_through(app: FastAPI, hpo: Coordinator, headers: dict[str, str]) -> None:
    study = hpo.create_study(EXTERNAL).study
    with browser(app) as client:
        sign_in(client, "admin")
        del client.headers["sec-fetch-site"]
        answer = client.post(f"/studies/{study}/state", data={"state": "paused"}, headers=headers)
        assert answer.status_code == 303
        assert hpo.get_study(study).state == "paused"


def test_a_bearer_token_needs_no_browser(app: FastAPI, hpo: Coordinator) -> None:
    with TestClient(app) as client:
        headers = {"authorization": f"Bearer {SECRETS['admin']}"}
        answer = client.post("/api/v1/studies", json=EXTERNAL, headers=headers)
        assert answer.status_code == 201
        assert client.post("/api/v1/studies", json=PRESETS["mini"]).status_code == 401, (
            "nobody's request is a 401, not a 403"
        )


def test_every_answer_carries_the_security_headers(client: TestClient, app: FastAPI) -> None:
    paths = ["/login", "/", "/nowhere", "/api/v1/studies", "/healthz", "/openapi.json", "/static/app.css", "/static/no"]
    for path in paths:
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'"), path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
    refused = client.post("/logout", headers={"sec-fetch-site": "cross-site"})
    assert "content-security-policy" in refused.headers

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of our own")

    sign_in(client, "admin")
    app.state.coordinator.list_studies = broken
    crashed = client.get("/")
    assert crashed.status_code == 500
    assert "Something broke" in crashed.text
    assert "content-security-policy" in crashed.headers


def test_no_page_comes_from_elsewhere_and_the_api_viewer_is_gone(client: TestClient) -> None:
    assert client.get("/docs").status_code == 404
    assert client.get("/redoc").status_code == 404
    assert client.get("/openapi.json").status_code == 200


# Being over


def test_a_session_that_is_over_leads_to_the_sign_in_page_and_back(engine: sa.Engine, app: FastAPI) -> None:
    with browser(app) as client:
        sign_in(client, "admin")
        assert client.get("/studies/new").status_code == 200
        with engine.begin() as conn:
            conn.execute(sa.text("UPDATE whetstone.sessions SET expires_at = clock_timestamp() - interval '1 s'"))
        answer = client.get("/workers?x=1")
        assert answer.status_code == 303
        assert answer.headers["location"] == "/login?next=/workers%3Fx%3D1"
        polled = client.get("/workers", headers={"HX-Request": "true", "HX-Current-URL": "http://testserver/workers"})
        assert polled.status_code == 401
        assert polled.headers["hx-redirect"] == "/login?next=/workers"
        assert client.post("/studies/new", data={}).headers["location"] == "/login"


def test_a_revoked_token_ends_the_sessions_it_opened(engine: sa.Engine, app: FastAPI) -> None:
    token_id, secret = tokens.create(engine, "somebody", "viewer")
    with browser(app) as client:
        answer = client.post("/login", data={"token": f" {secret}\n", "next": "/workers"})
        assert answer.headers["location"] == "/workers"
        assert client.get("/").status_code == 200
        assert secret not in str(client.cookies.get(COOKIE))
        tokens.revoke(engine, token_id)
        assert client.get("/").status_code == 303


def test_signing_out_ends_the_session_everywhere(app: FastAPI) -> None:
    with browser(app) as client:
        sign_in(client, "admin")
        cookie = client.cookies[COOKIE]
        answer = client.post("/logout")
        assert answer.headers["location"] == "/login"
        client.cookies.set(COOKIE, cookie)
        assert client.get("/").status_code == 303, "the secret is dead, not only the cookie gone"
