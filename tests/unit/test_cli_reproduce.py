"""The reproductions end to end on a tiny network: what they fill in, what they record, how they go on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli import plot, presets, reproduction_report, reproduction_run, uses
from cli.main import run
from cli.reproduction_recipe import FULL_NET, recipe
from cli.reproduction_report import notes
from cli.reproduction_ways import within
from model import published
from model.drawings import Dataset
from model.episode import draw
from tests.unit.siamese import POINT, SIDE, TINY, drawings

PRESETS = ("koch2015-verification", "koch2015-oneshot", "koch2015-mnist")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The presets and the data sets at a size that trains in a second; the folder is the current one."""
    settings = {**TINY, "pairs_per_epoch": 64, "fixed_pairs": None, "validation_tasks": 50}
    document = {"points": [POINT], "settings": settings}
    monkeypatch.setattr(presets, "load_all", lambda: dict.fromkeys(PRESETS, document))
    rows = [published.VerificationRow(pairs, distorted, 0.9) for pairs in (40, 80) for distorted in (False, True)]
    monkeypatch.setattr(published, "VERIFICATION", tuple(rows))
    parts = [drawings(seed, characters=22) for seed in (1, 2, 3)]
    digits = drawings(4, alphabets=1, characters=10)

    def load(size: int, *, source: str, **_: Any) -> Dataset:
        assert size == SIDE
        return Dataset(*parts[:2], digits, "mnist", size) if source == "mnist" else Dataset(*parts, source, size)

    monkeypatch.setattr("model.dataset.load", load)
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reproduce(name: str, *more: str) -> int:
    return run(["reproduce", name, "--data", "strokes", "--threads", "1", "--device", "cpu", *more])


def lines(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / uses.NAME).read_text().splitlines()]


