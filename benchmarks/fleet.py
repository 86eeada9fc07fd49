"""Clients and workers of an API, simulated on one event loop: what they do, and how long they waited for it.

A request of the fleet is due at a set moment, and its latency counts from that moment, also where the load itself was
late: nothing waits for its turn unseen. An error is every answer that is not the expected one, and every one that did
not come whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.plain_http import Answer, Broken, Connection

WAIT_S = 20.0
"""How long a claim is held, as workers ask for it."""


@dataclass
class Heard:
    """Milliseconds by kind of request, and what went wrong, in words."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    opened: int = 0
    """Connections that were made: more than there are clients where the server closed those that rested."""

    def took(self, kind: str, seconds: float) -> None:
        self.ms.setdefault(kind, []).append(1000 * seconds)


def percentile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(share * len(ordered) + 0.5) - 1))]


class Client:
    """One connection, and the requests of a worker on it."""

    def __init__(self, url: str, token: str, name: str, heard: Heard, counts_from: float = 0.0) -> None:
        self.http = Connection(url, token)
        self.name = name
        self.heard = heard
        self.counts_from = counts_from
        """Latencies before this moment (by the loop's clock) are those of a warm-up."""

    async def send(self, kind: str, path: str, body: Any, *, due: float = 0.0, expect: tuple[int, ...] = (200,)) -> Any:
        """The answer's document, or None after an error or an empty answer."""
        clock = asyncio.get_running_loop().time
        due = due or clock()
        key = uuid.uuid4().hex if kind in ("claim", "ask") else ""
        try:
            answer: Answer = await self.http.post(path, body, key=key)
        except Broken as error:
            self.heard.errors[f"{kind}: {error}"] += 1
            return None
        if due >= self.counts_from:
            self.heard.took(kind, clock() - due)
        if answer.status not in expect:
            self.heard.errors[f"{kind}: {answer.status} {answer.body[:120].decode(errors='replace')}"] += 1
            return None
        return answer.json() if answer.body else None

    async def ask(self, study: int) -> Any:
        return await self.send("ask", f"/api/v1/studies/{study}/ask", {"worker": self.name}, expect=(201,))

    async def claim(self, *, due: float = 0.0) -> Any:
        body = {"worker": self.name, "device": "cpu", "memory_bytes": 2**34, "version": "bench", "wait_s": WAIT_S}
        return await self.send("claim", "/api/v1/claims", body, due=due, expect=(200, 204))

    async def report(self, lease: Any, epochs: range, *, due: float = 0.0) -> None:
        reports = [{"epoch": n, "value": 0.5 + n / 1e3, "metrics": {"loss": 0.3, "seconds": 1.9}} for n in epochs]
        body = {"token": lease["token"], "reports": reports}
        answer = await self.send("report", f"/api/v1/leases/{lease['lease']}/report", body, due=due)
        if answer is not None and answer["verdict"] != "go_on":
            self.heard.errors[f"report: {answer['verdict']} {answer.get('reason', '')}"] += 1

    async def tell(self, lease: Any, value: float, *, due: float = 0.0) -> None:
        body = {"token": lease["token"], "outcome": "complete", "value": value}
        await self.send("tell", f"/api/v1/leases/{lease['lease']}/tell", body, due=due)


async def trials(
    url: str, token: str, study: int, *, clients: int, warm_s: float, seconds: float
) -> tuple[float, Heard]:
    """Trials a second that so many clients get through, each one after another: ask, a report, tell."""
    heard = Heard()
    loop = asyncio.get_running_loop()
    begin = loop.time() + warm_s
    done = 0

    async def work(n: int) -> None:
        nonlocal done
        client = Client(url, token, f"client-{n}", heard, begin)
        while loop.time() < begin + seconds:
            lease = await client.ask(study)
            if lease is None:
                await asyncio.sleep(0.05)
                continue
            await client.report(lease, range(1))
            await client.tell(lease, random.random())
            done += begin <= loop.time() < begin + seconds
        client.http.close()

    await asyncio.gather(*(work(n) for n in range(clients)))
    return done / seconds, heard


