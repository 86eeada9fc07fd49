"""Plots of the reproductions: every curve is named where it ends, every accuracy of ours has its interval.

Drawn with matplotlib's Agg backend, without a display and without touching its global state. Accuracies and intervals
are shares in [0, 1]; what is drawn is per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1c2330", "#68707d", "#d9dde3"
BLUE, ORANGE, GREEN = "#1f5fbf", "#d1661b", "#2b8a57"
_DPI = 160
_FONT: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK}


def verification(
    path: Path, title: str, subtitle: str, rows: Sequence[Mapping[str, Any]], pixels: Mapping[str, Any]
) -> None:
    """Accuracy against training pairs, with and without distortions, ours beside the paper's.

    A row has pairs, trained_pairs, distorted, paper, accuracy and interval; `pixels` has that of bare pixels.
    """
    figure, axes = _figure(title, subtitle, (8.6, 5.4))
    sizes = sorted({row["pairs"] for row in rows})
    ends: list[tuple[float, str, str]] = []
    for distorted, colour, words in ((False, ORANGE, "plain"), (True, BLUE, "distorted")):
        some = sorted((row for row in rows if row["distorted"] == distorted), key=lambda row: row["pairs"])
        x = [sizes.index(row["pairs"]) + (0.03 if distorted else -0.03) for row in some]
        theirs = [100 * row["paper"] for row in some]
        ours = [100 * row["accuracy"] for row in some]
        reach = _reach(ours, [row["interval"] for row in some])
        axes.plot(x, theirs, color=colour, lw=1.2, ls=(0, (4, 3)), marker="o", mfc="white", ms=6, alpha=0.75)
        axes.errorbar(x, ours, yerr=reach, color=colour, lw=2, marker="o", ms=6, capsize=4)
        ends += [(theirs[-1], f"the paper, {words}", colour), (ours[-1], f"ours, {words}", colour)]
    level = 100 * pixels["accuracy"]
    axes.axhline(level, color=MUTED, lw=1)
    ends.append((level, "ours, bare pixels", MUTED))
    values = [end[0] for end in ends] + [100 * row["interval"][0] for row in rows]
    axes.set_ylim(min(*values, level) - 2, 100)
    axes.set_xlim(-0.25, len(sizes) - 0.9)
    trained = {row["pairs"]: row["trained_pairs"] for row in rows}
    axes.set_xticks(
        range(len(sizes)),
        [f"{size:,}" if trained[size] == size else f"{size:,}\nours: {trained[size]:,}" for size in sizes],
    )
    axes.set_xlabel("training pairs", color=MUTED)
    axes.set_ylabel("accuracy on test pairs, %", color=MUTED)
    _name_ends(axes, len(sizes) - 0.88, ends)
    _save(figure, path, right=0.76)


def ranking(path: Path, title: str, subtitle: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracies as a list, best first. A row has who, accuracy, interval (or None) and ours (bool)."""
    rows = sorted(rows, key=lambda row: row["accuracy"])
    figure, axes = _figure(title, subtitle, (8.6, 1.5 + 0.42 * len(rows)))
    for place, row in enumerate(rows):
        value, colour = 100 * row["accuracy"], BLUE if row["ours"] else MUTED
        weight = "bold" if row["ours"] else "normal"
        axes.plot([0, value], [place, place], color=colour, lw=2.2 if row["ours"] else 1.2, alpha=0.9)
        axes.plot([value], [place], "o", color=colour, ms=7 if row["ours"] else 5)
        told, end = f"{value:.1f}", value
        if row["interval"] is not None:
            low, high = (100 * bound for bound in row["interval"])
            axes.plot([low, high], [place, place], color=colour, lw=6, alpha=0.3, solid_capstyle="butt")
            told, end = f"{value:.1f}  ({low:.1f} to {high:.1f})", max(value, high)
        axes.text(end + 1.6, place, told, va="center", color=colour, fontweight=weight).set_in_layout(False)
    axes.set_yticks(range(len(rows)), [row["who"] for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(BLUE if row["ours"] else INK)
        label.set_fontweight("bold" if row["ours"] else "normal")
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("accuracy, %; shaded: 95% interval of what was measured here", color=MUTED)
    _save(figure, path, right=0.85)


def ways(path: Path, title: str, subtitle: str, curves: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy against the number of ways, within one alphabet (left) and across alphabets (right).

    A curve has part, across (bool) and points, each with way, accuracy, interval, nearest and alphabets.
    """
    figure, panels = _figure(title, subtitle, (11.5, 6.2), columns=2, strip=True)
    colours = {"training": GREEN, "validation": BLUE, "test": ORANGE}
    for across, (axes, below) in zip((False, True), panels, strict=True):
        some = [curve for curve in curves if curve["across"] == across]
        ends: list[tuple[float, str, str]] = []
        for curve in some:
            colour, points = colours[curve["part"]], curve["points"]
            x = [point["way"] for point in points]
            y = [100 * point["accuracy"] for point in points]
            low = [100 * point["interval"][0] for point in points]
            high = [100 * point["interval"][1] for point in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
            axes.plot(x, y, color=colour, lw=2, marker="o", ms=3.5)
            axes.plot(x, [100 * point["nearest"] for point in points], color=colour, lw=1, ls=(0, (4, 2)))
            if not across:
                told = axes.annotate(
                    curve["part"],
                    (x[-1], y[-1]),
                    (5, 0),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                    va="center",
                )
                told.set_in_layout(False)
            else:
                ends.append((y[-1], curve["part"], colour))
                ends.append((100 * points[-1]["nearest"], f"1-NN, {curve['part']}", colour))
            below.step(x, [point["alphabets"] for point in points], where="mid", color=colour, lw=1.4)
        most = max(point["way"] for curve in some for point in curve["points"])
        guesses = list(range(2, most + 1))
        axes.plot(guesses, [100 / way for way in guesses], color=MUTED, lw=1)
        if not across:
            _others(axes)
        else:
            ends.append((100 / most, "chance", MUTED))
            _name_ends(axes, most + 1, ends)
        axes.set_title("across all alphabets" if across else "within one alphabet", loc="left", fontsize=10.5)
        axes.set_ylim(0, 101)
        for panel in (axes, below):
            panel.set_xlim(0, most + (1 if across else 8))
        below.set_ylim(0, None)
        below.set_xlabel("ways (characters to choose among)", color=MUTED)
        axes.tick_params(labelbottom=False)
    panels[0][0].set_ylabel("accuracy, %; shaded: 95% interval", color=MUTED)
    strip = panels[0][1]
    strip.set_ylabel("alphabets", color=MUTED)
    told = "with so many characters"
    strip.text(0.985, 0.93, told, transform=strip.transAxes, ha="right", va="top", fontsize=8.5, color=MUTED)
    _save(figure, path, right=0.86, wspace=0.1, hspace=0.08)


def _others(axes: Axes) -> None:
    """What others reach at 20 ways on Lake's trials, which are of the test alphabets."""
    from model.published import BPL_2013, BPL_2015, HUMANS, PAPER

    marks = (BPL_2015, HUMANS, BPL_2013, PAPER)
    heights = [100 * mark.accuracy for mark in marks]
    axes.plot([20] * len(marks), heights, color=MUTED, lw=0.8, marker="_", ms=9, zorder=4)
    words = ", ".join(f"{mark.who.split(',')[0]} {height:.1f}" for mark, height in zip(marks, heights, strict=True))
    for line, text in enumerate(
        ("on Lake's trials: " + words.split(", BPL (2013)")[0], "BPL (2013)" + words.split("BPL (2013)")[1])
    ):
        axes.annotate(
            text, (20, 94.4), (8, 4 - 11 * line), textcoords="offset points", fontsize=8, color=MUTED, va="center"
        )


def _figure(
    title: str, subtitle: str, size: tuple[float, float], *, columns: int = 1, strip: bool = False
) -> tuple[Figure, Any]:
    """A figure with its title and what to plot in: axes, or (axes, strip below) for each column."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=size, facecolor="white")
        FigureCanvasAgg(figure)
        ratios = [4.2, 1] if strip else [1]
        grid = figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios, sharey="row")
        for axes in grid.flat:
            _quiet(axes)
        inch = 1 / size[1]
        figure.text(0.02, 1 - 0.12 * inch, title, fontsize=13, fontweight="bold", va="top")
        figure.text(0.02, 1 - 0.40 * inch, subtitle, fontsize=9, color=MUTED, va="top")
    return figure, [tuple(grid[:, column]) for column in range(columns)] if strip else grid[0][0]


def _quiet(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=MUTED)
    axes.grid(visible=True, color=FAINT, lw=0.7)
    axes.set_axisbelow(True)


def _name_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each curve beside its end, pushed apart where they would lie on each other."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.get_figure().dpi * 72  # type: ignore[union-attr]
    gap = (high - low) * 13 / height
    ordered = sorted(ends)
    places = [value for value, _, _ in ordered]
    for _ in range(100):
        for i in range(len(places) - 1):
            if (short := gap - (places[i + 1] - places[i])) > 1e-9:
                places[i] -= short / 2
                places[i + 1] += short / 2
        shift = max(0.0, low - places[0] + gap / 2)
        places = [place + shift for place in places] if shift else places
    for place, (value, words, colour) in zip(places, ordered, strict=True):
        told = axes.text(x, place, f"{words}  {value:.1f}", color=colour, va="center", fontsize=9, clip_on=False)
        told.set_in_layout(False)


def _reach(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """How far error bars go down and up."""
    pairs = list(zip(values, intervals, strict=True))
    return [value - 100 * low for value, (low, _) in pairs], [100 * high - value for value, (_, high) in pairs]


def _save(figure: Figure, path: Path, **margins: float) -> None:
    import matplotlib

    inch = 1 / figure.get_figheight()
    with matplotlib.rc_context(_FONT):
        figure.tight_layout(rect=(0.01, 0.01, margins.pop("right", 1.0), 1 - 0.72 * inch))
        if margins:
            figure.subplots_adjust(**margins)
        aside = path.with_name(f".{path.name}.tmp")
        figure.savefig(aside, dpi=_DPI, format="png")
        aside.replace(path)
