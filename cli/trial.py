"""`whetstone trial`: one study's trials, two of them side by side, and points of one's own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli import output
from cli.remote import Json, StudyName, Token, Url, connect, find_study
from hpo import yaml_document
from hpo.errors import Fault, Invalid

app = typer.Typer(help="List, show, compare, add, correct, cancel and requeue trials.", no_args_is_help=True)
Number = Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="The trial's number.")]


@app.command("list")
def list_trials(
    study: StudyName,
    state: Annotated[str | None, typer.Option(help="Only trials in this state.")] = None,
    order: Annotated[str, typer.Option(help="number, value or -value (the largest first).")] = "number",
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 50,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """List a study's trials."""
    with connect(url, token) as client:
        item = find_study(client, study)
        params = {"order": order, "limit": limit, "state": state}
        rows = list(client.pages(f"/api/v1/studies/{item['study']}/trials", params=params))
    if json:
        output.print_json(rows)
        return
    columns = [
        ("trial", "right"),
        "state",
        ("value", "right"),
        ("epoch", "right"),
        ("time", "right"),
        ("attempts", "right"),
        ("worker", "cut"),
        "reason",
    ]
    cells = [
        [
            str(t["trial"]),
            output.state(t["state"]),
            output.value_of(t, item["workload"]),
            "-" if t["epoch"] is None else str(t["epoch"]),
            output.seconds(t["seconds"]),
            str(t["attempts"]),
            output.escape(t["worker"] or "-"),
            output.escape(t["reason"][:60]),
        ]
        for t in rows
    ]
    output.out.print(output.table(None, columns, cells) if cells else "No such trials.")


@app.command()
def show(study: StudyName, trial: Number, url: Url = None, token: Token = None, json: Json = False) -> None:
    """Show one trial: hyperparameters, attempts, learning curve."""
    with connect(url, token) as client:
        item = find_study(client, study)
        found = client.get(f"/api/v1/studies/{item['study']}/trials/{trial}")
    if json:
        output.print_json(found)
        return
    output.out.print(
        f"Trial {trial} of [bold]{output.escape(item['name'])}[/] is {output.state(found['state'])}"
        + (f": {output.escape(found['reason'])}" if found["reason"] else "")
    )
    if found["seeded_from"]:
        output.out.print(f"evaluated as trial {found['seeded_from']['trial']} of study {found['seeded_from']['study']}")
    output.out.print(f"value {output.value_of(found, item['workload'])}, seed {found['seed']}")
    if found.get("score"):
        output.out.print(f"on its study's tasks: {_score(found['score'])}")
    output.out.print()
    output.out.print(output.parameter_table(found["params"]))
    if found["history"]:
        rows = [
            [
                str(a["attempt"]),
                a["state"],
                output.escape(a["worker"] or "-"),
                output.escape(a["device"] or "-"),
                output.seconds(a["seconds"]),
                output.escape(a["reason"]),
            ]
            for a in found["history"]
        ]
        output.out.print()
        output.out.print(
            output.table(
                None, [("attempt", "right"), "state", ("worker", "cut"), ("device", "cut"), "time", "reason"], rows
            )
        )
    if found["curve"]:
        output.out.print()
        rows = [
            [str(p["epoch"]), output.value_of(p, item["workload"]), output.number(p["metrics"].get("loss"))]
            for p in found["curve"][-20:]
        ]
        output.out.print(output.table(None, [("epoch", "right"), ("value", "right"), ("loss", "right")], rows))
    traceback = next((a["traceback"] for a in reversed(found["history"]) if a["traceback"]), "")
    if traceback:
        output.out.print(f"\n{output.escape(traceback)}", soft_wrap=True)


