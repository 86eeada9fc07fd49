"""What a person types is read as it was meant, or refused in one line: never a traceback."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cli import main, output
from cli.overrides import assign
from cli.study import read_document
from hpo.errors import Invalid
from model.download import Progress
from tests.unit.test_model_recipe import GOOD


def test_a_studys_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("space: [{low: 1e-4, high: 1.0e-1}]")
    assert read_document(path) == {"space": [{"low": 1e-4, "high": 0.1}]}
    assert assign(["settings.lambda=1e-6", "settings.net=mini"]) == {"settings": {"lambda": 1e-6, "net": "mini"}}


@pytest.mark.parametrize("pairs", [["a=1", "a.b=2"], ["a={"], ["a"], ["=1"], ["a={b: 1, b: 2}"]])
def test_a_setting_that_cannot_be_one_is_refused(pairs: list[str]) -> None:
    with pytest.raises(Invalid):
        assign(pairs)


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2", "\x00", "- 1", "\xff"])
def test_a_study_that_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(Invalid):
        read_document(path)


def test_a_point_that_is_no_yaml_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["trial", "add", "1", "{eta: ["]) == 2
    assert "params" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "gpu"])
def test_a_device_that_is_not_here_is_one_line_and_exit_1(
    tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(GOOD)
    for command in (["train", "recipe.yaml"], ["evaluate", "run"]):
        assert main.run([*command, "--device", device]) == 1
        said = capsys.readouterr().err
        assert "--device" in said
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_at_a_terminal_sees_how_far_a_file_is(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=shown, force_terminal=terminal, width=100))

    def fetch(root: Path, *, home: Path, notify: Callable[[str], None], progress: Progress | None = None) -> None:
        if progress is not None:
            progress("images_background.zip", 0, None)
            progress("images_background.zip", 3_000_000, 9_000_000)
        notify("Omniglot: fetched")

    monkeypatch.setattr("model.fetch.fetch", fetch)
    assert main.run(["data", "fetch"]) == 0
    assert "fetched" in shown.getvalue()
    assert ("3.0/9.0 MB" in shown.getvalue()) == terminal
