"""The coordinator's methods, timed and counted in one process, by turns with stock Optuna on the same PostgreSQL.

Promise: sides that are compared take turns, call by call; what was cold (a history in memory, plans of PostgreSQL) is
warmed up before. A round trip is counted where it passes (benchmarks/wire.py), together with what a call leaves to be
done behind it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.samplers import BaseSampler
from sqlalchemy.engine import make_url

from benchmarks import past, stock
from benchmarks.place import WORKER, Place, address, coordinator
from benchmarks.wire import Relay, writes
from hpo import database
from hpo.coordinator import Coordinator
from hpo.protocol import AskRequest, ClaimRequest, EpochReport, Lease, ReportRequest, TellRequest

EPOCHS = 5
SETTLE_S = 0.05
"""What a call leaves to a thread behind it is counted with it."""

Side = Callable[[], float]
"""One call; the seconds it took."""


def ask(hpo: Coordinator, study: int) -> Lease:
    return hpo.ask(study, AskRequest(worker="bench"), WORKER)


def report(hpo: Coordinator, lease: Lease, epochs: range) -> None:
    reports = [EpochReport(epoch=epoch, value=0.5 + epoch / 1e4, metrics={"loss": 0.3}) for epoch in epochs]
    hpo.report(lease.lease, ReportRequest(token=lease.token, reports=reports), WORKER)


def tell(hpo: Coordinator, lease: Lease, outcome: str = "complete") -> None:
    value = {"complete": 0.5}.get(outcome)
    hpo.tell(lease.lease, TellRequest(token=lease.token, outcome=outcome, value=value), WORKER)


def turns(sides: Mapping[str, Side], count: int, *, warm: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each side's calls, one after another in turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm, count):
        for name, side in sides.items():
            seconds = side()
            if turn >= 0:
                found[name].append(1000 * seconds)
    return found


def our_ask(hpo: Coordinator, study: int) -> Side:
    """An ask, and after it, untimed, the tell that ends its trial."""

    def call() -> float:
        began = time.perf_counter()
        lease = ask(hpo, study)
        seconds = time.perf_counter() - began
        tell(hpo, lease)
        return seconds

    return call


def stock_ask(study: optuna.Study) -> Side:
    def call() -> float:
        began = time.perf_counter()
        trial = stock.ask(study)
        seconds = time.perf_counter() - began
        study.tell(trial, 0.5)
        return seconds

    return call


class Sampling:
    """How long Optuna's samplers themselves take, in this thread and under whatever calls them."""

    def __init__(self) -> None:
        self._local = threading.local()

    def take(self) -> float:
        """Seconds since the last call."""
        seconds: float = getattr(self._local, "seconds", 0.0)
        self._local.seconds = 0.0
        return seconds

    @contextlib.contextmanager
    def watched(self) -> Iterator[Sampling]:
        """Every sampler class there is, with a clock around its sampling."""
        put: list[tuple[type, str, Any]] = []
        waiting: list[type] = [BaseSampler]
        for cls in waiting:
            waiting += cls.__subclasses__()
            for name in ("sample_relative", "sample_independent"):
                if name in vars(cls):
                    put.append((cls, name, vars(cls)[name]))
                    setattr(cls, name, self._timed(vars(cls)[name]))
        try:
            yield self
        finally:
            for cls, name, method in put:
                setattr(cls, name, method)

    def _timed(self, method: Any) -> Any:
        local = self._local

        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(local, "inside", False):  # one sampler may ask another
                return method(*args, **kwargs)
            local.inside = True
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                local.inside = False
                local.seconds = getattr(local, "seconds", 0.0) + time.perf_counter() - began

        return timed


