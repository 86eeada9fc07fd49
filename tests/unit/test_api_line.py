"""The line of waiting claims: few look for many, nobody is forgotten, and no turn is lost with its owner."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from api import line, wait
from api.line import Line, Place
from api.wait import Waiting
from hpo.events import Event


class Listening:
    """A request of a client that listens until it `leaves`."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


class Shop:
    """So many pieces of work, a `Waiting` that hears of them, and how often somebody looked."""

    def __init__(self) -> None:
        self.work = 0
        self.looks = 0
        self._lock = threading.Lock()
        self.waiting = Waiting("postgresql://nobody@127.0.0.1:1/nothing")
        self.waiting._loop = asyncio.get_running_loop()

    def take(self) -> str | None:
        with self._lock:
            self.looks += 1
            if self.work == 0:
                return None
            self.work -= 1
            return "work"

    def bring(self, pieces: int) -> None:
        self.work += pieces
        self.waiting._from_thread(Event("work", None))

    def claim(self, seconds: float = 20.0, kind: object = None, request: Listening | None = None) -> asyncio.Task[Any]:
        listening: Any = request or Listening()
        return asyncio.create_task(self.waiting.until(self.take, seconds, listening, kind))

    async def settled(self, waiters: int) -> None:
        """Until so many wait and nobody looks."""
        while self.waiting.waiters != waiters or any(each._looking for each in self.waiting._lines.values()):
            await asyncio.sleep(0.01)


def run(story: Callable[[Shop], Awaitable[None]]) -> None:
    async def told() -> None:
        async with asyncio.timeout(120):
            await story(Shop())

    asyncio.run(told())


@pytest.fixture(autouse=True)
def only_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by himself: who finds something was sent."""
    monkeypatch.setattr(wait, "LOOK_AGAIN_S", 600.0)
    monkeypatch.setattr(wait, "DEAF_S", 600.0)


def test_news_without_work_costs_a_few_looks_however_many_wait() -> None:
    async def story(shop: Shop) -> None:
        claims = [shop.claim() for _ in range(200)]
        await shop.settled(200)
        looks, began = shop.looks, time.monotonic()
        for _ in range(50):
            shop.bring(0)
            await asyncio.sleep(0.002)
        await shop.settled(200)
        rests = (time.monotonic() - began) / line.REST_S
        assert line.TRIES <= shop.looks - looks <= line.TRIES * (rests + 2)
        shop.waiting.close()
        assert set(await asyncio.gather(*claims)) == {None}

    run(story)


def test_as_much_work_as_there_is_finds_its_waiters_in_order() -> None:
    async def story(shop: Shop) -> None:
        claims = []
        for _ in range(20):
            claims.append(shop.claim())
            await shop.settled(len(claims))
        shop.bring(8)
        while shop.work:
            await asyncio.sleep(0.01)
        await shop.settled(12)
        assert sum(claim.done() for claim in claims) == 8
        assert not any(claim.done() for claim in claims[8 + line.AT_ONCE :]), "those who came last were served first"
        shop.waiting.close()
        await asyncio.gather(*claims)

    run(story)


def test_no_work_is_left_while_somebody_waits() -> None:
    async def story(shop: Shop) -> None:
        chance = random.Random(7)
        brought = 0
        claims: list[asyncio.Task[Any]] = []
        for _ in range(300):
            requests = [Listening() for _ in range(chance.randrange(3))]
            claims += [shop.claim(chance.choice([0.05, 20.0]), request=each) for each in requests]
            for each in requests:
                if chance.random() < 0.2:
                    each.leaves.set()
            if chance.random() < 0.6:
                pieces = chance.randrange(3)
                brought += pieces
                shop.bring(pieces)
            await asyncio.sleep(chance.choice([0.0, 0.001, 0.01]))
        for _ in range(1000):
            if shop.work == 0 or all(claim.done() for claim in claims):
                break
            await asyncio.sleep(0.05)
        assert shop.work == 0 or all(claim.done() for claim in claims)
        shop.waiting.close()
        found = await asyncio.gather(*claims)
        assert sum(each is not None for each in found) == brought - shop.work
        assert shop.waiting.waiters == 0
        assert not shop.waiting._lines

    run(story)


def test_each_kind_of_waiter_looks_for_itself() -> None:
    async def story(shop: Shop) -> None:
        shop.waiting._loop = asyncio.get_running_loop()
        small = [asyncio.create_task(shop.waiting.until(lambda: None, 20.0, Listening(), 1)) for _ in range(20)]  # type: ignore[arg-type,func-returns-value]
        large = shop.claim(kind=2)
        await shop.settled(21)
        shop.bring(1)
        assert await large == "work"
        shop.waiting.close()
        await asyncio.gather(*small)

    run(story)


def test_a_line_looks_by_itself_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "DEAF_S", 0.3)

    async def story(shop: Shop) -> None:
        claims = [shop.claim() for _ in range(10)]
        await shop.settled(10)
        shop.work = 10  # and nobody is told
        assert set(await asyncio.gather(*claims)) == {"work"}

    run(story)


def test_a_turn_of_one_who_has_gone_is_passed_on() -> None:
    async def story() -> None:
        places = [Place(), Place()]
        queue = Line(lambda: 600.0)
        for place in places:
            queue.enter(place)
            queue.looked(place, found=False)
            queue.wait(place)
        await asyncio.sleep(2 * line.REST_S)
        queue._due = 1
        queue._send()
        assert [place.has_turn for place in places] == [True, False]
        queue.leave(places[0])
        assert places[1].has_turn

    asyncio.run(story())
