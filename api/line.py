"""The line of those who wait for one kind of work: they look in turn, so that a thousand cost little more than one.

News of work sends the few who have not looked for longest. Who finds something sends more after him, up to a handful at
a time; who finds nothing goes to the end of the line and speaks for those behind. The invariants: news that comes
while somebody looks is looked at again after him, a turn that its owner cannot take is passed on, and now and then the
line looks without any news. All of it happens on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

TRIES = 4
"""So many look after one piece of news: the first may be drained, or gone."""
AT_ONCE = 4
"""So many look at the same time at most."""
REST_S = 0.1
"""How long the line rests after somebody found nothing: news may come much more often than work."""


class Place:
    """One who waits. `called` rings when it is its turn to look, or when it is to go."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.has_turn = False
        self.was_sent = False
        """It looks because the line sent it, not because it has just come."""


class Line:
    """Those who wait for one kind of work. `look_again` says how long the line trusts that it would have been told."""

    def __init__(self, look_again: Callable[[], float]) -> None:
        self._look_again = look_again
        self._waiting: deque[Place] = deque()  # who has not looked for longest stands first
        self._looking = 0
        self._due = 0
        self._rests_until = 0.0
        self._looks_by = asyncio.get_running_loop().time() + look_again()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting) + self._looking

    def enter(self, place: Place) -> None:
        """Come, and look first of all."""
        place.has_turn = True
        self._looking += 1

    def news(self) -> None:
        """There may be work."""
        self._due = max(self._due, min(TRIES, len(self)))
        self._send()

    def wait(self, place: Place) -> None:
        """Stand at the end of the line. News that came while `place` looked is not lost on it."""
        place.called.clear()
        self._waiting.append(place)
        self._send()

    def looked(self, place: Place, *, found: bool) -> None:
        """A turn is over: whoever found something sends more, after one who was sent in vain the line rests."""
        assert place.has_turn
        place.has_turn = False
        self._looking -= 1
        now = asyncio.get_running_loop().time()
        self._looks_by = now + self._look_again()
        if found:
            self._rests_until = now
            self._due = max(self._due, min(AT_ONCE, len(self)))
        elif place.was_sent:
            self._rests_until = now + REST_S
        self._send()

    def leave(self, place: Place) -> None:
        """Go. A turn that was not taken to its end is the next one's."""
        if place.has_turn:
            place.has_turn = False
            self._looking -= 1
            self._due += 1
        elif place in self._waiting:
            self._waiting.remove(place)
        self._send()

    def dismiss(self) -> None:
        """Call everybody, without a turn: it is time to go."""
        for place in self._waiting:
            place.called.set()

    def _send(self) -> None:
        """Send whose turn it is, or see to it that this is called again when it will be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now >= self._looks_by and not self._looking:
            self._due = max(self._due, 1)
        while now >= self._rests_until and self._due and self._waiting and self._looking < AT_ONCE:
            place = self._waiting.popleft()
            self._due -= 1
            self._looking += 1
            place.has_turn = place.was_sent = True
            place.called.set()
        if self._waiting and not self._looking:
            at = self._rests_until if self._due else max(self._looks_by, self._rests_until)
            self._timer = loop.call_at(at, self._send)
