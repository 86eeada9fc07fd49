"""The figures of an API process, over HTTP: trials a second, asks and tells under load, reads, start, the fleet."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import sqlalchemy as sa

from benchmarks import calls, fleet, past, stock
from benchmarks.fleet import percentile
from benchmarks.measure import median, say, spread
from benchmarks.place import coordinator
from benchmarks.processor import Processor, said
from benchmarks.sheet import Sheet
from hpo.coordinator import Coordinator

HTTP = {"tpe": "http_trials_vs_stock_tpe", "random": "http_trials_vs_stock_random"}
READS = {"list_ms": "studies", "page_ms": "trials", "best_ms": "best"}


def http(sheet: Sheet) -> None:
    """Trials a second of one core's API process, by turns with stock Optuna's."""
    scale = sheet.scale
    engine = sheet.place.database("http")
    hpo = coordinator(engine)
    for sampler, name in HTTP.items():
        if not sheet.wants(name):
            continue
        rates: dict[str, list[float]] = {"ours": [], "stock": []}
        cores: dict[str, list[float]] = {"ours": [], "stock": []}
        trouble = set()
        for turn in range(scale.http_turns):
            study = past.launch(hpo, f"{sampler}-{turn}", sampler)
            past.fill(engine, study, scale.behind, ours=True)
            theirs, other = stock.filled(sheet.place, sampler, scale.behind)
            for who, database, stocks in (("ours", engine, ""), ("stock", other, theirs)):
                with sheet.place.pinned() as core, sheet.place.serve(database, core=core, stock=stocks) as served:
                    load = fleet.trials(served.url, served.token, study, clients=scale.clients,
                                        warm_s=scale.http_s / 4, seconds=scale.http_s)  # fmt: skip
                    used = Processor({"API": served.pid})
                    rate, heard = asyncio.run(load)
                    cores[who].append(used.cores()["API"])
                rates[who].append(rate)
                if heard.errors:
                    trouble.add(f"{who}: {sheet.heard(f'{name} {who} {turn}', heard)}")
        sheet.results.details[name] = {"trials/s": rates, "cores": cores}
        ours, theirs_ = median(rates["ours"]), median(rates["stock"])
        note = f"{ours:.1f} trials/s ({spread(rates['ours'], 1)}) against {theirs_:.1f} ({spread(rates['stock'], 1)})"
        note += f"; API {median(cores['ours']):.2f} and {median(cores['stock']):.2f} cores; {scale.clients} clients"
        sheet.add(name, ours / theirs_, "; ".join([note, *sorted(trouble)]))


def paced(sheet: Sheet) -> None:
    """Asks of workers that take their time."""
    scale = sheet.scale
    engine = sheet.place.database("paced")
    study = past.launch(coordinator(engine), "paced", "tpe")
    past.fill(engine, study, scale.behind, ours=True)
    with sheet.place.serve(engine) as served:
        load = fleet.paced(served.url, served.token, study, workers=scale.clients, period_s=2.0, seconds=scale.paced_s)
        heard = asyncio.run(load)
    met = sheet.heard("paced", heard)
    asks = heard.ms["ask"]
    note = f"{len(asks)} asks, median {median(asks):.1f}, {spread(asks, 1)}; TPE, {scale.clients} workers; {met}"
    sheet.add("paced_ask_p95_ms", percentile(asks, 0.95), note)


def held(sheet: Sheet) -> None:
    """Tells beside claims that wait and streams that are open."""
    scale = sheet.scale
    engine = sheet.place.database("held")
    study = past.launch(coordinator(engine), "held", "random")
    with sheet.place.serve(engine) as served:
        load = fleet.held(served.url, served.token, study, claims=scale.held, streams=scale.held, tells=scale.tells)
        heard = asyncio.run(load)
    met = sheet.heard("held", heard)
    tells = heard.ms["tell"]
    note = f"95th of {len(tells)} tells, {spread(tells, 1)}; {scale.held} claims wait, as many streams; {met}"
    sheet.add("held_claims_tell_ms", percentile(tells, 0.95), note)


def big(sheet: Sheet) -> None:
    """Reading a study of many trials and reports, and starting an API process on it."""
    scale = sheet.scale
    engine = sheet.place.database("big")
    study = past.launch(coordinator(engine), "big", "tpe")
    past.fill(engine, study, scale.many, reports=scale.reports, infeasible=True, ours=True)
    if sheet.wants("cold_start_s"):
        _starts(sheet, study, engine)
    if sheet.wants(*READS):
        _reads(sheet, study, engine)


def _starts(sheet: Sheet, study: int, engine: sa.Engine) -> None:
    whole, up = [], []
    for _ in range(sheet.scale.starts):
        began = time.perf_counter()
        with sheet.place.serve(engine) as served:
            heard = asyncio.run(fleet.first_ask(served.url, served.token, study))
            whole.append(time.perf_counter() - began)
            up.append(served.exec_s)
        if heard.errors:
            raise RuntimeError(sheet.heard("cold_start_s", heard))
    sheet.results.details["cold_start_s"] = {"whole": whole, "until it says that it is up": up}
    note = f"{spread(whole)}, {median(up):.2f} of it until the process says that it is up; TPE"
    sheet.add("cold_start_s", median(whole), f"{note}, {_size(sheet)}")


def _size(sheet: Sheet) -> str:
    return f"{sheet.scale.many:,} trials x {sheet.scale.reports} reports"


def _reads(sheet: Sheet, study: int, engine: sa.Engine) -> None:
    """The methods, and the same over HTTP: the list of studies, pages of trials in each order, the best trials."""
    hpo = coordinator(engine)
    pages, paths = {}, {"studies": "/api/v1/studies", "best": f"/api/v1/studies/{study}/best"}
    for order in ("number", "-value", "value"):
        first = hpo.list_trials(study, order=order, limit=50)
        for where, cursor in (("first", None), ("deeper", _deeper(hpo, study, order, first.next))):
            pages[f"trials, {order}, {where} page"] = (order, cursor)
            more = f"&cursor={cursor}" if cursor else ""
            paths[f"trials, {order}, {where} page"] = f"/api/v1/studies/{study}/trials?order={order}{more}"

    def clocked(call: Callable[[], object]) -> calls.Side:
        def side() -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        return side

    def page(order: str, cursor: str | None) -> calls.Side:
        return clocked(lambda: hpo.list_trials(study, order=order, cursor=cursor, limit=50))

    sides = {"studies": clocked(hpo.list_studies), "best": clocked(lambda: hpo.best(study))}
    sides |= {name: page(order, cursor) for name, (order, cursor) in pages.items()}
    ms = sheet.results.details["reads"] = calls.turns(sides, sheet.scale.reads)
    with sheet.place.serve(engine) as served:
        heard = asyncio.run(fleet.reads(served.url, served.token, paths, sheet.scale.reads))
    met = sheet.heard("reads over HTTP", heard)
    for figure, kind in READS.items():
        each = {name: median(values) for name, values in ms.items() if name.startswith(kind)}
        worst = max(each, key=lambda name: each[name])
        http = median(heard.ms[worst])
        ways = ", ".join(f"{name.removeprefix('trials, ')} {value:.1f}" for name, value in each.items())
        note = f"{spread(ms[worst], 1)}; over HTTP {http:.1f}; {_size(sheet)}"
        sheet.add(figure, each[worst], f"{note}; ms: {ways}" if len(each) > 1 else f"{note}; {met}")


def _deeper(hpo: Coordinator, study: int, order: str, cursor: str | None) -> str | None:
    """The cursor of a page that many others come before."""
    for _ in range(3):
        if cursor is not None:
            cursor = hpo.list_trials(study, order=order, cursor=cursor, limit=1000).next or cursor
    return cursor


def workers(sheet: Sheet) -> None:
    """The fleet: simulated workers on the cores that PostgreSQL and the API share with them."""
    heard, cores = _fleet(sheet, "fleet", sheet.scale.workers, sheet.scale.fleet_s, sheet.scale.pace.trial_s)
    reports = heard.ms["report"]
    others = ", ".join(
        f"{kind} {percentile(heard.ms[kind], 0.99):.0f}" for kind in ("claim", "tell") if kind in heard.ms
    )
    note = f"{len(reports):,} reports, median {median(reports):.1f}, most {max(reports):.0f}; 99th of {others}; {cores}"
    sheet.add("fleet_report_p99_ms", percentile(reports, 0.99), note)
    sheet.add("fleet_errors", heard.errors.total(), f"of {sum(map(len, heard.ms.values())):,} requests; "
              f"{sheet.heard('fleet', heard)}; {heard.opened:,} connections")  # fmt: skip


def bend(sheet: Sheet) -> None:
    """More and more workers, until reports take longer than they may or something fails."""
    bound = float(sheet.goals["fleet_report_p99_ms"][1].split()[1])
    for count in sheet.scale.bend:
        heard, cores = _fleet(sheet, f"bend {count}", count, sheet.scale.bend_s, sheet.scale.pace.trial_s / 2)
        p99 = percentile(heard.ms["report"], 0.99)
        met = sheet.heard(f"bend {count}", heard)
        others = ", ".join(
            f"{kind} {percentile(heard.ms[kind], 0.99):.0f}" for kind in ("claim", "tell") if kind in heard.ms
        )
        sheet.also(f"bend_report_p99_ms, {count:,} workers", p99, "ms", f"99th of {others}; {cores}; {met}")
        say.print(f"  {count:,} workers: {p99:.0f} ms; {cores}; {met}")
        if p99 > bound or heard.errors:
            return


def _fleet(sheet: Sheet, name: str, count: int, seconds: float, ramp_s: float) -> tuple[fleet.Heard, str]:
    engine = sheet.place.database("fleet")
    past.launch(coordinator(engine), "fleet", "random", workload="siamese")
    with sheet.place.serve(engine) as served:
        used = Processor({"API": served.pid, "PostgreSQL": sheet.place.pid, "load": os.getpid()})
        load = fleet.workers(
            served.url, served.token, count=count, pace=sheet.scale.pace, ramp_s=ramp_s, seconds=seconds
        )
        heard = asyncio.run(load)
        cores = used.cores()
    cores["load"] = round(cores["load"] - cores["PostgreSQL"] - cores["API"], 2)  # both are children of this process
    return heard, said(cores)
