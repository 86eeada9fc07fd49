"""The pages in a real browser, over a real server process and a real database: a person launches a study, looks on
while a client of the REST API works on it, and steers it. No script of another origin runs, and none of ours is inline.
"""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from tests.ports import free_port

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
expect = playwright.expect

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
PATIENCE_MS = 120_000
expect.set_options(timeout=PATIENCE_MS)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
# What a browser says by itself where the test takes the server away, or sends a form that is refused, on purpose.
EXPECTED = re.compile(
    r"Failed to load resource: (net::ERR_(CONNECTION|EMPTY|INCOMPLETE|SOCKET)|.* a status of 422)"
    r"|htmx:(sendError|afterRequest), "
)


class Server:
    """`whetstone serve` as a process of its own, which can be ended and started again at its address."""

    def __init__(self, database: str, home: Path) -> None:
        self.port = free_port()
        self.environment = {**os.environ, "DATABASE_URL": database, "WHETSTONE_HOME": str(home), "COLUMNS": "200"}
        self.environment.pop("WHETSTONE_ARTIFACTS", None)
        self.link = ""

    def start(self) -> None:
        command = [sys.executable, "-m", "cli.main", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said: list[str] = []
        for line in self.process.stderr:
            said.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+/login\?once=\S+", line)
            if found:
                self.link = found[0]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(said))
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(120)


@dataclass
class Client:
    """A worker as the wire knows it: it claims a trial, reports and tells, and trains nothing."""

    http: httpx2.Client

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.http.post(f"/api/v1{path}", json=body)
        answer.raise_for_status()
        return answer.json()

    def claim(self) -> dict[str, Any]:
        return dict(
            self.post(
                "/claims", {"worker": "by-hand@a-machine-with-a-long-name.example", "device": "cpu", "wait_s": 10}
            )
        )

    def report(self, lease: dict[str, Any], epoch: int, value: float) -> None:
        metrics = {"accuracy": value, "accuracy_320": value - 0.01, "loss": 0.7 - value / 2}
        report = {"epoch": epoch, "value": value, "metrics": metrics}
        self.post(f"/leases/{lease['lease']}/report", {"token": lease["token"], "reports": [report]})

    def tell(self, lease: dict[str, Any], **told: Any) -> None:
        self.post(f"/leases/{lease['lease']}/tell", {"token": lease["token"], **told})


@pytest.fixture
def server(postgres_url: str, tmp_path: Path) -> Iterator[Server]:
    made = Server(postgres_url, tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def worker(server: Server, engine: sa.Engine) -> Iterator[Client]:
    from hpo import tokens

    _, secret = tokens.create(engine, "by hand", "worker")
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {secret}"}, timeout=120) as http:
        yield Client(http)


@pytest.fixture
def faults() -> list[str]:
    """What the browser complained of: it has to stay empty."""
    return []


@pytest.fixture
def page(faults: list[str]) -> Iterator[Any]:
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=switches, timeout=PATIENCE_MS)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(PATIENCE_MS)
        made = context.new_page()
        made.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective))"
        )
        made.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and not EXPECTED.match(message.text)
                and faults.append(message.text)
            ),
        )
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        made.on("request", lambda sent: sent.url.startswith(("http://127.0.0.1", "data:")) or faults.append(sent.url))
        yield made
        browser.close()


def seen(page: Any, selector: str, words: str | re.Pattern[str]) -> None:
    expect(page.locator(selector).first).to_contain_text(words)


def inks(page: Any) -> int:
    """How many different colours stand on the chart's canvas: a blank one has at most one."""
    return int(
        page.evaluate("""() => {
            const drawn = document.querySelector("[data-chart] canvas");
            const copy = Object.assign(document.createElement("canvas"), { width: drawn.width, height: drawn.height });
            const pen = copy.getContext("2d", { willReadFrequently: true });
            pen.drawImage(drawn, 0, 0);
            const bytes = pen.getImageData(0, 0, copy.width, copy.height).data;
            return new Set(new Uint32Array(bytes.buffer)).size;
        }""")
    )


def drawn(page: Any, count: int) -> None:
    expect(page.locator(f"[data-chart][data-drawn='{count}']")).to_be_visible()
    assert inks(page) > 10


