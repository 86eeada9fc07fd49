"""What a reproduction leaves: a table in Markdown and JSON, a plot, and the same table on the terminal.

Promise: each of them says at which scale the figures were made and on what data, and names the source of every figure
of others. Files appear whole or not at all.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import output, uses

if TYPE_CHECKING:
    from cli.reproduction_recipe import Recipe
    from model.evaluate import Loaded


@dataclass
class Report:
    """A table and all that is to be said about it. Cells are plain text; `details` stand in the JSON only."""

    name: str
    title: str
    subtitle: str
    columns: Sequence[str | tuple[str, str]]
    rows: list[list[str]]
    notes: list[str]
    details: Mapping[str, Any]
    draw: Callable[[Path], None]
    plotted: bool = field(default=False, init=False)

    def markdown(self) -> str:
        names = [column if isinstance(column, str) else column[0] for column in self.columns]
        rules = ["---" if isinstance(column, str) else "---:" for column in self.columns]
        lines = [f"# {self.title}", "", f"{self.subtitle}.", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (names, rules, *self.rows)]
        if self.plotted:
            lines += ["", f"![{self.title}]({self.name}.png)"]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def document(self) -> dict[str, Any]:
        about = {"reproduction": self.name, "title": self.title, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        return {**about, **self.details, "notes": self.notes}


def publish(report: Report, folder: Path, *, json: bool) -> None:
    """Write NAME.md, NAME.json and NAME.png into the folder and print the table, or the JSON."""
    picture = folder / f"{report.name}.png"
    if plots():
        report.draw(picture)
        report.plotted = True
    whole = report.document() | {"folder": str(folder)}
    for suffix, text in ((".md", report.markdown()), (".json", jsonlib.dumps(whole, indent=2, allow_nan=False) + "\n")):
        aside = folder / f".{report.name}{suffix}.tmp"
        aside.write_text(text)
        aside.replace(folder / f"{report.name}{suffix}")
    if json:
        output.print_json(whole)
        return
    output.out.print(f"[bold]{output.escape(report.title)}[/]\n{output.escape(report.subtitle)}\n")
    cells = [[output.escape(cell.replace("**", "")) for cell in row] for row in report.rows]
    output.out.print(output.table(None, report.columns, cells))
    for note in report.notes:
        output.out.print(f"[dim]- {output.escape(note)}[/]", soft_wrap=True)
    files = f"{report.name}.md, .json{', .png' if report.plotted else ''}"
    output.out.print(f"\nWritten to {output.escape(str(folder))}: {files}", soft_wrap=True)


def subtitle(plan: Recipe, data: str, seed: int) -> str:
    """Where the figures come from, in one line."""
    return f"Trained on {data}, {plan.told}; seed {seed}"


def told(loaded: Loaded) -> str:
    """The same of a checkpoint that was given."""
    side, parameters = loaded.config.net.input, loaded.config.net.parameters
    trained = loaded.data or "data that it does not name"
    return f"A given checkpoint: {parameters:,} parameters, {side} x {side} images, trained on {trained}"


def notes(plan: Recipe | None, data: str) -> list[str]:
    """What keeps the figures from being compared with the paper's, and which of its unknowns were filled in."""
    lines = [f"Shrunk: {line}." for line in plan.shrunk] if plan else []
    if data != "omniglot":
        lines.append(f"Trained on {data}, not Omniglot: figures do not compare with those of others.")
    if plan:
        rates = plan.config.layers[0]  # one for all layers
        lines.append(
            "The paper published neither the rates, momenta nor L2 strengths that it found. Ours, for all layers: eta "
            f"{rates.eta:g}, mu {rates.mu:g}, lambda {rates.lam:g}, from He's initialisation."
        )
    return lines


def used(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often test data was used with these checkpoints."""
    most = max(score["test_uses"] for score in scores)
    if len(scores) == 1:
        return [uses.told(most)]
    return [uses.told(most, "each checkpoint" + (" at most" if most > 1 else ""))]


def about(plan: Recipe | None, data: str, seed: int, device: str) -> dict[str, Any]:
    """What the JSON of every reproduction says of how it was made."""
    made: dict[str, Any] = {"data": data, "device": device}
    if plan:
        made |= {"scale": plan.scale, "shrunk": list(plan.shrunk), "seed": seed, "recipe": plan.config.document()}
    return made


def percent(accuracy: float, digits: int = 1) -> str:
    return f"{100 * accuracy:.{digits}f}%"


def plots() -> bool:
    """Whether plots can be drawn here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def bounds(interval: Sequence[float], digits: int = 1) -> str:
    """A 95% interval in per cent."""
    return f"{100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f}"