def test_verification_fills_every_row_beside_the_papers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("verification", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["trained_pairs"], row["copies"], row["paper"]) for row in told["rows"]] == [
        (40, 0, 0.9), (40, 8, 0.9), (80, 0, 0.9), (80, 8, 0.9),
    ]  # fmt: skip
    for row in told["rows"]:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["test_pairs"] == 10_000
        (use,) = lines(Path(row["run"]))
        assert (use["what"], use["command"]) == ("test_pairs", "whetstone reproduce verification")
        assert (use["accuracy"], use["tasks"]) == (row["accuracy"], 10_000)
    folder = tiny / "reproduction" / "verification"
    table = (folder / "verification.md").read_text()
    assert table.count("\n| ") == 2 + 4 + 1
    assert "strokes, not Omniglot" in table
    assert published.KOCH.full in table
    assert json.loads((folder / "verification.json").read_text()) == told
    with Image.open(folder / "verification.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_same_command_again_uses_no_test_data(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("oneshot", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert reproduce("oneshot", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == first["rows"]
    assert len(lines(Path(first["run"]))) == 1


def test_an_interrupted_reproduction_goes_on_to_the_same_figures(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduce("verification", "--json", "-o", "whole") == 0
    whole = json.loads(capsys.readouterr().out)
    real, asked = reproduction_run.interruptible, 0

    @contextmanager
    def interruptible() -> Iterator[Callable[[], bool]]:
        def soon() -> bool:
            nonlocal asked
            asked += 1
            return asked % 25 == 0

        yield soon

    monkeypatch.setattr(reproduction_run, "interruptible", interruptible)
    stops = 0
    while (code := reproduce("verification", "--json", "-o", "parts")) == 130:
        stops += 1
        assert "goes on from here" in capsys.readouterr().err
        assert stops < 60
    assert code == 0
    assert stops >= 3
    monkeypatch.setattr(reproduction_run, "interruptible", real)
    parts = json.loads(capsys.readouterr().out)
    pick = ("pairs", "copies", "accuracy", "threshold", "auc")
    assert [[row[key] for key in pick] for row in parts["rows"]] == [
        [row[key] for key in pick] for row in whole["rows"]
    ]


def test_a_given_checkpoint_is_scored_without_training_and_its_uses_add_up(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("oneshot", "--json") == 0
    trained = json.loads(capsys.readouterr().out)
    assert reproduce("oneshot", "--checkpoint", trained["run"], "-o", "given") == 0
    told = capsys.readouterr().out
    assert "A given checkpoint" in told
    assert "Test data used twice with this checkpoint" in told
    given = json.loads((tiny / "given" / "oneshot.json").read_text())
    assert [row["accuracy"] for row in given["rows"]] == [row["accuracy"] for row in trained["rows"]]
    assert not (tiny / "given" / "runs").exists()
    assert reproduce("ways", "--checkpoint", trained["run"], "--tasks", "50") == 0
    assert [use["what"] for use in lines(Path(trained["run"]))] == ["test_tasks"] * 3


def test_ways_go_as_far_as_the_alphabets_and_across_them(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("ways", "--tasks", "50", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    found = {(c["part"], c["across"]): [p["way"] for p in c["points"]] for c in told["curves"]}
    parts = ("training", "validation", "test")
    assert found == {
        **{(part, False): [2, 5, 10, 15, 20, 22] for part in parts},
        **{(part, True): [2, 5, 10, 20, 30, 40, 50, 60] for part in parts},
    }
    assert {p["alphabets"] for c in told["curves"] for p in c["points"]} == {3}
    assert (tiny / "reproduction" / "ways" / "ways.png").stat().st_size > 10_000
    assert within(47) == [2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 47]


def test_mnist_is_scored_on_its_test_images(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("mnist", "--tasks", "200", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    ours, nearest, chance, *others = told["rows"]
    assert (ours["tasks"], nearest["tasks"], chance["accuracy"]) == (200, 200, 0.1)
    assert [other["accuracy"] for other in others] == [0.703, 0.265]


def test_a_folder_keeps_the_run_it_holds(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("oneshot") == 0
    capsys.readouterr()
    assert reproduce("oneshot", "--seed", "2") == 1
    assert "holds another run" in capsys.readouterr().err


def test_without_matplotlib_the_table_stands_alone(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction_report, "plots", lambda: False)
    assert reproduce("oneshot") == 0
    assert "whetstone[plots]" in capsys.readouterr().err
    assert sorted(path.suffix for path in (tiny / "reproduction" / "oneshot").glob("oneshot.*")) == [".json", ".md"]
    assert ".png" not in (tiny / "reproduction" / "oneshot" / "oneshot.md").read_text()


@pytest.mark.parametrize(("name", "what"), [("oneshot", "no one-shot runs of Lake's"), ("mnist", "no MNIST"),
                                            ("verification", "no Omniglot"), ("ways", "no Omniglot")])  # fmt: skip
def test_missing_data_is_told_in_a_line_before_anything_is_trained(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WHETSTONE_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path))
    assert run(["reproduce", name, "--scale", "0.0001", "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
    told = capsys.readouterr().err
    assert what in told
    assert "whetstone data fetch" in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_wrong_input_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "oneshot", "--data", "cats"]) == 2
    assert "--data must be omniglot or strokes" in capsys.readouterr().err.replace(":", "")
    assert run(["reproduce", "oneshot", "--scale", "2"]) == 2
    capsys.readouterr()
    assert reproduce("ways", "--checkpoint", "nowhere") == 1
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_scale_1_is_the_preset_and_shrinks_nothing(preset: str) -> None:
    whole = recipe(preset, 1.0, seed=1, data="omniglot")
    assert whole.shrunk == ()
    assert (whole.config.epochs, whole.config.pairs_per_epoch, whole.config.patience) == (200, 150_000, 20)
    assert whole.config.net.input == (35 if preset.endswith("mnist") else 105)
    assert [layer.filters for layer in whole.config.net.conv] == [64, 128, 128, 256]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scale", [0.5, FULL_NET, 0.05, 0.01, 0.001])
def test_the_work_falls_as_the_scale_and_all_that_shrinks_is_told(preset: str, scale: float) -> None:
    whole, small = (recipe(preset, each, seed=1, data="omniglot") for each in (1.0, scale))
    ratio = small.config.epochs * small.config.pairs_per_epoch / (200 * 150_000)
    assert ratio == pytest.approx(scale, rel=0.1)
    before, after = whole.config.document()["settings"], small.config.document()["settings"]
    changed = {key for key in before if before[key] != after[key]}
    changed.discard("temperature")  # follows from the network, and has no part in this loss
    words = {
        "epochs": "epochs at most",
        "pairs_per_epoch": "pairs an epoch",
        "fixed_pairs": "pairs in the training set",
        "momentum_epochs": "rising momentum",
        "patience": "no early stop",
        "net": "half the filters",
    }
    assert changed <= set(words)
    for key in changed:
        assert any(words[key] in line for line in small.shrunk), key
    assert ("net" in changed) == (scale < FULL_NET)
    assert f"scale {scale:g}" in small.told
    eta = small.config.layers[0].eta
    assert any(f"eta {eta:g}" in line for line in notes(small, "omniglot"))  # ours, and others below FULL_NET


def test_a_use_that_fails_half_way_leaves_its_line_and_one_that_cannot_be_recorded_looks_at_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(RuntimeError), uses.recorded(tmp_path, "lake_runs", "a command"):
        raise RuntimeError
    with uses.recorded(tmp_path / "best.json", "lake_runs", "a command") as use:
        use.score(0.5, 400)
    assert [(line["accuracy"], line["tasks"]) for line in lines(tmp_path)] == [(None, 0), (0.5, 400)]
    assert (use.count, uses.count(tmp_path)) == (2, 2)
    looked: list[int] = []
    with pytest.raises(OSError, match="nowhere"), uses.recorded(tmp_path / "nowhere" / "run", "lake_runs", "a command"):
        looked.append(1)
    assert not looked


def test_evaluate_takes_shots_and_characters_of_all_alphabets(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("oneshot", "--json") == 0
    checkpoint = json.loads(capsys.readouterr().out)["run"]
    assert run(["evaluate", checkpoint, "--shot", "3", "--across", "--way", "40", "--tasks", "60", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told[key] for key in ("shot", "across_alphabets", "way", "tasks")] == [3, True, 40, 60]
    assert "test_uses" not in told
    assert len(lines(Path(checkpoint))) == 1
    assert run(["evaluate", checkpoint, "--shot", "4", "--way", "5"]) == 1
    assert "at least 5 people" in capsys.readouterr().err
    assert run(["evaluate", checkpoint, "--data", "folder"]) == 2
    assert "this one was trained on strokes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--shot", "2"], ["--across"], ["--way", "5"], ["--tasks", "10"], ["--seed", "1"], ["--data", "mnist"]]
)
def test_lakes_trials_are_what_they_are_whatever_is_asked(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(tmp_path), "--test", *option]) == 2
    assert f"leave {option[0]} out" in capsys.readouterr().err


def test_evaluate_records_its_use_of_lakes_trials(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduce("oneshot", "--json") == 0
    checkpoint = Path(json.loads(capsys.readouterr().out)["run"])
    given = drawings(3, characters=22)
    monkeypatch.setattr("model.episode.lake_runs", lambda *_: (given, draw(given, 400, 20, 1)))
    assert run(["evaluate", str(checkpoint), "--test"]) == 0
    assert "Test data used twice with this checkpoint" in capsys.readouterr().out
    use = lines(checkpoint)[-1]
    assert (use["what"], use["command"], use["tasks"]) == ("lake_runs", "whetstone evaluate --test", 400)


def test_figures_of_others_are_shares_with_a_source() -> None:
    for figure in (*published.ONE_SHOT, *published.MNIST):
        assert 0 < figure.accuracy < 1
        assert figure.cited.startswith(figure.source.short)
    assert [row.accuracy for row in published.VERIFICATION] == [0.9061, 0.9190, 0.9154, 0.9315, 0.9163, 0.9342]
    assert [figure.accuracy for figure in published.ONE_SHOT] == sorted(
        (figure.accuracy for figure in published.ONE_SHOT), reverse=True
    )


def test_names_of_curves_that_end_together_are_pushed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    figure, axes = plot._figure("title", "subtitle", (6, 4))
    axes.set_ylim(0, 100)
    plot._name_ends(axes, 1.0, [(50.0, "a", "k"), (50.1, "b", "k"), (50.2, "c", "k"), (0.0, "d", "k")])
    heights = sorted(text.get_position()[1] for text in axes.texts)
    gaps = [b - a for a, b in pairwise(heights)]
    assert min(gaps) > 3
    assert not math.isnan(sum(heights))
    assert figure.get_axes()


def test_help_needs_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys; from cli.main import run; run(['reproduce', 'oneshot', '--help']); "
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
