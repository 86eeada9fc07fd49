"""The presets: each is a study whose points can be trained, and what its source says stands in it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from cli import main, output, presets
from cli.train import _Line, read
from hpo import spec
from model import strokes
from model.drawings import Dataset
from model.spec import SiameseWorkload, config
from model.train import fit
from tests.unit.siamese import drawings

SIBLINGS = {
    "contrastive2018-fc1",
    "contrastive2018-fc1-reg1",
    "contrastive2018-fc2",
    "keras2017",
    "mini-pxk",
    "mini-softmax",
    "mnist-classifier",
    "mnist-siamese",
    "mnist-siamese-out2",
    "mnist-siamese-out2-conv1",
    "mnist-transfer",
    "pytorch2019",
    "triplet",
}
SEARCHES = {"mini", "koch2015", "koch2015-log", "koch2015-architecture"}
"""These have no whole point: `whetstone train` is told the rates."""
RATES = ["eta=0.01", "mu=0.5", "lambda=0"]
TINY = [
    "filters=2", "fc=4", "epochs=1", "batch_pairs=4", "pairs_per_epoch=24", "validation_tasks=10", "way=5",
    "characters=8", "drawings=3", "transfer=null", "patience=null", "precision=fp32",
]  # fmt: skip
"""What makes a preset quick and leaves its recipe: loss, batches, optimizer, start, kernels, distortions."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(name: str) -> list[str]:
    """The overrides that make a step of a preset quick on `data`."""
    document = presets.load_all()[name]
    sets = [*TINY, *(RATES if name in SEARCHES else [])]
    if isinstance(document["settings"].get("fc"), list):
        sets.append("fc=[4, 4]")
    if "fixed_pairs" in document["settings"] or any(p["name"] == "fixed_pairs" for p in document["space"]):
        sets.append("fixed_pairs=8")
    if document["settings"].get("loss") == "classes":
        sets.append("classes=21")
    return sets


def data(side: int) -> Dataset:
    return Dataset(drawings(1, side=side), drawings(2, side=side), drawings(3, side=side), "strokes", side)


def test_the_siblings_are_all_here() -> None:
    assert set(presets.names()) >= SIBLINGS | SEARCHES


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_study_whose_points_can_be_trained(name: str) -> None:
    """Each point as a coordinator reads it, and the first one also as `whetstone train` does."""
    document = presets.load_all()[name]
    study = spec.parse(document, {"siamese": SiameseWorkload()})
    assert study.name == name
    whole = [study.space.nest(p) for p in study.points if len(p) == len(study.space.names)]
    for point in whole:
        config(point, study.settings, 0)
    if name in SEARCHES:
        assert not whole
    else:
        assert read(name, [], 0) == config(whole[0], study.settings, 0)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_trains(name: str) -> None:
    """Two steps of its first point, as tiny as it goes, on random characters."""
    tried = read(name, tiny(name), 5)
    made = data(tried.net.input)
    result = fit(tried, made, lambda epoch, metrics: None)
    assert result.outcome == "complete", result.reason
    assert result.epochs == 1


def test_presets_say_what_their_sources_say() -> None:
    keras = read("keras2017", [], 0)
    assert (keras.optimizer, keras.init, keras.batch_pairs, keras.distort) == ("adam", "keras2017", 32, False)
    assert {layer.eta for layer in keras.layers} == {6e-5}
    assert [layer.lam for layer in keras.layers] == [2e-4] * 4 + [1e-3, 0.0]
    assert keras.steps_per_epoch == 7000
    pytorch = read("pytorch2019", [], 0)
    assert pytorch.init == "paper"
    assert pytorch.steps_per_epoch * pytorch.epochs == 20_000
    for name, fc, copies in (("fc1", (4096,), 4), ("fc1-reg1", (4096,), 2), ("fc2", (2048, 2048), 2)):
        contrastive = read(f"contrastive2018-{name}", [], 0)
        assert (contrastive.loss, contrastive.net.fc, contrastive.fixed_pairs) == ("contrastive", fc, 40_000)
        assert contrastive.steps_per_epoch * contrastive.epochs == 50_000
        assert {layer.eta for layer in contrastive.layers} == {1e-5}
        assert len(presets.load_all()[f"contrastive2018-{name}"]["points"]) == copies
    assert read("contrastive2018-fc2", [], 0).net.dropout == 0.5
    assert [layer.lam for layer in read("contrastive2018-fc1-reg1", [], 0).layers] == [2e-4] * 4 + [0.0]
    for name, kernel, convolutions, outputs in (
        ("mnist-siamese", 3, 2, 128),
        ("mnist-siamese-out2", 5, 2, 2),
        ("mnist-siamese-out2-conv1", 3, 1, 2),
    ):
        digits = read(name, [], 0)
        assert {layer.kernel for layer in digits.net.conv} == {kernel}
        assert (len(digits.net.conv), digits.net.embedding) == (convolutions, outputs)
        assert (digits.steps_per_epoch * digits.epochs, digits.layers[0].eta) == (20_000, 1e-4)
    transfer, classifier = read("mnist-transfer", [], 0), read("mnist-classifier", [], 0)
    assert transfer.net.conv == classifier.net.conv, "its convolutions must fit"
    assert transfer.steps_per_epoch * transfer.epochs == 10_000
    triplet = read("triplet", [], 0)
    assert (triplet.loss, triplet.net.normalise, triplet.mining, triplet.same_alphabet) == (
        "triplet", True, "none", False
    )  # fmt: skip