@app.command()
def compare(
    study: StudyName,
    a: Annotated[int, typer.Argument(metavar="A", min=0, help="A trial's number.")],
    b: Annotated[int, typer.Argument(metavar="B", min=0, help="Another's.")],
    other: Annotated[
        str | None, typer.Option("--with", help="The study of B, if it is another one on the same tasks.")
    ] = None,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Compare two trials task by task: is their difference more than noise?"""
    with connect(url, token) as client:
        params = {"a": a, "b": b}
        if other is not None:
            params["b_study"] = find_study(client, other)["study"]
        found = client.get(f"/api/v1/studies/{find_study(client, study)['study']}/compare", params=params)
    if json:
        output.print_json(found)
        return
    for side in (found["a"], found["b"]):
        name = f"trial {side['trial']} of [bold]{output.escape(side['study_name'])}[/]"
        output.out.print(f"{name}: {_score(side['score'])}")
    rows = [
        [label, f"{found[key]:,}", output.percent(found[key] / found["tasks"])]
        for label, key in (
            ("both right", "both"),
            (f"only A (trial {a}) right", "only_a"),
            (f"only B (trial {b}) right", "only_b"),
            ("neither", "neither"),
        )
    ]
    output.out.print()
    output.out.print(output.table(None, ["tasks", ("count", "right"), ("share", "right")], rows))
    output.out.print()
    output.out.print(output.escape(found["verdict"]), soft_wrap=True)


def _score(score: dict[str, Any]) -> str:
    low, high = output.percent(score["low"]), output.percent(score["high"])
    return f"{output.percent(score['accuracy'])} of {score['tasks']:,} tasks (95% interval {low} to {high})"


@app.command()
def add(
    study: StudyName,
    params: Annotated[str, typer.Argument(help='The point, as YAML or JSON: "{eta: 0.01, mu: 0.9, lambda: 0}".')],
    value: Annotated[float | None, typer.Option(help="Record it as finished with this value.")] = None,
    infeasible: Annotated[bool, typer.Option("--infeasible", help="Record it as infeasible.")] = False,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Queue a point of your own, or record one that is finished."""
    body: dict[str, Any] = {"params": yaml_document.read(params, "params", "the point")}
    if value is not None:
        body["value"] = value
    if infeasible:
        body["outcome"] = "infeasible"
    with connect(url, token) as client:
        made = client.post(f"/api/v1/studies/{find_study(client, study)['study']}/trials", json=body)
    if json:
        output.print_json(made)
    else:
        output.out.print(f"Trial {made['trial']} is {output.state(made['state'])}.")


@app.command()
def correct(
    study: StudyName,
    trial: Number,
    value: Annotated[float | None, typer.Option(help="The value it should have had.")] = None,
    infeasible: Annotated[
        bool, typer.Option("--infeasible", help="It has none: its point cannot be evaluated.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why, for whoever looks at the trial.")] = "",
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Correct the outcome of a trial that has ended; what is suggested next follows it."""
    if (value is None) != infeasible:
        raise Invalid([Fault("", "give --value or --infeasible, one of them")], "the command")
    outcome = {"outcome": "infeasible"} if infeasible else {"value": value}
    with connect(url, token) as client:
        item = find_study(client, study)
        made = client.patch(f"/api/v1/studies/{item['study']}/trials/{trial}", json={**outcome, "reason": reason})
    if json:
        output.print_json(made)
    else:
        shown = "" if infeasible else f" with value {output.value_of(made, item['workload'])}"
        output.out.print(f"Trial {made['trial']} is {output.state(made['state'])}{shown}.")


def _act(study: str, trial: int, action: str, url: str | None, token: str | None) -> None:
    with connect(url, token) as client:
        made = client.post(f"/api/v1/studies/{find_study(client, study)['study']}/trials/{trial}/{action}")
    output.out.print(f"Trial {made['trial']} is {output.state(made['state'])}.")


@app.command()
def cancel(study: StudyName, trial: Number, url: Url = None, token: Token = None) -> None:
    """Cancel a queued or running trial."""
    _act(study, trial, "cancel", url, token)


@app.command()
def requeue(study: StudyName, trial: Number, url: Url = None, token: Token = None) -> None:
    """Queue the same point once more."""
    _act(study, trial, "requeue", url, token)