def test_a_person_launches_a_study_and_looks_on(server: Server, worker: Client, page: Any, faults: list[str]) -> None:
    # In by the one-time link: the secret leaves the address, the cookie is out of reach of scripts and other sites.
    page.goto(server.link)
    assert page.url == f"{server.url}/"
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""

    # A refused form keeps what was typed; the corrected one launches.
    page.get_by_role("link", name="Launch a study").click()
    page.get_by_label("Name").fill("by hand")
    page.get_by_label("Trials", exact=True).fill("none")
    page.get_by_label("Sampler").select_option("random")
    page.get_by_role("button", name="Launch").click()
    seen(page, "#faults", "budget.trials")
    assert page.get_by_label("Name").input_value() == "by hand"
    page.get_by_label("Trials", exact=True).fill("3")
    page.get_by_role("button", name="Launch").click()
    seen(page, "h1", "by hand")
    seen(page, "#live", "No worker is at hand")
    study = page.url
    page.evaluate("window.stayed = true")

    # Live, without a reload: running, then its value, the title and the chart.
    first = worker.claim()
    expect(page.locator(".counts li", has_text="running")).to_contain_text("1")
    page.locator("#delete summary").click()
    page.get_by_label(re.compile("to confirm")).fill("by ha")
    worker.report(first, 0, 0.4)
    worker.tell(first, outcome="complete", value=0.613)
    seen(page, "#live .big", "61.3%")
    expect(page).to_have_title(re.compile("by hand: running, 61.3%"))
    drawn(page, 1)
    assert page.get_by_label(re.compile("to confirm")).input_value() == "by ha", "a refresh takes no typing away"
    expect(page.locator("#delete")).to_have_attribute("open", "")
    page.keyboard.press("Escape")
    expect(page.locator("#delete")).not_to_have_attribute("open", "")
    page.locator("#chart-table summary").click()
    second = worker.claim()
    worker.tell(second, outcome="infeasible", value=0.05, reason=EVIL)
    drawn(page, 2)
    seen(page, "#chart-table", "infeasible")
    expect(page.locator("#chart-table")).to_have_attribute("open", "")

    # The trial's own page draws its curve as it grows.
    third = worker.claim()
    worker.report(third, 0, 0.2)
    page.get_by_role("link", name="Trials").first.click()
    seen(page, "#live", EVIL)
    page.locator("#trial-2 a").click()
    drawn(page, 1)
    seen(page, "#live .big", "20.0%")
    page.evaluate("window.stayed = true")
    worker.report(third, 1, 0.5)
    drawn(page, 2)
    page.locator("[data-chart]").hover()  # its tooltip needs no inline style
    seen(page, "#live .big", "50.0%")

    # The server goes away and comes back: the page says so, and catches up.
    server.stop()
    seen(page, "#connection", "does not answer")
    server.start()
    worker.report(third, 2, 0.55)
    drawn(page, 3)
    expect(page.locator("#connection")).to_be_hidden()
    worker.tell(third, outcome="complete", value=0.7)
    seen(page, "#live h1", "complete")
    assert page.evaluate("window.stayed"), "all of that came without a reload"

    # The budget is used up; more of it, and the buttons that steer.
    page.goto(study)
    seen(page, "#live-head", "finished")
    page.get_by_role("link", name="Raise the budget").click()
    page.get_by_label("Trials", exact=True).fill("5")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("button", name="Pause").click()
    seen(page, "#live-head", "paused")
    page.get_by_role("button", name="Resume").click()
    page.locator("#stop summary").click()
    page.get_by_role("button", name="Stop the study").click()
    seen(page, "#live-head", "stopped")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url(f"{server.url}/login")
    page.goto(study)
    assert "/login?next=" in page.url
    assert faults == [], "\n".join(faults)


def test_every_page_fits_a_phone_and_a_keyboard(server: Server, worker: Client, page: Any, faults: list[str]) -> None:
    page.goto(server.link)
    page.goto(f"{server.url}/studies/new?preset=mini")
    page.get_by_label("Name").fill("a-name-of-a-study-that-is-as-long-as-names-may-be-" + "x" * 40)
    page.get_by_role("button", name="Launch").click()
    seen(page, "h1", "a-name")
    study = page.url
    lease = worker.claim()
    worker.report(lease, 0, 0.4)
    worker.tell(lease, outcome="failed", reason="R" * 300, traceback="T" * 500)
    page.goto(f"{study}/queue")
    page.get_by_role("button", name="Add to the queue").click()
    seen(page, "#live", "a point of one's own")
    page.set_viewport_size({"width": 340, "height": 800})
    for path in ("", "/trials", "/queue", "/config", "/trials/0", "/../../workers", "/../../", "/../new"):
        page.goto(study + path)
        page.wait_for_load_state("networkidle")
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert over <= 0, f"{path or '/'} is {over} px wider than the screen"
        unnamed = page.evaluate("""() => [...document.querySelectorAll("input, select, textarea")].filter(
            field => field.type !== "hidden" && !field.hidden && !field.labels.length).map(field => field.id)""")
        assert unnamed == [], path
    page.goto(study)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Stop…":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop the study")).to_be_visible()
    assert faults == [], "\n".join(faults)


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A page of somebody else, which links to us and sends a form in the reader's name."""

    target = ""

    def do_GET(self) -> None:
        body = f'<a href="{self.target}">look</a>'
        if self.path == "/form":
            body = f'<form method="post" action="{self.target}"><button name="state" value="stopped">x</button></form>'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[type[Elsewhere]]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        Elsewhere.port = made.server_port  # type: ignore[attr-defined]
        yield Elsewhere
        made.shutdown()


def test_another_site_may_link_here_but_not_act_here(server: Server, page: Any, elsewhere: Any) -> None:
    page.goto(server.link)
    page.goto(f"{server.url}/studies/new?preset=external")
    page.get_by_role("button", name="Launch").click()
    seen(page, "h1", "running")
    study = page.url

    # Another port of the same host is the same "site": the browser adds even a SameSite=Strict cookie.
    elsewhere.target = f"{study}/state"
    page.goto(f"http://127.0.0.1:{elsewhere.port}/form")
    page.get_by_role("button").click()
    seen(page, "h1", "This came from another site")
    page.goto(study)
    seen(page, "h1", "running")

    # From a foreign site the cookie is left out; the reader is signed in all the same.
    elsewhere.target = study
    page.goto(f"http://localhost:{elsewhere.port}/link")
    page.get_by_role("link").click()
    page.wait_for_url(study)
    seen(page, "h1", "running")