def test_a_setting_is_overridden_wherever_the_preset_has_it() -> None:
    """In its point, in its settings or in neither; by its bare name or as `study launch --set` writes it."""
    changed = read(
        "contrastive2018-fc1", ["distance=l2", "settings.fixed_pairs=80000", "eta.conv1=1e-3", "rotations=true"], 7
    )
    assert changed.distance == changed.net.distance == "l2"
    assert (changed.fixed_pairs, changed.rotations, changed.seed) == (80_000, True, 7)
    assert [layer.eta for layer in changed.layers] == [1e-3, *[1e-5] * 4], "the other layers keep theirs"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main.run(["train", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_trained_is_one_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean keras2017?" in told(capsys, "keras2015")
    assert "whetstone study launch --preset koch2015" in told(capsys, "koch2015")
    assert "cannot be read" in told(capsys, "nowhere.yaml")
    assert "whetstone train mnist-classifier" in told(capsys, "mnist-transfer")
    faults = told(capsys, "mini-pxk", "--set", "epohcs=3", "--set", "eta=-1", "--set", "way=x")
    assert "did you mean epochs?" in faults
    assert "eta: must be" in faults
    assert "way: must be" in faults
    unread = told(capsys, "mini-pxk", "--set", "epochs", "--set", "way={")
    assert "epochs: write --set KEY=VALUE" in unread
    assert "way, line 1" in unread
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_preset_trains_from_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two presets one after another, each in a folder of its own, and the first one's again: there is nothing to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strokes.generate, "__kwdefaults__", {"seed": 0, "shape": strokes.SMALL})
    sets = [part for pair in [*tiny("triplet"), "data=strokes"] for part in ("--set", pair)]
    rest = ["--device", "cpu", "--threads", "1", "--json"]
    values: dict[str, Any] = {}
    for name in ("triplet", "mini-pxk", "triplet"):
        assert main.run(["train", name, *sets, *rest]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out)
        assert result["checkpoint"] == f"runs/{name}"
        assert (tmp_path / "runs" / name / "best.json").is_file()
        assert values.setdefault(name, result["value"]) == result["value"]
        assert "step" not in said.err, "no live line where nobody looks"


@pytest.mark.parametrize(("terminal", "more"), [(True, []), (False, []), (True, ["--json"])])
def test_a_person_at_a_terminal_sees_how_far_an_epoch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, more: list[str]
) -> None:
    shown = io.StringIO()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "err", Console(file=shown, force_terminal=terminal, width=100, highlight=False))
    monkeypatch.setattr(strokes.generate, "__kwdefaults__", {"seed": 0, "shape": strokes.SMALL})
    sets = [part for pair in [*tiny("triplet"), "data=strokes"] for part in ("--set", pair)]
    assert main.run(["train", "triplet", *sets, "--device", "cpu", "--threads", "1", *more]) == 0
    assert ("epoch 0, measuring" in shown.getvalue()) == (terminal and not more)
    assert "epoch    0   loss" in shown.getvalue()


def test_the_live_line_tells_epoch_step_and_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cli.train.time.monotonic", lambda: now[0])
    config, said = read("triplet", ["pairs_per_epoch=1280"], 0), Mock()
    line = _Line(said, config)
    for step in (1, 2, 3, 10):
        line(4, step)
        now[0] += 0.2
    told = [call.args[0] for call in said.update.call_args_list]
    assert told == ["epoch 4, step 1 of 10", "epoch 4, step 3 of 10, 640 pairs/s", "epoch 4, measuring"]


def test_a_recipe_of_ones_own_takes_overrides_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("params: {eta: 0.1, mu: 0.9, lambda: 0}\nsettings: {net: mini}\nseed: 4\n")
    tried = read(str(file), ["eta.fc=0.2", "epochs=3"], None)
    assert (tried.seed, tried.epochs) == (4, 3)
    assert {layer.label: layer.eta for layer in tried.layers}["fc"] == 0.2


@pytest.mark.parametrize("name", presets.names())
def test_no_preset_is_seeded_from_a_study_that_others_do_not_have(name: str) -> None:
    assert "seed_from" not in presets.load_all()[name]
