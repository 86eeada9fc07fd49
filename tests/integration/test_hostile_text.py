"""Text of any kind, wherever somebody may put some: stored and shown intact, or refused with a reason.

A real server is driven over HTTP, its pages and exports are read back, and the command line prints what it is told.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from html import unescape
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
import yaml
from typer.testing import CliRunner

from cli.main import register
from tests.integration.api_server import SECRETS, bearer, make_app, served

TEXTS = {
    "long": "n" * 500,
    "quotes": "it's \"quoted\" `so`; DROP TABLE studies; -- \\ \\' $$ %s %(x)s :name",
    "newlines": "one\ntwo\r\nthree\tfour",
    "NUL": "before\0after",
    "right-to-left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\u200f",
    "script": "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>",
    "markup": "[bold]not bold[/bold] {{ 7 * 7 }} {% raw %} ${7*7} & &amp;",
    "formula": '=HYPERLINK("http://example.invalid")',
    "terminal": "\x1b]0;title\x07\x1b[31mred\x9b2J",
    "separators": "a\u2028b\u2029c\ufeffd\u0085e",
    "astral": "\U0001f332\u0301 \uffff",
    "half a character": "\ud800",
    "blank": " ",
    "path": "../../etc/passwd",
}
COMMANDS = register()
SPACE: list[dict[str, Any]] = [{"name": "x", "type": "float", "low": 0.0, "high": 1.0}]


class Service:
    """A served app, and whoever talks to it. Every answer is looked at: no 500, one shape of error."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx2.Client(base_url=url, headers=bearer("admin"), timeout=60)
        self.made = 0

    def send(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """The answer's document, or None where it was refused with a reason."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = self.http.request(method, f"/api/v1{path}", content=content, headers=headers, params=query)
        if answer.status_code < 300:
            return answer.json() if answer.headers["content-type"] == "application/json" else answer.text
        assert answer.status_code in (404, 409, 422), f"{method} {path}: {answer.status_code} {answer.text[:300]}"
        error = answer.json()["error"]
        assert error["message"]
        assert answer.status_code != 422 or error["details"], "a refusal names what is wrong"
        return None

    def study(self, **changes: Any) -> Any:
        self.made += 1
        document = {"name": f"study-{self.made}", "workload": "external", "sampler": "random", "space": SPACE}
        return self.send("POST", "/studies", document | changes)

    def page(self, path: str) -> str:
        answer = self.http.get(path, headers={"Accept": "text/html"})
        assert answer.status_code == 200, f"{path}: {answer.status_code}"
        return answer.text

    def command(self, *arguments: str) -> str:
        """What a command prints. It succeeds, and says nothing to the terminal but text and its own colours."""
        options = ["--url", self.url, "--token", SECRETS["admin"]]
        done = CliRunner().invoke(COMMANDS, [*arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert not set(done.stdout) & {"\x07", "\x9b", "\x1b"}, arguments
        return done.stdout


@pytest.fixture(scope="module")
def service(module_engine: sa.Engine) -> Iterator[Service]:
    with served(make_app(module_engine)) as (url, _):
        made = Service(url)
        yield made
        made.http.close()


def storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def shown(text: str, page: str) -> bool:
    """Whether a page holds the text, and nothing that a browser would run."""
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    return text in unescape(page)


@pytest.mark.parametrize("name", TEXTS)
def test_free_text_is_stored_and_shown_intact_or_refused(service: Service, name: str) -> None:
    text = TEXTS[name]
    view = service.study(description=text, notes=text, settings={"label": text, text: 1})
    assert (view is not None) is storable(text)
    if view is None:
        return
    at = f"/studies/{view['study']}"
    assert service.send("PATCH", at, {"notes": text})["notes"] == text
    failed = service.send("POST", f"{at}/trials", {"params": {"x": 0.5}, "outcome": "failed", "reason": text})
    lease = service.send("POST", f"{at}/ask", {"worker": "w"})
    report = {"token": lease["token"], "reports": [{"epoch": 0, "value": 0.1, "metrics": {text[:64]: 1.0}}]}
    assert service.send("POST", f"/leases/{lease['lease']}/report", report)["verdict"] == "go_on"
    tell = {"token": lease["token"], "outcome": "failed", "reason": text, "traceback": text}
    assert service.send("POST", f"/leases/{lease['lease']}/tell", tell)["state"] == "failed"

    stored = service.send("GET", at)
    assert (stored["description"], stored["notes"]) == (text, text)
    assert stored["spec"]["settings"] == {"label": text, text: 1}
    trial = service.send("GET", f"{at}/trials/{lease['trial']}")
    assert (trial["reason"], trial["history"][0]["traceback"]) == (text, text)
    assert trial["curve"][0]["metrics"] == {text[:64]: 1.0}
    assert service.send("GET", f"{at}/trials/{failed['trial']}")["reason"] == text

    for read in (json.loads, yaml.safe_load):
        exported = read(service.http.get(f"/api/v1{at}/export?format={read.__module__}").text)
        assert (exported["study"]["notes"], exported["trials"][0]["reason"]) == (text, text)
    table = service.http.get(f"/api/v1{at}/export?format=csv").text
    reasons = [row["reason"].removeprefix("'") for row in csv.DictReader(io.StringIO(table, newline=""))]
    assert reasons == [text.removeprefix("'")] * 2

    assert shown(text, service.page(at))
    assert shown(text, service.page(f"{at}/config"))
    assert shown(text, service.page(f"{at}/trials/{lease['trial']}"))
    assert shown(text, service.page(f"{at}/trials"))
    assert shown(text, service.page("/"))
    service.command("study", "show", str(view["study"]))
    service.command("trial", "list", str(view["study"]))
    service.command("trial", "show", str(view["study"]), str(lease["trial"]))
    told = json.loads(service.command("trial", "show", str(view["study"]), str(lease["trial"]), "--json"))
    assert told["reason"] == text


@pytest.mark.parametrize("name", TEXTS)
def test_names_are_stored_and_shown_intact_or_refused(service: Service, name: str) -> None:
    text = TEXTS[name]
    view = service.study(name=text)
    if view is not None:
        assert service.send("GET", f"/studies/{view['study']}")["name"] == text
        assert shown(text, service.page(f"/studies/{view['study']}"))
        assert text in service.command("study", "show", text)
    assert service.study(workload=text) is None
    assert service.study(sampler=text) is None
    assert service.study(pruner={"name": text}) is None
    assert service.study(seed_from=text) is None
    assert service.study(**{text: 1}) is None
    assert service.send("POST", "/studies", {"preset": text}) is None
    for parameter in ({"name": text}, {"labels": [text]}, {"labels": ["a"], "tied": {text: ["a"]}}, {text: 1}):
        made = service.study(space=[SPACE[0] | parameter])
        if made is not None:
            assert made["spec"]["space"][0] == SPACE[0] | parameter
    external = service.study()
    at = f"/studies/{external['study']}"
    assert service.send("PATCH", at, {"fixed": {text: 1}}) is None
    assert service.send("PATCH", at, {"state": text}) is None
    assert service.send("POST", f"{at}/trials", {"params": {text: 1}}) is None
    lease = service.send("POST", f"{at}/ask", {"worker": text})
    if lease is not None:
        trial = service.send("GET", f"{at}/trials/{lease['trial']}")
        assert trial["worker"] == text
    if "\0" not in text and storable(text):
        found = service.send("GET", "/studies", name=text)
        assert found is None or all(text.lower() in item["name"].lower() for item in found["items"])


@pytest.mark.parametrize("name", TEXTS)
def test_choices_are_stored_and_shown_intact_or_refused(service: Service, name: str) -> None:
    text = TEXTS[name]
    choice = {"name": "init", "type": "categorical", "choices": [text, "other"]}
    view = service.study(space=[choice], fixed={"init": text})
    assert (view is not None) is storable(text)
    if view is None:
        return
    at = f"/studies/{view['study']}"
    assert view["spec"]["space"] == [choice]
    assert view["fixed"] == {"init": text}
    lease = service.send("POST", f"{at}/ask", {"worker": "w"})
    assert lease["params"] == {"init": text}
    service.send(
        "POST", f"/leases/{lease['lease']}/tell", {"token": lease["token"], "outcome": "complete", "value": 1.0}
    )
    assert service.send("GET", f"{at}/best")[0]["params"] == {"init": text}
    assert shown(text, service.page(at))
    assert shown(text, service.page(f"{at}/trials/0"))
    service.command("study", "show", str(view["study"]))
    service.command("study", "best", str(view["study"]))
    heir = service.study(space=[choice | {"choices": ["more", "other", text]}], seed_from=view["study"])
    assert service.send("GET", f"/studies/{heir['study']}/best")[0]["params"] == {"init": text}


@pytest.mark.parametrize("name", TEXTS)
def test_what_workers_say_of_themselves_is_shown_intact_or_refused(service: Service, name: str) -> None:
    text = TEXTS[name]
    said = {"worker": f"w-{list(TEXTS).index(name)}", "host": text, "devices": [text], "version": text}
    answer = service.send("POST", "/workers", said)
    assert (answer is not None) is storable(text)
    if answer is None:
        return
    assert answer["device"] == text
    worker = next(item for item in service.send("GET", "/workers") if item["worker"] == said["worker"])
    assert (worker["host"], worker["device"], worker["version"]) == (text, text, text)
    assert shown(text, service.page("/workers"))
    service.command("workers", "list")


def test_a_long_name_is_cut_in_a_table_and_whole_in_json(service: Service) -> None:
    device, worker = "d" * 500, "w" * 128
    service.send("POST", "/workers", {"worker": worker, "host": "h", "devices": [device], "version": "1"})
    listed = service.command("workers", "list").splitlines()
    assert listed[0].split() == ["worker", "state", "device", "study/trial", "done", "last", "seen", "(UTC)"]
    row = next(line for line in listed if line.startswith("www")).split()
    assert [cell[-1] for cell in (row[0], row[2])] == ["…", "…"]
    assert (row[1], row[3]) == ("idle", "-")
    told = json.loads(service.command("workers", "list", "--json"))
    assert any((item["worker"], item["device"]) == (worker, device) for item in told)

    study = service.study(name="n" * 100)["study"]
    service.send("POST", f"/studies/{study}/ask", {"worker": worker})
    assert "nn… " in service.command("study", "list")
    for command in (["trial", "list", str(study)], ["trial", "show", str(study), "0"]):
        assert "ww… " in service.command(*command)
