"""The figures of the coordinator's own methods, in this process: asks against stock Optuna's, overhead, round trips."""

from __future__ import annotations

from benchmarks import calls, past, stock
from benchmarks.measure import median, spread
from benchmarks.place import address, coordinator
from benchmarks.sheet import Sheet


def versus_stock(sheet: Sheet) -> None:
    """Asks with the random sampler, by turns with stock Optuna's."""
    scale = sheet.scale
    engine = sheet.place.database("asks")
    hpo = coordinator(engine)
    study = past.launch(hpo, "behind", "random")
    past.fill(engine, study, scale.behind, ours=True)
    name, theirs = stock.filled(sheet.place, "random", scale.behind)
    sides = {"ours": calls.our_ask(hpo, study), "stock": calls.stock_ask(stock.load(address(theirs), name))}
    ms = sheet.results.details["ask_vs_stock"] = calls.turns(sides, scale.asks)
    ratio = median(ms["stock"]) / median(ms["ours"])
    note = f"stock {median(ms['stock']):.1f} ms ({spread(ms['stock'], 1)}), ours {median(ms['ours']):.2f} ms"
    sheet.add("ask_vs_stock", ratio, f"{note} ({spread(ms['ours'])}); {scale.behind:,} trials behind")


def overhead(sheet: Sheet) -> None:
    """What an ask costs beside its sampler, in a long study and in a short one."""
    scale = sheet.scale
    engine = sheet.place.database("overhead")
    hpo = coordinator(engine)
    studies = {}
    for sampler in ("random", "tpe"):
        for size in (scale.few, scale.many):
            studies[f"{sampler} {size:,}"] = study = past.launch(hpo, f"{sampler}-{size}", sampler)
            past.fill(engine, study, size, ours=True)
    found = sheet.results.details["overhead"] = calls.overhead(hpo, studies, scale.asks)
    beside = {
        name: median([a - s for a, s in zip(each["ask"], each["sampler"], strict=True)]) for name, each in found.items()
    }
    long = {name: value for name, value in beside.items() if name.endswith(f" {scale.many:,}")}
    worst = max(long, key=lambda name: long[name])
    for name, each in found.items():
        whole, own = median(each["ask"]), median(each["sampler"])
        sheet.also(f"ask_ms, {name} trials", whole, "ms", f"{own:.2f} of it in the sampler, {spread(each['ask'])}")
    said = ", ".join(f"{name} {value:.2f}" for name, value in beside.items())
    sheet.add("ask_overhead_ms", long[worst], f"the sampler's own time off; ms by sampler and trials: {said}")
    growth = {s: beside[f"{s} {scale.many:,}"] / beside[f"{s} {scale.few:,}"] for s in ("random", "tpe")}
    said = ", ".join(f"{name} {value:.2f}" for name, value in growth.items())
    sheet.add("ask_overhead_growth", max(growth.values()), f"{scale.many:,} over {scale.few:,} trials: {said}")


def costs(sheet: Sheet) -> None:
    """Round trips and commits, the dearest way of each call."""
    found = calls.costs(sheet.place, sheet.scale.counted, sheet.scale.few)
    sheet.results.details["costs"] = {name: vars(cost) for name, cost in found.items()}
    for what in ("round_trips", "commits"):
        for call in ("ask", "tell", "report"):
            ours = {n: c for n, c in found.items() if n.startswith(call) and "stock" not in n}
            each = {name: median(getattr(cost, what)) for name, cost in ours.items()}
            most = max(each, key=lambda name: each[name])
            highest = max(max(getattr(cost, what)) for cost in ours.values())
            transactions = max(median(cost.transactions) for cost in ours.values())
            theirs = next(c for n, c in found.items() if n.startswith(call) and "stock" in n)
            sheet.add(
                f"{call}_{what}",
                each[most],
                f"{most}; most of {len(ours)} ways x {sheet.scale.counted}: {highest}; transactions at most "
                f"{transactions:.0f}; stock {median(getattr(theirs, what)):.0f}",
            )


def busy(sheet: Sheet) -> None:
    """Asks beside running trials with many reports, against asks beside none, of ours and of stock Optuna."""
    scale = sheet.scale
    trials, reports = scale.running
    engine = sheet.place.database("busy")
    hpo = coordinator(engine)
    sides = {}
    for name in ("idle", "busy"):
        study = past.launch(hpo, name, "random")
        past.fill(engine, study, scale.few, ours=True)
        theirs, other = stock.filled(sheet.place, "random", scale.few)
        loaded = stock.load(address(other), theirs)
        if name == "busy":
            calls.busy(hpo, study, trials, reports)
            calls.stock_busy(loaded, other, trials, reports)
        sides[name], sides[f"stock {name}"] = calls.our_ask(hpo, study), calls.stock_ask(loaded)
    ms = sheet.results.details["busy"] = calls.turns(sides, scale.asks)
    ours, theirs_ = (median(ms[f"{s}busy"]) / median(ms[f"{s}idle"]) for s in ("", "stock "))
    note = f"{trials} running trials x {reports} reports: {median(ms['busy']):.2f} ms against {median(ms['idle']):.2f}"
    sheet.add("ask_busy_vs_idle", ours, f"{note}; stock {theirs_:.1f} x")
    sheet.also("stock_ask_busy_vs_idle", theirs_, "x", f"{spread(ms['stock busy'], 1)} ms busy")
