"""A schedule as it is played: every step is taken, and after each the database is looked at.

`play` raises `Broken` with the seed, what was broken, and everything that was said until then. Clients behave as ours
do: a call without an answer is repeated with its key or token, maybe at another coordinator, maybe never, where the
client dies first. At the end everybody who lives gets its answers, the budget is raised a little, and the studies are
worked off, so that their ends can be looked at.
"""

from __future__ import annotations

import random
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpo.errors import Conflict, DatabaseUnavailable, Invalid, KeyReused, LeaseLost, NotFound
from hpo.protocol import Lease, Verdict
from hpo.tokens import Principal
from tests.faults.schedule import Schedule, Step
from tests.faults.schedule_checks import STANDING, Auditor, compare
from tests.faults.schedule_clients import KEYED, Call, Client
from tests.faults.schedule_house import Gone, House, Place
from tests.integration.leases_harness import point, study, together

_ANSWERS = (Conflict, NotFound, Invalid, KeyReused)
_GRACE_S = 2.0  # after a fault, for which its coordinator may say that PostgreSQL does not answer
_PATIENCE_S = 240.0  # for the last trial of a study, however busy the machine


class Broken(AssertionError):
    """A promise was broken; the message says which, and how to see it again."""


class Player:
    """One schedule on one database; other schedules may have been played on it before."""

    def __init__(self, schedule: Schedule, url: str, folder: Path, term_s: float) -> None:
        self.schedule, self.term_s = schedule, term_s
        self.mark = uuid.uuid4().hex[:12]
        self.house = House(url, folder, coordinators=schedule.coordinators, processes=schedule.processes, term_s=term_s)
        self.auditor = Auditor(url.replace("+psycopg2", ""))
        self.calls: list[Call] = []
        self.trace: list[str] = []
        self.broken: list[str] = []
        self.excused = 0
        self.clients = [
            Client(f"w{number}", Principal(f"token:{number}", "worker", f"w{number}"), self.mark)
            for number in range(schedule.clients)
        ]

    # One step

    def play(self) -> None:
        self._launch()
        for number, step in enumerate(self.schedule.steps):
            self.trace.append(f"{number}. {step}")
            self.auditor.before()
            self._take(step)
            self._judge(self.auditor.after())
        self.trace.append("the end")
        self._answer_all()
        self._work_off()
        self._judge(compare(self.auditor, self.calls))
        self._agree()

    def _launch(self) -> None:
        for number, plan in enumerate(self.schedule.studies):
            document = study(
                f"{self.mark}-{number}",
                budget={"trials": plan.budget},
                concurrency=plan.concurrency,
                max_attempts=plan.max_attempts,
                points=[point(place / 10) for place in range(plan.points)],
                pruner=plan.pruner,
            )
            made = self.house.places[0].call("create_study", (document,))
            self.auditor.studies.append(made.study)
            self.auditor.planned += plan.points

    def _take(self, step: Step) -> None:
        dice = random.Random(step.dice)
        client = self.clients[step.who % len(self.clients)]
        place = self.house.places[step.where % len(self.house.places)]
        if step.act == "wait":
            self._pass_time(dice.uniform(0.1, 1.4) * self.term_s)
        elif step.act == "expire":
            self._visit(place)
        elif step.act == "crowd":
            self._crowd(dice)
        elif step.act == "die":
            client.held, client.unanswered = [], []
        elif step.act == "repeat" and not step.twin:
            self._repeat(place, dice)
        else:
            call = self._choose(step.act, client, dice)
            if call is not None:
                self._make(step, call, place, self._twin(step, call, client, dice))

    def _twin(self, step: Step, call: Call, client: Client, dice: random.Random) -> Call | None:
        """What happens at the same moment. Of two changes of a study nobody could say what held between them."""
        if not step.twin:
            return None
        if step.twin == "same":
            # A key or a lease makes it one request that arrives twice; without, there is nothing to hold it to.
            return call if call.once is not None or call.lease is not None else None
        if step.twin == "rival" and call.lease is not None:
            other = dice.choice(("tell", "release", "cancel", "report"))
            if other == "cancel":
                return self._add(client.cancel(call.lease.study, call.lease.trial))
            return self._add(getattr(client, other)(call.lease, dice))
        second = self.clients[dice.randrange(len(self.clients))]
        chosen = self._choose(dice.choice(("claim", "ask", "tell", "report", "release", "steer")), second, dice)
        if chosen is not None and chosen.method == call.method == "patch_study":
            return None
        return chosen

    def _choose(self, act: str, client: Client, dice: random.Random) -> Call | None:
        """The call that this act comes to, or None where there is nothing that it could be about."""
        number = dice.choice(self.auditor.studies)
        if act == "claim":
            return self._add(client.claim(dice))
        if act == "ask":
            return self._add(client.ask(number, dice))
        if act in ("report", "tell", "release"):
            client = client if client.held else max(self.clients, key=lambda other: len(other.held))
            return self._add(getattr(client, act)(dice.choice(client.held), dice)) if client.held else None
        if act == "late" and client.past:
            return self._add(
                getattr(client, dice.choice(("report", "tell", "release")))(dice.choice(client.past), dice)
            )
        if act == "stranger":
            others = [lease for other in self.clients if other is not client for lease in other.held]
            if others:
                return self._add(getattr(client, dice.choice(("report", "tell", "release")))(dice.choice(others), dice))
        if act in ("cancel", "requeue"):
            return self._add(getattr(client, act)(number, dice.randrange(8)))
        if act in ("queue", "record", "steer"):
            return self._add(getattr(client, act)(number, dice))
        if act == "retry":
            waiting = [call for other in self.clients for call in other.unanswered]
            return dice.choice(waiting) if waiting else None
        if act == "reuse":
            return self._reused(client, dice)
        return None

    def _reused(self, client: Client, dice: random.Random) -> Call | None:
        """An old key with another body."""
        keyed = [call for call in self.calls if call.client == client.name and call.known and not call.error]
        keyed = [call for call in keyed if call.once is not None and call.answer is not None]
        if not keyed:
            return None
        old = dice.choice(keyed)
        assert old.once is not None
        once = replace(old.once, digest=b"another body")
        return self._add(Call(client.name, old.method, (*old.args[:-1], once), note={"reused": True}))

    def _add(self, call: Call) -> Call:
        self.calls.append(call)
        return call

    # Making calls, with what goes wrong

    def _make(self, step: Step, call: Call, place: Place, twin: Call | None) -> None:
        doing: list[Callable[[], None]] = []
        if step.fault in ("before", "after", "during", "terminate"):
            place.hurt()
            place.proxy.arm(step.fault, step.nth)  # type: ignore[arg-type]
        elif step.fault == "kill":
            delay = random.Random(step.dice).uniform(0, 0.03)
            doing.append(lambda: self._kill(place, delay))
        hidden = step.fault in ("lost", "kill")
        doing.append(lambda: self._send(call, place, hidden=hidden))
        if twin is not None:
            there = self.house.places[(step.where + 1) % len(self.house.places)] if step.dice % 3 else place
            doing.append(lambda: self._send(twin, there, hidden=False))
        if len(doing) == 1:
            doing[0]()
        else:
            for result in together(*doing):
                if isinstance(result, Exception):
                    raise result
        if place.proxy.disarm():
            place.hurt()

    def _crowd(self, dice: random.Random) -> None:
        """Everybody asks for a trial of one study at the same moment, each at another coordinator."""
        number = dice.choice(self.auditor.studies)
        calls = [self._add(client.ask(number, dice)) for client in self.clients]
        places = [self.house.places[turn % len(self.house.places)] for turn in range(len(calls))]
        for result in together(
            *[
                lambda call=call, place=place: self._send(call, place, hidden=False)
                for call, place in zip(calls, places, strict=True)
            ]
        ):
            if isinstance(result, Exception):
                raise result

    def _kill(self, place: Place, delay: float) -> None:
        time.sleep(delay)
        place.replace()

    def _send(self, call: Call, place: Place, *, hidden: bool) -> None:
        """Make one call and write what came of it into the books."""
        desk, hurt_at, began = place.desk, place.hurt_at, time.monotonic()
        call.tries += 1
        answer: Any = None
        error: Exception | None = None
        try:
            answer = desk.call(call.method, call.args)
        except _ANSWERS as refused:
            error = refused
        except (DatabaseUnavailable, Gone) as unknown:
            if "timeout expired" in str(unknown):
                self.excused += 1  # to connect took longer than `hpo.database.connect` waits for it
            elif max(hurt_at, place.hurt_at) < began - _GRACE_S:
                self._break(f"{call} raised without cause {type(unknown).__name__}: {unknown}")
            self._unanswered(call, place, str(type(unknown).__name__))
            return
        except Exception as fault:
            where = "".join(traceback.format_exception(fault))
            self._break(f"{call} raised {type(fault).__name__}: {fault}\n{where}")
            return
        if hidden:
            if error is None:
                self._consistent(call, call.hidden, answer)
                call.hidden = answer
            self._unanswered(call, place, "its answer is lost")
        else:
            self._answered(call, place, answer, error)

    def _unanswered(self, call: Call, place: Place, why: str) -> None:
        self.trace.append(f"    at {place.number}: {call} -> {why}")
        owner = next(client for client in self.clients if client.name == call.client)
        if not call.known and call not in owner.unanswered:
            owner.unanswered.append(call)

    def _answered(self, call: Call, place: Place, answer: Any, error: Exception | None) -> None:
        owner = next(client for client in self.clients if client.name == call.client)
        self._consistent(call, call.hidden, answer, error)
        if call.known and call.error is None:
            self._consistent(call, call.answer, answer, error)
        if call.note.get("reused") and not isinstance(error, KeyReused):
            self._break(f"{call} came with the key of another body and was answered {answer or error!r}")
        first = not call.known
        if first or call.error is not None:
            call.known, call.answer, call.error = True, answer, error
        shown = replace(call, known=True, answer=answer, error=error).outcome
        self.trace.append(f"    at {place.number}: {call} -> {shown}")
        if call in owner.unanswered:
            owner.unanswered.remove(call)
        if call.method in ("claim", "ask") and isinstance(answer, Lease):
            if answer.lease not in owner.given:
                owner.given.add(answer.lease)
                owner.held.append(answer)
        elif call.lease is not None:
            self._spoken(owner, call, answer, error)
        elif isinstance(error, Invalid) or (isinstance(error, KeyReused) and not call.note.get("reused")):
            self._break(f"{call} was refused: {error}")

    def _spoken(self, owner: Client, call: Call, answer: Any, error: Exception | None) -> None:
        """A client has heard what became of a lease; being told that it is lost has to be true."""
        assert call.lease is not None
        over = call.method != "report" or answer is None or answer.verdict == Verdict.LOST
        mine = call.lease.lease in owner.given
        if over and call.lease in owner.held:
            owner.held.remove(call.lease)
            owner.past.append(call.lease)
        if isinstance(error, NotFound):
            self._break(f"{call}: {error}")
        lost = isinstance(error, LeaseLost) or (call.method == "report" and answer.verdict == Verdict.LOST)
        if not lost and not mine:
            self._break(f"{call} was heard, and the lease is another's: {answer or error}")
        if lost and mine:
            (row,) = self.auditor.rows(
                "SELECT state FROM whetstone.attempts WHERE attempt_id = %(lease)s", lease=call.lease.lease
            )
            if row.state == "leased":
                self._break(f"{call} was answered lost, and the lease is live")

    def _consistent(self, call: Call, before: Any, answer: Any, error: Exception | None = None) -> None:
        """The same call again is answered the same."""
        if before is None or call.method in ("report", "patch_study", "cancel_trial"):
            return
        if call.once is None and call.method in KEYED:
            return
        if answer != before:
            self._break(f"{call} was answered {before} first, then {error or answer}")

    # Repetitions, time, reapers

    def _repeat(self, place: Place, dice: random.Random) -> None:
        """Make a call that was answered once more: it changes nothing, and where it has a key or a token, the same."""
        done = [call for call in self.calls if call.known and self._repeatable(call)]
        if not done:
            return
        call = dice.choice(done)
        with self.house.quiet():
            self.auditor.settle()
            before = self.auditor.whole()
            refused = call.error
            self._send(call, place, hidden=False)
            after = self.auditor.whole()
        for table, rows in before.items():
            if after[table] != rows:
                self._break(f"{call}, repeated, changed {table}:\n{rows}\n{after[table]}")
        if refused is not None and call.error is None:
            self._break(f"{call} was refused first ({refused}), then answered {call.answer}")

    def _repeatable(self, call: Call) -> bool:
        if call.error is not None:
            return call.lease is not None and call.method != "report"
        if call.method in ("claim", "ask"):
            return call.once is not None and call.answer is not None
        return call.method in ("tell", "release", "report", "add_trial", "requeue_trial")

    def _visit(self, place: Place) -> None:
        try:
            place.call("expire", ())
        except (DatabaseUnavailable, Gone) as error:
            if place.hurt_at < time.monotonic() - _GRACE_S:
                self._break(f"expire raised {error}")

    def _pass_time(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self.term_s / 4))
            self._judge([])

    def _judge(self, broken: Sequence[str]) -> None:
        """Look at the database; stop at the first moment at which something is broken."""
        self.broken += [*broken, *self.auditor.look()]
        looked = time.monotonic()
        for lease, seconds in self.auditor.overdue():
            if seconds > 2 * self.term_s:
                if self.house.came_by(time.monotonic() - seconds + 0.05, looked):
                    self._break(f"lease {lease} has been over for {seconds:.2f} s, and nobody has taken its trial back")
                else:
                    self.excused += 1
        if self.broken:
            raise Broken("\n".join(self.broken))

    def _break(self, what: str) -> None:
        self.broken.append(what)

    # The end

    def _answer_all(self) -> None:
        """Most of those who wait for an answer get it; the others never come back."""
        dice = random.Random(self.schedule.number)
        for client in self.clients:
            for call in list(client.unanswered):
                if dice.random() < 0.7:
                    self._patiently(call)
        self._judge([])

    def _patiently(self, call: Call) -> None:
        for _ in range(20):
            self._send(call, self.house.places[call.tries % len(self.house.places)], hidden=False)
            if call.known:
                return
            time.sleep(0.05)
        self._break(f"{call} is never answered")

    def _work_off(self) -> None:
        """Raise each budget by one, work until each study is finished, and see that each is used exactly."""
        worker = Client("last", Principal("token:last", "worker", "last"), self.mark)
        self.clients.append(worker)
        place = self.house.places[-1]
        for number in self.auditor.studies:
            standing = {row.study_id: row for row in self.auditor.rows(STANDING)}[number]
            budget = max(standing.budget_trials, standing.used) + 1
            change = {"state": "running", "budget": {"trials": budget}, "concurrency": None}
            self._patiently(self._add(Call("last", "patch_study", (number, change))))
            end = time.monotonic() + _PATIENCE_S
            while time.monotonic() < end:
                call = self._add(worker.ask(number, random.Random(0)))
                self._patiently(call)
                if call.error is None:
                    self._patiently(self._add(worker.tell(call.answer, random.Random(call.answer.lease), "complete")))
                elif place.call("get_study", (number,)).state == "finished":
                    break
                else:  # somebody who died holds a trial yet
                    self._pass_time(self.term_s / 6)
                self._judge([])
            (standing,) = [row for row in self.auditor.rows(STANDING) if row.study_id == number]
            if (standing.state, standing.used) != ("finished", budget):
                self._break(f"study {number} is {standing.state} with {standing.used} of {budget} trials used")
        self._judge([])

    def _agree(self) -> None:
        """All coordinators say the same of every study, and what they say is so."""
        for number in self.auditor.studies:
            views = [place.call("get_study", (number,)).model_dump() for place in self.house.places]
            (standing,) = [row for row in self.auditor.rows(STANDING) if row.study_id == number]
            for view in views:
                view["budget"]["hours_used"] = round(view["budget"]["hours_used"], 9)
                if view["best"]:
                    view["best"]["seconds"] = round(view["best"]["seconds"], 6)
                if view != views[0]:
                    self._break(f"two coordinators differ on study {number}: {views[0]} and {view}")
            if views[0]["budget"]["trials_used"] != standing.used:
                self._break(f"study {number} used {standing.used} trials, and {views[0]['budget']} is shown")
        self._judge([])

    def close(self) -> None:
        self.house.close()
        self.auditor.close()


def play(schedule: Schedule, url: str, folder: Path, *, term_s: float = 0.5) -> int:
    """Play a schedule on a migrated database; return how often a late expiry was excused for want of machine time.

    Raises:
        Broken: a promise was broken.
    """
    player = Player(schedule, url, folder / uuid.uuid4().hex[:8], term_s)
    try:
        player.play()
        for number in player.auditor.studies:
            player.house.places[0].call("delete_study", (number,))
    except Broken as broken:
        player.auditor.rows(
            "UPDATE whetstone.studies SET state = 'stopped' WHERE study_id = ANY(%(studies)s) RETURNING study_id"
        )  # so that the schedules after this one are given no trial of it
        trace = "\n".join(player.trace)
        about = f"schedule {schedule.number} of seed {schedule.seed}"
        raise Broken(f"{about}: {broken}\n\n{trace}\n\n{about} broke a promise: {broken}") from None
    except Exception as error:
        trace = "\n".join(player.trace)
        raise Broken(f"schedule {schedule.number} of seed {schedule.seed} ended in {error!r}\n\n{trace}") from error
    finally:
        player.close()
    return player.excused
