"""`whetstone study`: launch, watch and steer studies over REST."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cli import output, presets
from cli.overrides import assign
from cli.remote import Json, StudyName, Token, Url, connect, find_study
from hpo import yaml_document
from hpo.errors import Fault, Invalid

MAX_CHARACTERS = 1_000_000
"""As much as the server takes; a study with many points is long."""

app = typer.Typer(help="Launch, watch and steer studies.", no_args_is_help=True)


def read_document(path: Path) -> dict[str, Any]:
    """A study's document from a YAML or JSON file (`-` for standard input). Raises `Invalid`."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Invalid([Fault("", "it is not text in UTF-8")], str(path)) from None
    return yaml_document.read(text, at="", what=str(path), most=MAX_CHARACTERS)


@app.command()
def launch(
    file: Annotated[Path | None, typer.Argument(help="YAML or JSON file of the study; - reads stdin.")] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A study that comes with Whetstone: {', '.join(presets.names())}.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The study's name.")] = None,
    trials: Annotated[int | None, typer.Option(help="Budget in trials.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget in hours of training, summed over workers.")] = None,
    target: Annotated[float | None, typer.Option(help="Stop once a trial reaches this value.")] = None,
    sampler: Annotated[str | None, typer.Option(help="auto, tpe, gp, cmaes, random or qmc.")] = None,
    pruner: Annotated[str | None, typer.Option(help="none, median, successive_halving or hyperband.")] = None,
    seed_from: Annotated[
        list[str] | None, typer.Option(help="A study, by number or name, to begin with; may be given several times.")
    ] = None,
    seed_top: Annotated[
        int, typer.Option(min=1, max=1000, help="How many of its points to try where its values do not count here.")
    ] = 10,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Any other field, as KEY.PATH=VALUE.")] = None,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Launch a study from a file or a preset."""
    if (file is None) == (preset is None):
        raise Invalid([Fault("", "give a FILE or --preset NAME, one of them")], "the command")
    document = read_document(file) if file else {"preset": preset}
    overrides = assign(sets or [])
    for key, value in {"name": name, "sampler": sampler, "pruner": pruner}.items():
        if value is not None:
            overrides[key] = value
    budget = {k: v for k, v in {"trials": trials, "hours": hours, "target": target}.items() if v is not None}
    if budget:
        overrides["budget"] = {**overrides.get("budget", {}), **budget}
    if seed_from:
        named = [int(text) if text.isdecimal() else text for text in seed_from]
        overrides["seed_from"] = [{"study": study, "top": seed_top} for study in named]
    with connect(url, token) as client:
        made = client.post("/api/v1/studies", json=presets.merge(document, overrides))
        if json:
            output.print_json(made)
            return
        output.out.print(
            f"Study {made['study']} [bold]{output.escape(made['name'])}[/] is {output.state(made['state'])}."
        )
        _seeds(made)
        output.out.print(f"Watch it:   {client.url}/studies/{made['study']}", soft_wrap=True)
        output.out.print(f"Best so far: whetstone study best {made['study']}")


def _seeds(item: dict[str, Any]) -> None:
    for seed in item["seeded"]:
        name = f"study {seed['study']} [bold]{output.escape(seed['name'])}[/]"
        if seed["exact"]:
            output.out.print(f"seeded   by {name}: {seed['trials']} finished trials, recorded with their values")
        else:
            told = f"{seed['trials']} points queued, as far as {', '.join(seed['parameters'])}"
            output.out.print(
                f"seeded   by {name}: {output.escape(told)}; without values, because {output.escape(seed['why'])}"
            )


@app.command("list")
def list_studies(
    state: Annotated[str | None, typer.Option(help="running, paused, stopped or finished.")] = None,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """List studies, the newest first."""
    with connect(url, token) as client:
        items = list(client.pages("/api/v1/studies", params={"state": state}))
    if json:
        output.print_json(items)
        return
    if not items:
        output.out.print("No studies yet. Launch one: whetstone study launch --preset mini")
        return
    rows = [
        [
            str(item["study"]),
            output.escape(item["name"]),
            output.state(item["state"]),
            _progress(item),
            output.value_of(item["best"], item["workload"]),
            output.escape(item["sampler"]),
            str(item["created_at"])[:16].replace("T", " "),
        ]
        for item in items
    ]
    columns = [
        ("#", "right"),
        ("name", "cut"),
        "state",
        ("trials", "right"),
        ("best", "right"),
        "sampler",
        "created (UTC)",
    ]
    output.out.print(output.table(None, columns, rows))
    for item in items:
        if item.get("unreadable"):
            output.say(f"Study {item['study']} cannot be read: {item['unreadable']}.")


def _progress(item: dict[str, Any]) -> str:
    done = sum(item["counts"][s] for s in ("complete", "infeasible", "pruned", "failed"))
    done -= sum(seed["trials"] for seed in item["seeded"] if seed["exact"])
    return f"{done}/{item['budget']['trials']}" if item["budget"]["trials"] else str(done)


@app.command()
def show(study: StudyName, url: Url = None, token: Token = None, json: Json = False) -> None:
    """Show one study: state, counts, budget and best trial."""
    with connect(url, token) as client:
        item = find_study(client, study)
        if json:
            output.print_json(item)
            return
        counts = ", ".join(f"{n} {output.state(s)}" for s, n in item["counts"].items() if n)
        why = f": {output.escape(item['reason'])}" if item["reason"] else ""
        title = f"[bold]{output.escape(item['name'])}[/] (study {item['study']})"
        output.out.print(f"{title} is {output.state(item['state'])}{why}")
        budget = item["budget"]
        output.out.print(f"trials   {counts or 'none yet'}")
        output.out.print(
            f"budget   trials {budget['trials_used']}/{budget['trials'] or '-'}, "
            f"hours {budget['hours_used']:.2f}/{budget['hours'] or '-'}, target {budget['target'] or '-'}"
        )
        _seeds(item)
        picked = item["picked"]
        chosen = f" ({output.escape(picked['sampler'])}: {output.escape(picked['why'])})" if picked else ""
        output.out.print(f"sampler  {item['sampler']}{chosen}, pruner {item['pruner']}, {item['direction']}")
        if item["best"]:
            best = item["best"]
            origin = best["seeded_from"]
            of = f", which is trial {origin['trial']} of study {origin['study']}" if origin else ""
            output.out.print(
                f"best     trial {best['trial']}{of}: [bold]{output.value_of(best, item['workload'])}[/]\n"
            )
            output.out.print(output.parameter_table(best["params"]))
        if item["fixed"]:
            output.out.print()
            output.out.print(output.parameter_table(item["fixed"], "Fixed; the sampler chooses the others"))
        output.out.print(f"\n{client.url}/studies/{item['study']}", soft_wrap=True)


def _patch(study: str, url: str | None, token: str | None, state: str) -> None:
    with connect(url, token) as client:
        item = client.patch(f"/api/v1/studies/{find_study(client, study)['study']}", json={"state": state})
    output.out.print(f"Study {item['study']} is {output.state(item['state'])}.")


@app.command()
def pause(study: StudyName, url: Url = None, token: Token = None) -> None:
    """Give out no new trials; running ones finish."""
    _patch(study, url, token, "paused")


@app.command()
def resume(study: StudyName, url: Url = None, token: Token = None) -> None:
    """Go on with a paused study."""
    _patch(study, url, token, "running")


@app.command()
def stop(study: StudyName, url: Url = None, token: Token = None) -> None:
    """End a study: running trials write a checkpoint and are cancelled."""
    _patch(study, url, token, "stopped")


@app.command()
def fix(
    study: StudyName,
    params: Annotated[
        str, typer.Argument(help='What to fix, as YAML or JSON: "{mu: 0.9, eta: {conv1: 0.01}}"; null releases it.')
    ] = "",
    release: Annotated[bool, typer.Option("--release", help="Release everything that is fixed.")] = False,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Fix hyperparameters for the rest of a study, or release them; the sampler chooses the others."""
    if bool(params) == release:
        raise Invalid([Fault("", "give PARAMS to fix, or --release, one of them")], "the command")
    change = None if release else yaml_document.read(params, "fixed", "the command")
    with connect(url, token) as client:
        item = client.patch(f"/api/v1/studies/{find_study(client, study)['study']}", json={"fixed": change})
    if json:
        output.print_json(item)
    elif item["fixed"]:
        output.out.print(output.parameter_table(item["fixed"], f"Fixed in study {item['study']}"))
    else:
        output.out.print(f"Nothing is fixed in study {item['study']}.")


@app.command()
def delete(
    study: StudyName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Delete a study with all its trials."""
    with connect(url, token) as client:
        item = find_study(client, study)
        total = sum(item["counts"].values())
        if not yes:
            typer.confirm(f"Delete study {item['study']} {item['name']!r} with its {total} trials?", abort=True)
        client.delete(f"/api/v1/studies/{item['study']}")
    output.out.print(f"Study {item['study']} is deleted.")


@app.command()
def best(
    study: StudyName,
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 10,
    download: Annotated[
        Path | None, typer.Option(help="Also save the best trial's checkpoint in this folder.", file_okay=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Also write the best point to this file, for `whetstone train`.", dir_okay=False)
    ] = None,
    url: Url = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the best trials."""
    with connect(url, token) as client:
        item = find_study(client, study)
        trials = client.get(f"/api/v1/studies/{item['study']}/best", params={"top": top})
        if download and trials:
            _download(client, item["study"], trials[0]["trial"], download)
        if recipe and trials:
            detail = client.get(f"/api/v1/studies/{item['study']}/trials/{trials[0]['trial']}")
            point = {"params": detail["params"], "settings": item["spec"]["settings"], "seed": detail["seed"]}
            recipe.write_text(yaml.safe_dump(point, sort_keys=False), encoding="utf-8")
            output.say(f"Wrote trial {detail['trial']} as a recipe. Train it: whetstone train {recipe}")
    if json:
        output.print_json(trials)
        return
    if not trials:
        output.out.print("No trial has a value yet.")
        return
    rows = [
        [str(t["trial"]), output.value_of(t, item["workload"]), output.seconds(t["seconds"]), str(t["attempts"])]
        for t in trials
    ]
    output.out.print(
        output.table(None, [("trial", "right"), ("value", "right"), ("time", "right"), ("attempts", "right")], rows)
    )
    output.out.print()
    output.out.print(output.parameter_table(trials[0]["params"], f"Trial {trials[0]['trial']}"))


def _download(client: Any, study: int, trial: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in (("config", "best.json"), ("weights", "best.safetensors")):
        path = f"/api/v1/studies/{study}/trials/{trial}/checkpoint"
        client.download(path, folder / file, params={"part": part})
    output.say(f"Saved the checkpoint of trial {trial}. Score it: whetstone evaluate {folder}")


@app.command()
def export(
    study: StudyName,
    format: Annotated[str, typer.Option("--format", "-f", help="json, csv or yaml.")] = "json",
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to stdout.")] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Export a study with all its trials."""
    with connect(url, token) as client:
        item = find_study(client, study)
        text = client.text(f"/api/v1/studies/{item['study']}/export", params={"format": format})
    if file is None:
        sys.stdout.write(text)
    else:
        file.write_text(text, encoding="utf-8")
        output.say(f"Wrote {file}.")
