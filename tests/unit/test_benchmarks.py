"""The benchmarks measure what they say: the figures of the table, in the shape agreed, against an honest textbook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy, measure, textbook, trainer
from model import init, strokes
from model.net import PAPER, SiameseNet
from model.recipe import load_recipe
from model.spec import config
from tests.unit import fake_omniglot

ROOT = Path(__file__).parents[2]
TABLE = {
    "step_vs_textbook": ">= 2.5",
    "step_vs_bf16_gemm_peak": ">= 0.65",
    "evaluation_vs_pairwise": ">= 10",
    "evaluation_5000_vs_320": "<= 1.2",
    "evaluation_disagreements_fp32": "<= 0",
    "input_share_of_step_full": "<= 0.1",
    "input_share_of_step_mini": "<= 0.1",
    "mini_rss_over_dataset_mb": "<= 300",
    "mini_accuracy_1min": ">= 65",
    "mini_accuracy_3min": ">= 72",
    "mini_accuracy_pk_1min": ">= 74",
    "mini_accuracy_pk_3min": ">= 77",
    "bf16_speed_vs_fp32": ">= 1.5",
    "bf16_accuracy_gap": "<= 2",
}


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks.trainer", "--quick", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    for name in arguments[1].split(",") if arguments else TABLE:
        assert name in done.stdout
    document: dict[str, Any] = json.loads(file.read_text())
    return document


@pytest.mark.slow
def test_one_run_measures_every_figure_and_writes_it_with_its_goal(tmp_path: Path) -> None:
    document = bench(tmp_path)
    assert {figure["name"]: figure["goal"] for figure in document["figures"]} == TABLE
    for figure in document["figures"]:
        assert set(figure) == {"name", "value", "unit", "goal"}
        assert figure["value"] == pytest.approx(figure["value"])  # a number, and not NaN
    assert document["quick"] is True
    assert {"cpu", "cores", "memory_gb", "torch"} <= set(document["machine"])
    by = {figure["name"]: figure["value"] for figure in document["figures"]}
    assert by["evaluation_disagreements_fp32"] == 0


def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    document = bench(tmp_path, "--only", "input_share_of_step_mini")
    assert [figure["name"] for figure in document["figures"]] == ["input_share_of_step_mini"]


def test_an_unknown_figure_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        trainer.main(["--json", str(tmp_path / "bench.json"), "--only", "speed"])
    assert end.value.code == 2
    assert "no figure named speed" in capsys.readouterr().err


def test_without_omniglot_accuracies_are_left_out_and_it_is_said() -> None:
    bench = trainer.Bench(trainer.FULL, list(TABLE), Path())
    bench.name = "strokes"
    bench.accuracy()
    assert set(bench.results.skipped) == set(accuracy.NAMES)
    assert all("WHETSTONE_DATA" in why for why in bench.results.skipped.values())


@pytest.mark.parametrize(("goal", "value", "met"), [(">= 2", 2.0, True), (">= 2", 1.9, False), ("<= 0", 1.0, False)])
def test_a_goal_is_met_on_the_right_side(goal: str, value: float, met: bool) -> None:
    assert measure.Figure("it", value, "x", goal).met is met


def test_the_recipes_are_recipes_of_the_small_network() -> None:
    for file, _ in accuracy.TIMED.values():
        recipe = config(*load_recipe(accuracy.RECIPES / file))
        assert recipe.net.input == 28
        assert recipe.batches == ("pxk" if file.startswith("pk") else "pairs")
        assert recipe.max_seconds == (60 if "1min" in file else 180)
    assert config(*load_recipe(ROOT / "benchmarks" / "record.yaml")).validation_tasks >= 1000


def paired(seed: int) -> tuple[SiameseNet, textbook.SiameseNetwork]:
    """The trainer's network and the textbook's with the same weights."""
    net = SiameseNet(PAPER)
    init.initialise(net, "he", torch.Generator().manual_seed(seed))
    theirs = textbook.SiameseNetwork()
    theirs.load_state_dict(net.state_dict())
    return net.on("cpu"), theirs


@torch.no_grad()
def test_the_textbook_computes_the_same_network(tmp_path: Path) -> None:
    drawings = strokes.generate(105, shape=strokes.SMALL).validation
    textbook.unpack(drawings, tmp_path)
    files = [path for one in textbook.characters(tmp_path, drawings.characters) for path in one]
    _, plain = textbook.transforms()
    chosen = [0, 1, 5, 18]
    images: Tensor = torch.stack([plain(textbook.read(files[index])) for index in chosen])
    ours = drawings.flat[chosen].float().div(255)[:, None]
    assert torch.equal(images, ours)
    net, theirs = paired(seed=3)
    torch.testing.assert_close(theirs(images[:2], images[2:]), net(images), rtol=1e-4, atol=1e-4)


def test_the_textbook_draws_as_many_pairs_of_each_kind(tmp_path: Path) -> None:
    drawings = strokes.generate(105, shape=strokes.SMALL).validation
    textbook.unpack(drawings, tmp_path)
    distorted, _ = textbook.transforms()
    pairs = textbook.Pairs(textbook.characters(tmp_path, drawings.characters), distorted, length=4)
    first, second, same = zip(*(pairs[index] for index in range(4)), strict=True)
    assert [value.item() for value in same] == [1.0, 0.0, 1.0, 0.0]
    for image in (*first, *second):
        assert image.shape == (1, 105, 105)
        assert 0.005 < image.mean() < 0.4  # ink is 1, and there is little of it


RECIPE = """
params: {eta: 0.1, mu: 0.9, lambda: 0}
settings: {net: mini, data: strokes, pairs_per_epoch: 256, batch_pairs: 64, validation_tasks: 40, schedule: cosine}
"""


def test_the_record_keeps_to_its_budget_and_looks_at_test_data_once(tmp_path: Path) -> None:
    root, folder, file = tmp_path / "data", tmp_path / "run", tmp_path / "record.json"
    (root / "omniglot-py").mkdir(parents=True)
    (root / "omniglot-py" / "all_runs.zip").write_bytes(fake_omniglot.packed_runs())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [
        sys.executable,
        "-m",
        "benchmarks.record",
        "--json",
        str(file),
        "--recipe",
        str(tmp_path / "recipe.yaml"),
    ]
    command += ["--minutes", "0.05", "--threads", "1", "--output", str(folder)]
    environment = os.environ | {"WHETSTONE_DATA": str(root), "WHETSTONE_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert [figure["name"] for figure in document["figures"]] == ["record_lake_accuracy"]
    also = {figure["name"]: figure["value"] for figure in document["also"]}
    assert 0 < also["training"] < 0.1, "on a slow machine a step and the last evaluation are much of three seconds"
    assert also["humans"] == pytest.approx(95.5)
    assert "of Lake's 400 trials" in document["notes"]["record_lake_accuracy"]
    (use,) = (folder / "test-uses.jsonl").read_text().splitlines()
    assert json.loads(use)["what"] == "lake_runs"

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)
    assert again.returncode == 2
    assert "holds a run" in again.stderr