async def paced(url: str, token: str, study: int, *, workers: int, period_s: float, seconds: float) -> Heard:
    """Workers that ask once a period, each at moments of its own, report once and tell before they ask again."""
    heard = Heard()
    loop = asyncio.get_running_loop()
    begin = loop.time() + 2 * period_s

    async def work(n: int) -> None:
        client = Client(url, token, f"paced-{n}", heard, begin)
        turn = loop.time() + random.uniform(0, period_s)
        while turn < begin + seconds:
            await asyncio.sleep(turn - loop.time())
            lease = await client.ask(study)
            await asyncio.sleep(random.uniform(0.2, 0.8) * period_s)
            if lease is not None:
                await client.report(lease, range(1))
                await client.tell(lease, random.random())
            turn += period_s
        client.http.close()

    await asyncio.gather(*(work(n) for n in range(workers)))
    return heard


@dataclass(frozen=True)
class Pace:
    """What a simulated worker does: trials of so many seconds, an epoch each `epoch_s`, sent each `report_s`."""

    trial_s: float = 60.0
    epoch_s: float = 2.0
    report_s: float = 10.0


async def workers(url: str, token: str, *, count: int, pace: Pace, ramp_s: float, seconds: float) -> Heard:
    """A fleet for so many seconds, after a ramp in which its workers come one by one."""
    heard = Heard()
    loop = asyncio.get_running_loop()
    began = loop.time()
    counts_from, end = began + ramp_s, began + ramp_s + seconds
    each = round(pace.report_s / pace.epoch_s)

    async def work(n: int) -> None:
        client = Client(url, token, f"fleet-{n}", heard, counts_from)
        due = began + ramp_s * (n + random.random()) / count
        while due < end:
            await asyncio.sleep(due - loop.time())
            lease = await client.claim(due=due)
            if lease is None:
                heard.errors["claim: nothing to do"] += 1
                due = loop.time() + 1.0
                continue
            start, epoch = loop.time(), 0
            for turn in range(1, round(pace.trial_s / pace.report_s) + 1):
                due = start + turn * pace.report_s
                if due >= end:
                    break
                await asyncio.sleep(due - loop.time())
                await client.report(lease, range(epoch, epoch + each), due=due)
                epoch += each
            else:
                due = loop.time()
                await client.tell(lease, random.random())
                due = loop.time()
        heard.opened += client.http.opened
        client.http.close()

    await asyncio.gather(*(work(n) for n in range(count)))
    return heard


async def held(url: str, token: str, study: int, *, claims: int, streams: int, tells: int) -> Heard:
    """Tells of a study's trials, while claims that find nothing wait and event streams of the study are open."""
    heard = Heard()
    waiting = [Client(url, token, f"waits-{n}", Heard()) for n in range(claims)]
    listening = [Connection(url, token) for _ in range(streams)]

    async def wait(client: Client) -> None:
        while True:
            if await client.claim() is not None:
                heard.errors["a claim that was to wait got a trial"] += 1

    tasks = [asyncio.ensure_future(wait(client)) for client in waiting]
    try:
        opened = await asyncio.gather(*(stream.stream(f"/api/v1/studies/{study}/events") for stream in listening))
        heard.errors.update(f"event stream: {status}" for status in opened if status != 200)
        await asyncio.sleep(2.0)
        client = Client(url, token, "teller", heard)
        for _ in range(tells):
            lease = await client.ask(study)
            await asyncio.sleep(random.uniform(0.2, 0.6))
            if lease is not None:
                await client.tell(lease, random.random())
        await asyncio.sleep(1.0)
        silent = sum(stream.bytes_heard < 500 for stream in listening)
        if silent:
            heard.errors["event stream: no news"] += silent
    finally:
        for task in tasks:
            task.cancel()
        for each in (*(client.http for client in waiting), *listening):
            each.close()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
    return heard


async def reads(url: str, token: str, paths: dict[str, str], count: int) -> Heard:
    """GETs of these paths by turns on one connection."""
    heard = Heard()
    http = Connection(url, token)
    for turn in range(-3, count):
        for name, path in paths.items():
            began = time.perf_counter()
            answer = await http.get(path)
            if answer.status != 200:
                heard.errors[f"{name}: {answer.status}"] += 1
            elif turn >= 0:
                heard.took(name, time.perf_counter() - began)
    http.close()
    return heard


async def first_ask(url: str, token: str, study: int) -> Heard:
    """One ask, on a connection of its own."""
    heard = Heard()
    client = Client(url, token, "early", heard)
    await client.ask(study)
    client.http.close()
    return heard
