"""Every setting, route and command stands in the documentation, and the documentation names none that is not there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import typer

from cli import presets
from cli.main import register
from cli.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def commands(app: typer.Typer, prefix: str = "") -> Iterator[str]:
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__.replace("_", "-") if command.callback else "")
        yield f"{prefix}{name}"
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{prefix}{group.name} ")


def test_every_setting_is_documented_and_no_other() -> None:
    text = (DOCS / "settings.md").read_text()
    documented = set(re.findall(r"^\| `([A-Z_]+)`", text, re.MULTILINE))
    assert documented == {str(field.validation_alias) for field in Settings.model_fields.values()}


def test_every_command_is_documented_and_no_other() -> None:
    text = (DOCS / "commands.md").read_text()
    documented = set(re.findall(r"^\| `whetstone ([a-z ]+?)(?: [A-Z\[\-].*?)?`", text, re.MULTILINE))
    assert documented == set(commands(register()))


def test_every_route_is_documented_and_no_other() -> None:
    from api.routes import events, files, health, leases, sign_in, studies, trials, workers

    rooms = {"/api/v1": (studies, trials, leases, workers, events, files, sign_in), "": (health,)}
    served = {
        f"{method} {prefix}{route.path}"
        for prefix, modules in rooms.items()
        for module in modules
        for route in module.router.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    text = (DOCS / "rest.md").read_text()
    documented = set(re.findall(r"^\| `((?:GET|POST|PATCH|DELETE) [^`?]+)", text, re.MULTILINE))
    assert documented == served


def test_every_training_setting_is_documented_and_no_other() -> None:
    from model.spec import KNOWN

    text = (DOCS / "training.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_0-9]+)`", text, re.MULTILINE))
    assert documented == set(KNOWN)


def test_every_preset_is_documented_and_no_other() -> None:
    text = (DOCS / "studies.md").read_text().split("## Presets")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9-]+)`", text, re.MULTILINE)) == set(presets.names())


def test_every_training_command_in_the_documentation_can_be_run() -> None:
    """Its preset is there, and what it sets is sound; files of one's own are the reader's."""
    from cli.train import read

    commands = []
    pages = {*DOCS.glob("*.md"), DOCS.parent / "README.md"} - {DOCS / "commands.md"}
    for page in sorted(pages):
        found = re.findall(r"^(?:    |\|.*`)whetstone train ([^`#\n]+)", page.read_text(), re.MULTILINE)
        commands += [shlex.split(command) for command in found]
    assert len(commands) > 25
    for name, *rest in commands:
        if not name.endswith(".yaml"):
            read(name, [value for key, value in pairwise(rest) if key == "--set"], 0)


def test_every_sibling_stands_in_the_results() -> None:
    from benchmarks.siblings import ROWS

    text = (DOCS / "results.md").read_text()
    for row in ROWS:
        assert f"| {row.name} |" in text, row.name


def test_the_papers_sweep_is_the_papers() -> None:
    document = presets.load_all()["koch2015"]
    labels = ["conv1", "conv2", "conv3", "conv4", "fc", "output"]
    eta, mu, lam = document["space"]
    assert [p["labels"] for p in (eta, mu, lam)] == [labels] * 3
    assert (eta["name"], eta["low"], eta["high"], eta["log"]) == ("eta", 1e-4, 1e-1, True)
    assert (mu["name"], mu["low"], mu["high"], mu.get("log")) == ("mu", 0.0, 1.0, None)
    assert (lam["name"], lam["low"], lam["high"], lam.get("log")) == ("lambda", 0.0, 0.1, None)
    assert document["sampler"] == {"name": "gp"}
    assert document["settings"]["batch_pairs"] == 128
    assert document["settings"]["epochs"] == 200
    assert document["settings"]["patience"] == 20


def test_the_study_in_the_documentation_is_one_without_a_fault() -> None:
    from hpo import spec, yaml_document
    from model.spec import SiameseWorkload

    example = (DOCS / "studies.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert spec.parse(yaml_document.read(example), {"siamese": SiameseWorkload()}).name == "by-layer"
