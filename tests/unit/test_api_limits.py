"""What a request may look like: faults are named with their place, and never with what was sent."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from api import limits
from api.errors import Malformed, TooLarge, WrongContentType
from hpo.errors import Fault, Invalid


def faults(body: str | bytes) -> list[Fault]:
    _, found = limits.parse(body if isinstance(body, bytes) else body.encode())
    return found


@pytest.mark.parametrize(
    ("body", "at"),
    [
        ('{"space": [{"high": NaN}]}', "space[0].high"),
        ('{"a": {"b": [1, -Infinity]}}', "a.b[1]"),
        ('{"value": 1e999}', "value"),
        ('{"value": -1e999}', "value"),
        ('{"token": 9223372036854775808}', "token"),
        ('{"token": -9223372036854775809}', "token"),
        ('{"token": ' + "9" * 100_000 + "}", "token"),
        ('{"name": "a\\u0000b"}', "name"),
        ('{"name": "\\ud800"}', "name"),
        ('{"name": "\\udc00 \\ud83d"}', "name"),
        ('{"a\\u0000b": 1}', "?"),
        ('{"x": {"\\ud800": 1}}', "x.?"),
        ('{"a": 1, "a": 2}', "a"),
        ('[{"x": {"b": 1, "c": 2, "b": 3}}]', "[0].x.b"),
        ('{"' + "k" * 1001 + '": 1}', "?"),
        ("[" * 65 + "]" * 65, ""),
        ("[" * 100_000 + "]" * 100_000, ""),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, ""),
    ],
)
def test_a_value_that_could_not_be_stored_is_a_fault_at_its_place(body: str, at: str) -> None:
    assert [fault.at for fault in faults(body)] == [at]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nope",
        b"{'a': 1}",
        b'{"a": 1} x',
        b"\xff\xfe{}",
        b'"\xed\xa0\x80"',
        b'{"a": 01}',
        b"\xef\xbb\xbf{}",
        b"[" * 90,
    ],
)
def test_what_is_no_json_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        limits.parse(body)


def test_every_fault_of_a_body_is_named_at_once() -> None:
    found = faults('{"a": NaN, "b": "\\u0000", "c": [1e999, {"d": 18446744073709551616}]}')
    assert {fault.at for fault in found} == {"a", "b", "c[0]", "c[1].d"}


def test_what_fits_passes_untouched() -> None:
    body = '{"a": [1, 2.5, true, null, "naïve 🜲", {"b": 9223372036854775807}], "c": ' + "[" * 63 + "]" * 63 + "}"
    document, found = limits.parse(body.encode())
    assert found == []
    assert document == json.loads(body)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(_values)
def test_what_parse_lets_pass_can_be_sent_and_stored_and_its_faults_can_be_sent(value: object) -> None:
    document, found = limits.parse(json.dumps(value).encode())
    json.dumps([[fault.at, fault.fault] for fault in found], ensure_ascii=False).encode()
    if not found:
        sent = json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
        assert b"\\u0000" not in sent
        assert document == value


def test_a_fault_never_repeats_what_was_sent() -> None:
    secret = "hunter2 hunter2 " + "\u0000"
    found = faults(json.dumps({secret: secret, "x": [secret]}))
    assert len(found) == 3
    assert "hunter2" not in str(found)


def address(path: bytes = b"/", query: bytes = b"") -> Request:
    return Request(
        {"type": "http", "method": "GET", "path": "/", "raw_path": path, "query_string": query, "headers": []}
    )


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (b"/a%00", b""),
        (b"/", b"name=%00"),
        (b"/", b"name=%0d%0a"),
        (b"/%ff", b""),
        (b"/", b"name=%ed%a0%80"),
        (b"/", b"\xff"),
    ],
)
def test_an_address_with_nul_control_characters_or_broken_utf8_is_refused(path: bytes, query: bytes) -> None:
    with pytest.raises(Invalid):
        limits.check_address(address(path, query))


def test_an_address_in_any_script_passes() -> None:
    limits.check_address(address(b"/studies/%E2%9C%93", b"name=na%C3%AFve+sweep"))


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ("application/problem+json", True),
        ("application/json; charset=latin-1", False),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        ("", False),
    ],
)
def test_only_json_is_taken_for_json(content_type: str, is_json: bool) -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    headers = [(b"content-type", content_type.encode())]
    request = limits.CheckedRequest({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    if is_json:
        assert asyncio.run(request.json()) == {}
    else:
        with pytest.raises(WrongContentType):
            asyncio.run(request.json())


def test_a_body_that_is_declared_too_large_is_not_read_at_all() -> None:
    sent: list[dict[str, object]] = []

    async def never(*_: object) -> dict[str, object]:
        raise AssertionError("nobody reads it")

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(b"content-length", b"1000001")],
        "app": FastAPI(),
    }
    asyncio.run(limits.BodyLimit(never)(scope, never, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413


def test_a_body_that_grows_past_the_limit_is_not_read_on() -> None:
    read = 0

    async def receive() -> dict[str, object]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 400_000, "more_body": True}

    async def app(scope: object, receive: object, send: object) -> None:
        while True:
            await receive()  # type: ignore[operator]

    async def send(message: object) -> None:
        raise AssertionError("nobody answers here")

    limit = limits.BodyLimit(app)  # type: ignore[arg-type]
    with pytest.raises(TooLarge):
        asyncio.run(limit({"type": "http", "headers": []}, receive, send))  # type: ignore[arg-type]
    assert read == 3