def overhead(hpo: Coordinator, studies: Mapping[str, int], count: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of asks of these studies, by turns: `ask` as a whole, `sampler` of that inside Optuna's sampler."""
    sampling = Sampling()
    samplers: dict[str, list[float]] = {name: [] for name in studies}

    def side(name: str, study: int) -> Side:
        call = our_ask(hpo, study)

        def timed() -> float:
            sampling.take()
            seconds = call()
            samplers[name].append(1000 * sampling.take())
            return seconds

        return timed

    with sampling.watched():
        asks = turns({name: side(name, study) for name, study in studies.items()}, count)
    return {name: {"ask": asks[name], "sampler": samplers[name][-count:]} for name in studies}


def busy(hpo: Coordinator, study: int, trials: int, reports: int) -> None:
    """Leave trials of a study running, with so many reports each."""
    for _ in range(trials):
        report(hpo, ask(hpo, study), range(reports))


def stock_busy(study: optuna.Study, engine: sa.Engine, trials: int, reports: int) -> None:
    for _ in range(trials):
        past.reported(engine, stock.ask(study)._trial_id, reports)


@dataclass
class Cost:
    """What calls of one kind cost: each list has a number a call."""

    round_trips: list[int] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    transactions: list[int] = field(default_factory=list)


def costs(place: Place, count: int, behind: int) -> dict[str, Cost]:
    """Round trips and commits of each way to ask, to report and to tell; and of stock Optuna's (`stock ask`, ...)."""
    engine = place.database("wire")
    plain = coordinator(engine)
    studies = {
        "random": past.launch(plain, "random", "random"),
        "tpe": past.launch(plain, "tpe", "tpe", pruner="median"),
        "claim": past.launch(plain, "claim", "random", workload="siamese"),
    }
    for study in studies.values():
        past.fill(engine, study, behind, reports=50, ours=True)
    found: dict[str, Cost] = {}
    folder = place.folder / "wire"
    folder.mkdir(exist_ok=True)
    with place.undisturbed(), Relay(address(engine), folder) as relay, writes(engine) as written:

        @contextlib.contextmanager
        def counted(name: str) -> Iterator[None]:
            before, wrote = relay.count, written.count
            yield
            time.sleep(SETTLE_S)
            passed = relay.count - before
            cost = found.setdefault(name, Cost())
            cost.round_trips.append(passed.round_trips)
            cost.commits.append(written.count - wrote)
            cost.transactions.append(passed.transactions)

        through = database.connect(relay.url)
        hpo = coordinator(through)
        outcomes = ("complete", "infeasible", "pruned", "failed")
        for turn in range(-3, count):
            if turn == 0:
                found.clear()
            for name, study in studies.items():
                with counted(f"ask ({name})"):
                    lease = ask(hpo, study) if name != "claim" else _claim(hpo)
                with counted(f"report ({name}, {EPOCHS} epochs)"):
                    report(hpo, lease, range(EPOCHS))
                with counted(f"report ({name}, heartbeat)"):
                    report(hpo, lease, range(0))
                outcome = outcomes[turn % len(outcomes)]
                with counted(f"tell ({name}, {outcome})"):
                    tell(hpo, lease, outcome)
        through.dispose()
        name, theirs = stock.filled(place, "random", behind)
        loaded = stock.load(_through(relay, theirs), name)
        for _ in range(count):
            with counted("ask (stock Optuna)"):
                trial = stock.ask(loaded)
            with counted(f"report (stock Optuna, {EPOCHS} epochs)"):
                for step in range(EPOCHS):
                    trial.report(0.5, step)
            with counted("tell (stock Optuna)"):
                loaded.tell(trial, 0.5)
    return found


def _through(relay: Relay, engine: sa.Engine) -> str:
    """The address of a database by way of the relay."""
    return make_url(relay.url).set(database=engine.url.database).render_as_string(hide_password=False)


def _claim(hpo: Coordinator) -> Lease:
    lease = hpo.claim(ClaimRequest(worker="bench-claims", device="cpu", memory_bytes=2**34), WORKER)
    assert lease is not None, "the study runs and has no budget"
    return lease
